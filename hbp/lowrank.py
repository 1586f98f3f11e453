"""Residual maps of low rank beside a cheap path: the few strong directions that training puts into a layer.

The suffix scan of such maps is sequential by definition; its parallel form is that of dense maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hbp.core.backend import Array, Backend, dtype_name
from hbp.core.joining import concatenate, one_each
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero, lift, zero
from hbp.core.registry import backend_of, load
from hbp.factors import alike, beside, check_axes, each, eye, widened, zeros

PATH = Zero()


@dataclass(frozen=True, eq=False)
class LowRank(LinearOperator):
    """R = path + left right on the last axis of the state, written ``Diagonal(...) + LowRank(left, right)``.

    Products stay of this kind; their ranks add up, to at most d. Beside a `Pair` the state, (..., 2, H), counts as one
    of d = 2 H numbers.

    Args:
        left: (L or 1, ..., d, r); a length of 1 is shared by all maps.
        right: (L or 1, ..., r, d).
        path: maps of another kind; the sum with a `Dense` is a `Dense`.

    Raises:
        TypeError, ValueError: no arrays, factors that do not fit each other, or a path of such a kind.

    >>> import numpy as np
    >>> from hbp import Diagonal
    >>> maps = Diagonal(np.array([[1.0, 2.0]])) + LowRank(np.ones((1, 2, 1)), np.ones((1, 1, 2)))
    >>> maps.mv(np.array([[1.0, 1.0]])).tolist(), (maps @ maps).rank
    ([[3.0, 4.0]], 2)
    """

    left: Array
    right: Array
    path: LinearOperator = PATH

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if not hasattr(value, "shape"):
                raise TypeError(f"LowRank takes arrays, {name} is a {type(value).__name__}")
        if not isinstance(self.path, LinearOperator) or isinstance(self.path, Dense | LowRank):
            raise TypeError(f"the path of a LowRank is a {type(self.path).__name__}; add the two by +")
        if min(self.left.ndim, self.right.ndim) < 2 or self.left.shape[-1] != self.right.shape[-2]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise ValueError(f"the factors have shapes {shapes}; expected (L or 1, ..., d, r) and (L or 1, ..., r, d)")

    @property
    def rank(self) -> int:
        """The number of columns of ``left``."""
        return int(self.left.shape[-1])

    @property
    def T(self) -> LowRank:  # noqa: N802
        return LowRank(self.right.swapaxes(-1, -2), self.left.swapaxes(-1, -2), self.path.T)

    @property
    def length(self) -> int | None:
        return next((n for n in (len(self.left), len(self.right), self.path.length) if n not in (1, None)), 1)

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.left, self.right, *self.path.arrays)

    def mapped(self, function: Callable[[Array], Array]) -> LowRank:
        return LowRank(function(self.left), function(self.right), self.path.mapped(function))

    def mv(self, v: Array) -> Array:
        low = _states((self.left @ (self.right @ _flat(v, self)[..., None]))[..., 0], self)
        return low if isinstance(self.path, Zero) else self.path.mv(v) + low

    def scaled(self, factor: Any) -> LowRank:
        lifted = factor.reshape((-1,) + (1,) * (self.left.ndim - 1)) if hasattr(factor, "shape") else factor
        return LowRank(self.left * lifted, self.right, self.path.scaled(factor))

    def dense(self) -> Dense:
        """The same maps as full matrices; TypeError beside a `Pair`."""
        if isinstance(self.path, Pair):
            raise TypeError("a LowRank beside a Pair acts on pairs of arrays, and a Dense does not")
        product = self.left @ self.right
        if isinstance(self.path, Zero):
            return Dense(product)
        return Dense(self.path.mv(zeros(product[..., 0]) + 1)[..., None] * eye(self.left) + product)

    def check_length(self, length: int) -> None:
        for wrong in {len(self.left), len(self.right)} - {1, length}:
            found = f"the residual LowRank has {wrong} maps and the chain {length} layers"
            raise ValueError(f"{found}; give one map per layer, or one that all share")
        self.path.check_length(length)

    def check_map(self, like: Array) -> None:
        self._check_factors(like, tuple(self.left.shape), tuple(self.right.shape))
        self.path.check_map(like)

    def bind(self, length: int, like: Array, backend: Backend) -> LowRank:
        self.check_length(length)
        self._check_factors(like, tuple(self.left.shape[1:]), tuple(self.right.shape[1:]))
        path = one_each(self.path.bind(length, like, backend), length, like, backend)
        axes = like.ndim - isinstance(path, Pair) + 2
        left, right = (x.reshape(len(x), *(1,) * (axes - x.ndim), *x.shape[1:]) for x in (self.left, self.right))
        if {len(left), len(right), path.length or 1} == {1}:  # all is shared: something has to have the stack's length
            right = backend.xp.broadcast_to(right, (length, *right.shape[1:]))
        return LowRank(left, right, path)

    def _check_factors(self, like: Array, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        if wrong := {dtype_name(self.left), dtype_name(self.right)} - {dtype_name(like)}:
            raise TypeError(f"the residual LowRank is {wrong.pop()} and the states are {dtype_name(like)}; cast one")
        *batch, d = _flat(like, self).shape or (0,)
        broadcasts = [
            len(own) <= len(batch) and all(a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False))
            for own in (left[:-2], right[:-2])
        ]
        if not all(broadcasts) or left[-2:-1] != (d,) or right[-1:] != (d,):
            raise ValueError(
                f"one map of the residual LowRank has factors of shapes {left} and {right}, which do not act on states "
                f"of shape {tuple(like.shape)}; expected (..., {d}, r) and (..., r, {d})"
            )

    def __getitem__(self, index: Any) -> LowRank:
        own = slice(None) if isinstance(index, slice) else 0
        left, right = (x[own if len(x) == 1 else index] for x in (self.left, self.right))
        return LowRank(left, right, self.path[index])

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return self.__radd__(other)

    def __radd__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if isinstance(other, LowRank):
            check_axes(self.left, self.right, other.left, other.right)
            left, right = beside(other.left, self.left, -1), beside(other.right, self.right, -2)
            return _capped(LowRank(left, right, self.path)).__radd__(other.path)
        if not isinstance(self.path, Zero):
            if isinstance(other, Zero):
                return self
            raise TypeError(f"a {type(other).__name__} and a {type(self.path).__name__} do not add up; give one path")
        return Dense(self.dense().matrix + other.matrix) if isinstance(other, Dense) else replace(self, path=other)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Zero):
            return other
        if not isinstance(other, LinearOperator):
            return NotImplemented
        _check_states(self, other)
        if isinstance(other, Dense):
            return self.dense() @ other
        if isinstance(other, LowRank):
            return (self @ other.path) + LowRank(_columns(self, other.left), other.right)
        right = _columns(other.T, self.right.swapaxes(-1, -2)).swapaxes(-1, -2)
        return LowRank(self.left, right, self.path @ other)

    def __rmatmul__(self, other: LinearOperator) -> LinearOperator:
        _check_states(other, self)
        if isinstance(other, Dense):
            return other @ self.dense()
        return LowRank(_columns(other, self.left), self.right, other @ self.path)

    def joined(self, other: LowRank, backend: Backend) -> LowRank:
        """These maps followed by others of this kind."""
        rank = max(self.rank, other.rank)
        both, paths = [one.padded(rank) for one in (self, other)], concatenate(self.path, other.path, backend)
        left = backend.concat(alike([each(one.left, one.length) for one in both], 0))
        right = backend.concat(alike([each(one.right, one.length) for one in both], 0))
        return LowRank(left, right, paths)

    def padded(self, rank: int) -> LowRank:
        """The same maps with factors of a higher rank, filled up with zeros."""
        more = rank - self.rank
        return LowRank(widened(self.left, more, -1), widened(self.right, more, -2), self.path)


def stacked(maps: Sequence[LinearOperator], path: LinearOperator, like: Array, backend: Backend) -> LowRank:
    """Single maps, of which some are `LowRank`, as one stack beside the stack of their paths."""
    d = next(one.left.shape[-2] for one in maps if isinstance(one, LowRank))
    nothing = LowRank(*(backend.xp.broadcast_to(zero(like, backend), shape) for shape in ((d, 0), (0, d))))
    low = [one if isinstance(one, LowRank) else nothing for one in maps]
    wide = [one.padded(max(one.rank for one in low)) for one in low]
    left, right = (backend.stack(alike([getattr(one, side) for one in wide])) for side in ("left", "right"))
    return LowRank(left, right, path)


def _on_pairs(maps: LinearOperator) -> bool:
    return isinstance(maps.path if isinstance(maps, LowRank) else maps, Pair)


def _flat(v: Array, maps: LinearOperator) -> Array:
    """States with the axes that factors act on as one: a `Pair`'s last two."""
    if not _on_pairs(maps) or v.ndim < 2:
        return v
    return v.reshape((*v.shape[:-2], v.shape[-2] * v.shape[-1]))


