"""Factors of maps of low rank, (L or 1, ..., d, r): side by side, with more columns, one for each map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from hbp.core.backend import Array
from hbp.core.operator import zero
from hbp.core.registry import backend_of, load


def check_axes(*factors: Array) -> None:
    """Raise ValueError where one factor's axis of layers would meet another's axis of a batch."""
    axes = {factor.ndim for factor in factors}
    if any(2 < factor.ndim < max(axes) and len(factor) > 1 for factor in factors):
        raise ValueError(f"factors with {min(axes)} and {max(axes)} axes do not add up; give all the axes of a batch")


def beside(a: Array, b: Array, axis: int) -> Array:
    """Two factors side by side along one of their last two axes."""
    return load(backend_of(a)).backend.concat(alike([a, b], axis), axis)


def alike(arrays: Sequence[Array], axis: int | None = None) -> list[Array]:
    """Arrays broadcast against each other but for one axis."""
    xp, sizes = load(backend_of(arrays[0])).backend.xp, zip_longest(*(x.shape[::-1] for x in arrays), fillvalue=1)
    shape, found = [max(own) if all(own) else 0 for own in sizes][::-1], []
    for x in arrays:
        if axis is not None:
            kept = axis if axis < 0 else axis - len(shape)
            shape[kept] = x.shape[kept]
        found.append(xp.broadcast_to(x, tuple(shape)))
    return found


def widened(factor: Array, more: int, axis: int) -> Array:
    """A factor with ranks of zeros behind its own."""
    if not more:
        return factor
    backend = load(backend_of(factor)).backend
    shape = list(factor.shape)
    shape[axis] = more
    return backend.concat([factor, backend.xp.broadcast_to(zero(factor, backend), tuple(shape))], axis)


def each(factor: Array, length: int | None) -> Array:
    """A factor with an entry for each of so many maps."""
    return load(backend_of(factor)).backend.xp.broadcast_to(factor, (length, *factor.shape[1:]))


def zeros(x: Array) -> Array:
    """Zeros like an array, as its own library makes them."""
    return load(backend_of(x)).backend.zeros_like(x)


def eye(left: Array) -> Array:
    """The identity of the states that a factor (..., d, r) acts on."""
    row = left.sum(tuple(n for n in range(left.ndim) if n != left.ndim - 2))
    return load(backend_of(left)).backend.xp.diag(zeros(row) + 1)
