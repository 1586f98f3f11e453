"""The strong directions of a weight, for the residual path of a recurrent net (`hbp.LowRank`).

Training puts a few large singular values into recurrent weights, above the flat spectrum that they started with. A
gate's diagonal carries none of them through time; as part of the residual path they need no round of Highway-BP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from hbp.core.backend import Array, Backend, check_count, check_floating, check_kind, check_shape
from hbp.core.registry import resolve

SPARE = 4
"""Directions that "auto" follows beside those above the flat edge, to see new ones rise. It takes them, too, where some
are above: what training adds begins at the edge, where noise hides it. A trained LSTM needed 16 rounds along its four
directions above the edge, and 2 along six."""
MARGIN = 1.1
"""How far a singular value must be above the edge of a flat spectrum, which is sharp only in the limit."""
KEPT = 0.5
"""The part of a weight along earlier directions that must be left in them, for the next to start from there."""
ROUNDING = 1e-8
"""The fraction of the sum of squares below which a remainder is rounding."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Leading singular directions of a weight W, (N, H): ``left @ right`` is near W, the rows of ``right`` orthonormal.

    Args:
        left: W times the transpose of ``right``, (N, k).
        right: (k, H), the strongest first.
        rank: how many are taken; the rest is followed only.
    """

    left: Array
    right: Array
    rank: int

    @property
    def taken(self) -> tuple[Array, Array]:
        """The factors of the directions that are taken, (N, r) and (r, H)."""
        return self.left[:, : self.rank], self.right[: self.rank]

    @property
    def values(self) -> tuple[float, ...]:
        """The singular values along all directions, as far as they have converged."""
        return tuple(math.sqrt(square) for square in (self.left * self.left).sum(0).tolist())

    def __repr__(self) -> str:
        try:
            values: Any = [round(value, 3) for value in self.values]
        except TypeError:  # in a program that is being traced there are no numbers
            values = "traced"
        return f"Directions(rank={self.rank}, values={values})"


Rank: TypeAlias = int | Literal["auto"] | Directions
"""How many directions the residual path takes: a number, those above the flat edge and a few more, or given ones."""


def check_rank(rank: Any) -> None:
    """Raise TypeError or ValueError unless ``rank`` is one (`Rank`)."""
    if isinstance(rank, str) and rank != "auto":
        raise ValueError(f"rank={rank!r}; give a number of directions, 'auto' for those above the flat edge, or 0")
    if not isinstance(rank, str | Directions):
        check_count("rank", rank, 0)


def directions(
    weight: Array, rank: Rank, start: Directions | None = None, *, backend: Backend | str | None = None
) -> Directions:
    """The leading singular directions of a weight.

    Args:
        weight: (N, H), as a recurrent layer's ``weight_hh``.
        rank: how many; "auto" takes those whose singular values rise above the edge of a flat spectrum of the
            remainder's size (`flat_edge`) and, where there are such, the next four. Directions are given back as they
            are.
        start: those of the weight before its last change: one step of subspace iteration from them, two products of
            N x H x r and a small one, instead of a whole singular value decomposition, which takes about 10 N H^2
            operations. It is a decomposition again where there are more or fewer, where the weight was zero or not
            finite, and where less than half of it is left along them, as after other weights were loaded. Inside
            `jax.jit` this last is not seen, and columns of the weight stand in for what is zero or not finite: further
            steps converge.
        backend: a backend or its name, where it shall not be chosen by the library's rules.

    Returns:
        The directions. Their ``right`` counts as constant in derivatives.

    Raises:
        TypeError, ValueError: no matrix of floating-point numbers, no rank, or more than H; a start of another weight;
            "auto" inside `jax.jit`.

    >>> import numpy as np
    >>> strong = directions(np.diag([3.0, 1.0, 1.0]), 1)
    >>> strong.values, abs(strong.right).tolist()
    ((3.0,), [[1.0, 0.0, 0.0]])
    """
    resolved: Any = check_directions(weight, rank, backend)
    if isinstance(rank, Directions):
        return rank
    if start is not None:
        check_kind("start", start, Directions, "the directions of the weight before, or None")
        check_directions(weight, start, resolved)
    wide = resolved.widened(weight)
    fixed = resolved.constant(wide)
    right, taken = _automatic(fixed, start, resolved) if rank == "auto" else (_rows(fixed, rank, start, resolved), rank)
    return Directions(resolved.cast(wide @ right.T, weight), resolved.cast(right, weight), taken)


def check_directions(weight: Array, rank: Any, backend: Backend | str | None = None) -> Backend:
    """Check that a weight, (N, H), has so many directions, or that given ones may be its own; returns the backend.

    Raises:
        TypeError, ValueError: it does not.
    """
    check_rank(rank)
    given = {"left": rank.left, "right": rank.right} if isinstance(rank, Directions) else {}
    resolved = resolve(backend, weight, *given.values())
    check_floating(weight=weight, **given)
    if weight.ndim != 2:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}; expected (N, H)")
    if isinstance(rank, Directions):
        check_shape("the directions' left factor", rank.left, (weight.shape[0], rank.right.shape[0]))
        check_shape("the directions' right factor", rank.right, (rank.right.shape[0], weight.shape[1]))
    elif rank != "auto" and rank > min(weight.shape):
        raise ValueError(f"rank={rank} is more than a weight of shape {tuple(weight.shape)} has; give less")
    return resolved


def check_known(weight: Array, rank: Rank, backend: Any) -> None:
    """Raise TypeError where a weight's numbers, which "auto" needs, are not known yet."""
    if rank == "auto" and not isinstance(backend.norm(backend.constant(weight[:1, :1])), float):
        raise TypeError(
            "rank='auto' needs the weight's numbers; inside jax.jit give a number, or directions from outside"
        )