def _states(v: Array, maps: LinearOperator) -> Array:
    """The inverse of `_flat`."""
    return v.reshape((*v.shape[:-1], 2, v.shape[-1] // 2)) if _on_pairs(maps) else v


def _check_states(a: LinearOperator, b: LinearOperator) -> None:
    """Raise TypeError where one of two kinds acts on pairs and the other on single arrays."""
    if _on_pairs(a) != _on_pairs(b) and not any(isinstance(one, Identity | Scalar) for one in (a, b)):
        kinds = f"{type(a).__name__} with {type(b).__name__}"
        raise TypeError(f"cannot compose {kinds}, one of which acts on pairs: give one same kind")


def _columns(maps: LinearOperator, factor: Array) -> Array:
    """``maps`` applied to each column of a factor (..., d, r)."""
    match maps:
        case LowRank(left, right, path):
            low = left @ (right @ factor)
            return low if isinstance(path, Zero) else _columns(path, factor) + low
        case Identity():
            return factor
        case Scalar(value):
            return factor * lift(value, factor.ndim)
        case Diagonal(values):
            return values[..., None] * factor
        case Pair(left, right):
            pairs = factor.reshape((*factor.shape[:-2], 2, factor.shape[-2] // 2, factor.shape[-1]))
            pulled = left[..., None] * (right[..., None] * pairs).sum(-3)[..., None, :, :]
            return pulled.reshape((*pulled.shape[:-3], *factor.shape[-2:]))
    columns = [maps.mv(factor[..., j]) for j in range(factor.shape[-1])]  # of a user's own kind
    return load(backend_of(factor)).backend.stack(columns, -1) if columns else factor


def _capped(maps: LowRank) -> LowRank:
    """The same maps with d for their rank, where it is more."""
    if maps.rank <= maps.left.shape[-2]:
        return maps
    whole = eye(maps.left)
    right = whole.reshape((1,) * (maps.left.ndim - 2) + tuple(whole.shape))
    return replace(maps, left=maps.left @ maps.right, right=right)
