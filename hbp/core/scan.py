"""Suffix scans of affine maps: the sequential definition and its parallel form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hbp.core.backend import Array, Backend
from hbp.core.joining import concatenate, one_each
from hbp.core.operator import Diagonal, LinearOperator, Pair


@dataclass(frozen=True, eq=False)
class Affine:
    """A stack of affine maps ``v -> A v + b``, closed under composition ``@``.

    >>> from hbp.core.operator import Scalar
    >>> (Affine(Scalar(2.0), 1.0) @ Affine(Scalar(3.0), 4.0))(5.0)
    39.0
    """

    linear: LinearOperator
    offset: Array

    def __call__(self, v: Array) -> Array:
        """``A v + b``."""
        return self.linear.mv(v) + self.offset

    def __matmul__(self, other: Affine) -> Affine:
        """First ``other``, then this map."""
        return Affine(self.linear @ other.linear, self(other.offset))

    def __getitem__(self, index: Any) -> Affine:
        return Affine(self.linear[index], self.offset[index])


def sequential(operator: LinearOperator, c: Array, backend: Backend) -> Array:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]``, one map after another: the definition.

    ``c`` and the result have shape (L+1, ...); ``operator`` holds the L maps ``A`` in the direction they are
    applied, so a backward pass gives ``residual.T``.
    """
    g = [c[-1]]
    for i in reversed(range(len(c) - 1)):
        g.append(operator[i].mv(g[-1]) + c[i])
    return backend.stack(g[::-1])


def hillis_steele(operator: LinearOperator, c: Array, backend: Backend) -> Array:
    """The same as `sequential` in ceil(log2 L) rounds, each of them parallel over the chain.

    Algorithm 1 of the paper (Hillis and Steele, 1986), with its products started from the next layer's map, as
    they must be; the composed maps are applied to ``c[L]`` at the end.
    """
    length = len(c) - 1
    maps, shift = Affine(one_each(operator, length, c[-1], backend), c[:-1]), 1
    while shift < length:
        head, tail = maps[: length - shift] @ maps[shift:], maps[length - shift :]
        maps = Affine(concatenate(head.linear, tail.linear, backend), backend.concat([head.offset, tail.offset]))
        shift *= 2
    return backend.concat([maps(c[-1:]), c[-1:]])


def propagate_pair(operator: Pair, c: Array, backend: Backend) -> Array:
    """The same as `sequential` for rank-one pairs, as a scan of one diagonal.

    With ``s[i] = <right[i], g[i+1]>`` the recursion reads ``s[i-1] = <right[i-1], left[i]> s[i] +
    <right[i-1], c[i]>`` and ``g[i] = left[i] s[i] + c[i]``.
    """
    if len(c) == 1:
        return c
    left, right = operator.left, operator.right
    s = backend.propagate(Diagonal((right[:-1] * left[1:]).sum(-2)), (right * c[1:]).sum(-2))
    return backend.concat([left * s[..., None, :] + c[:-1], c[-1:]])


def loop(
    step: Callable[[Any, Any], Any], carry: Any, rows: Array | int, reverse: bool = False, *, backend: Backend
) -> Any:
    """The carries after each ``carry = step(carry, row)``, stacked in the rows' order: the definition of a scan.

    A carry is an array or a tuple of arrays. The rows are an array's, or, for a number, 0, 1, ... below it; a reverse
    scan takes them from the last to the first.
    """
    items = range(rows) if isinstance(rows, int) else rows
    carries = []
    for i in reversed(range(len(items))) if reverse else range(len(items)):
        carry = step(carry, items[i])
        carries.append(carry)
    carries = carries[::-1] if reverse else carries
    if isinstance(carry, tuple):
        return tuple(backend.stack(entries) for entries in zip(*carries, strict=True))
    return backend.stack(carries)
