"""Residual maps one after another in one stack."""

from __future__ import annotations

from hbp.core.backend import Array, Backend
from hbp.core.operator import LinearOperator, Scalar, zero


def one_each(maps: LinearOperator, length: int, like: Array, backend: Backend) -> LinearOperator:
    """A stack of ``length`` maps, bound; a `Scalar` given as one number as an array of them, like the states."""
    number = isinstance(maps, Scalar) and not maps.arrays and length
    return Scalar(backend.stack([zero(like, backend) + maps.value] * length)) if number else maps  # type: ignore[attr-defined]


def concatenate(a: LinearOperator, b: LinearOperator, backend: Backend) -> LinearOperator:
    """The stack ``a`` followed by ``b``, two stacks of one kind; numbers are made arrays before (`one_each`).

    A kind whose arrays are not simply laid end to end has a method ``joined``.
    """
    if hasattr(a, "joined"):
        return a.joined(b, backend)  # type: ignore[no-any-return]
    joined = []
    for x, y in zip(a.arrays, b.arrays, strict=True):
        if x.shape[1:] != y.shape[1:]:  # a product of Pairs fills axes that a single one only broadcasts along
            x, y = x + backend.zeros_like(y[:1]), y + backend.zeros_like(x[:1])
        joined.append(backend.concat([x, y]))
    return type(a)(*joined) if joined else a
