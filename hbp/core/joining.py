"""Joining residual maps into stacks, and promoting mixed kinds to the widest among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbp.core.backend import Array, Backend
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero, numbers


def concatenate(
    a: LinearOperator, b: LinearOperator, lengths: tuple[int, int], backend: Backend | None
) -> LinearOperator:
    """The stack ``a`` followed by ``b``, two stacks of one kind and of the given lengths."""
    if isinstance(a, Scalar) and isinstance(b, Scalar) and not (a.arrays and b.arrays):
        first, second = (numbers(part.value, (1,) * n)[0] for part, n in zip((a, b), lengths, strict=True))
        return Scalar(tuple(first) + tuple(second))
    if isinstance(a, Identity | Zero):
        return a
    assert backend is not None  # stacks that hold arrays have one
    joined = []
    for x, y in zip(a.arrays, b.arrays, strict=True):
        if x.shape[1:] != y.shape[1:]:  # a product of Pairs fills axes that a single one only broadcasts along
            x, y = x + backend.zeros_like(y[:1]), y + backend.zeros_like(x[:1])
        joined.append(backend.concat([x, y]))
    return type(a)(*joined)


def stack(maps: Sequence[LinearOperator], like: Array, backend: Backend) -> LinearOperator:
    """Stack single maps on states like ``like``; mixed kinds are promoted to the widest among them.

    Raises:
        TypeError: an entry is no operator, or a `Pair` stands beside another kind.
    """
    for i, entry in enumerate(maps):
        if not isinstance(entry, LinearOperator):
            raise TypeError(f"the residual map of layer {i} is a {type(entry).__name__}; return one of hbp's operators")
        try:
            entry.check_map(like)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None
    kinds = {type(entry) for entry in maps}
    if len(kinds) <= 1 and not kinds - {Identity, Zero}:
        return maps[0] if maps else Identity()
    alike = len({tuple(tuple(array.shape) for array in entry.arrays) for entry in maps}) == 1
    if Pair in kinds:
        if kinds != {Pair}:
            names = sorted(kind.__name__ for kind in kinds)
            raise TypeError(f"one chain mixes the residual kinds {names}; a Pair goes with Pairs only")
        if not alike:
            zeros = backend.zeros_like(like)
            maps = [Pair(*(array + zeros for array in entry.arrays)) for entry in maps]
        return Pair(*(backend.stack(arrays) for arrays in zip(*(entry.arrays for entry in maps), strict=True)))
    if kinds == {Dense} and alike:
        return Dense(backend.stack([entry.arrays[0] for entry in maps]))
    if Dense in kinds:
        return Dense(backend.stack([_as_matrix(entry, like, backend) for entry in maps]))
    if Diagonal in kinds:
        return Diagonal(backend.stack([_as_diagonal(entry, like, backend) for entry in maps]))
    zero = backend.zeros_like(like.reshape(-1)[:1].sum())
    return Scalar(backend.stack([zero + _as_number(entry) for entry in maps]))


def _as_number(entry: LinearOperator) -> Any:
    return entry.value if isinstance(entry, Scalar) else float(isinstance(entry, Identity))


def _as_diagonal(entry: LinearOperator, like: Array, backend: Backend) -> Array:
    values = entry.values if isinstance(entry, Diagonal) else _as_number(entry)
    return backend.zeros_like(like) + values


def _as_matrix(entry: LinearOperator, like: Array, backend: Backend) -> Array:
    if isinstance(entry, Dense):
        return backend.zeros_like(like)[..., None] + entry.matrix
    row = like if like.ndim == 1 else like.sum(tuple(range(like.ndim - 1)))
    one = backend.zeros_like(row) + 1
    return _as_diagonal(entry, like, backend)[..., None] * backend.xp.diag(one)