def flat_edge(values: tuple[float, ...], total: float, shape: tuple[int, int]) -> float:
    """The largest singular value that noise of the remainder's size would have (Marchenko and Pastur, 1967).

    Args:
        values: the singular values that are no noise.
        total: the sum of squares of all entries of the weight.
        shape: the weight's, (N, H).

    >>> round(flat_edge((), 100.0, (30, 10)), 3)  # 300 entries of variance 1 / 3
    4.988
    """
    rows, columns = (size - len(values) for size in shape)
    rest = max(total - sum(value * value for value in values), ROUNDING * total)
    variance = rest / (rows * columns) if min(rows, columns) > 0 else 0.0
    return math.sqrt(variance) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def above_edge(values: tuple[float, ...], total: float, shape: tuple[int, int]) -> int:
    """How many singular values, given in falling order, rise above the flat edge that the others leave."""
    rank = 0
    while rank < len(values) and values[rank] > MARGIN * flat_edge(values[:rank], total, shape):
        rank += 1
    return rank


def _automatic(weight: Array, start: Directions | None, backend: Any) -> tuple[Array, int]:
    """The leading right singular directions, and how many of them are taken."""
    check_known(weight, "auto", backend)
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    right = _rows(weight, len(start.right) if start is not None else min(shape), start, backend)
    values = Directions(weight @ right.T, right, 0).values
    if any(a < b for a, b in pairwise(values)):  # one that is followed has overtaken another
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
        right, values = backend.stack([right[i] for i in order]), tuple(values[i] for i in order)
    total = backend.norm(weight) ** 2
    strong = above_edge(values, total, shape)
    if start is not None and strong == len(right) < min(shape):
        return _automatic(weight, None, backend)
    known = [value for value in values[: strong + SPARE] if value * value > ROUNDING * total]
    return right[: strong + SPARE], len(known) if strong else 0


def _rows(weight: Array, count: int, start: Directions | None, backend: Any) -> Array:
    """An orthonormal basis of the leading right singular directions, (count, H)."""
    if start is not None and len(start.right) == count:
        found = _next_rows(weight, backend.constant(backend.widened(start.left)), backend)
        if found is not None:
            return found
    if isinstance(norm := backend.norm(weight), float) and not math.isfinite(norm):
        return backend.zeros_like(weight[:1].T @ weight[:1])[:count]  # as no decomposition would take it
    return backend.xp.linalg.svd(weight, full_matrices=False)[2][:count]


def _next_rows(weight: Array, left: Array, backend: Any) -> Array | None:
    """The rows after one step of subspace iteration from a left factor; None where that one is no start."""
    before = backend.norm(left.T @ left)
    if not isinstance(before, float):
        left = backend.xp.where((before > 0) & (before < math.inf), left, weight[:, : left.shape[1]])
    elif not 0 < before < math.inf:
        return None
    turned = left.T @ weight  # reads the weight as it lies
    now = backend.norm(turned)  # of the same weight at least as much
    if isinstance(now, float) and not now >= KEPT * before:
        return None
    return backend.xp.linalg.qr(turned.T)[0].T
