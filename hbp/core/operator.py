"""Residual Jacobians as values: stacks of cheap linear maps with an algebra.

The residual map of layer i, ``R[i]``, takes a tangent of ``x[i]`` to one of ``x[i+1]`` and is given in this
forward orientation; the solvers transpose. An operator stands for a stack of L maps, one per layer, whose arrays
have a leading axis of length L; ``A[i]`` is one map, ``A[i:j:s]`` a shorter stack. Composition ``A @ B`` (first B,
then A) and the transpose ``A.T`` act map by map and stay within these types, which is what lets a prefix scan
compose them (design: Boehm et al. 2019, and equation 12 of the highway-backpropagation paper).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

from hbp.core.backend import Array, Backend, dtype_name


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A stack of linear maps; this base class is symmetric and has any length, as `Identity` and `Zero` are."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not hasattr(value, "shape"):
                raise TypeError(f"{type(self).__name__} takes arrays, {name} is a {type(value).__name__}")

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - the field's name for a transpose
        """The transposed maps, in the same order."""
        return self

    @property
    def length(self) -> int | None:
        """The number of maps, or None for a stack of any length."""
        return next((len(array) if array.ndim else 0 for array in self.arrays), None)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays this stack is made of (none for `Identity`, `Zero` and a `Scalar` given as a number)."""
        return tuple(value for value in vars(self).values() if hasattr(value, "shape"))

    def mapped(self, function: Callable[[Array], Array]) -> LinearOperator:
        """The maps made of ``function``'s values on these arrays."""
        return type(self)(*map(function, self.arrays)) if self.arrays else self

    def mv(self, v: Array) -> Array:
        """Apply each map to its own entry of ``v``, shape (L, ...), or one map to one state."""
        raise NotImplementedError(f"a {type(self).__name__} has no mv; a residual operator needs one")

    def scaled(self, factor: Any) -> LinearOperator:
        """Each map times a number, or times its own entry of an (L,) array."""
        if type(self).__module__ != __name__:  # ours are linear in their first array
            raise NotImplementedError(f"a {type(self).__name__} has no scaled(factor); define it")
        first, *others = self.arrays
        return type(self)(*(first * lift(factor, first.ndim), *others))

    def bind(self, length: int, like: Array, backend: Backend) -> LinearOperator:
        """This stack, checked against ``length`` states like ``like`` and aligned with them for broadcasting.

        Raises:
            ValueError: the stack has another length, or its maps do not act on states of this shape.
            TypeError: its dtype is not that of the states (a `Diagonal` may be boolean).
        """
        return self.mapped(lambda array: self._aligned(array, length, like, backend))

    def check_map(self, like: Array) -> None:
        """Check that this single map acts on states like ``like``; raises as `bind` does."""
        for array in self.arrays:
            self._check(array, tuple(array.shape), like)

    def _target(self, like: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape that one map's arrays broadcast to, and the axes of it that must be there in full."""
        return (), ()

    def _check(self, array: Array, own: tuple[int, ...], like: Array) -> None:
        """Check the dtype, and the shape of one map."""
        kind, given, dtype = type(self).__name__, dtype_name(array), dtype_name(like)
        if given != dtype and not (given == "bool" and isinstance(self, Diagonal)):
            raise TypeError(f"the residual {kind} is {given} and the states are {dtype}; cast one of them")
        shape, full = self._target(like)
        fits = len(own) <= len(shape) and all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))
        if not fits or any(len(own) < -axis or own[axis] != shape[axis] for axis in full):
            lacks = type(self)._target is LinearOperator._target and not isinstance(self, Scalar)
            cure = f", or define {kind}._target(like)" if lacks else ""
            raise ValueError(
                f"one map of the residual {kind} has shape {own}, which does not act on states of shape "
                f"{tuple(like.shape)}; expected a shape that broadcasts to {shape}{cure}"
            )

    def _aligned(self, array: Array, length: int, like: Array, backend: Backend) -> Array:
        """``array`` as (length, 1, ..., 1, its own axes), checked."""
        if array.ndim == 0:
            cure = "give a Python number or one map per layer"
            raise ValueError(f"the residual {type(self).__name__} is a 0-d array; {cure}")
        self.check_length(length)
        self._check(array, own := tuple(array.shape[1:]), like)
        if dtype_name(array) == "bool":
            array = array + zero(like, backend)
        return array.reshape((length,) + (1,) * (len(self._target(like)[0]) - len(own)) + own)

    def check_length(self, length: int) -> None:
        """Check that these are the maps of so many layers (ValueError)."""
        for wrong in {len(array) if array.ndim else 0 for array in self.arrays} - {length}:
            found = f"the residual {type(self).__name__} has {wrong} maps and the chain {length} layers"
            raise ValueError(f"{found}; give one map per layer")

    def __getitem__(self, index: Any) -> LinearOperator:
        return self.mapped(lambda array: array[index])

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        try:
            product = compose(self, other)
        except (TypeError, ValueError, RuntimeError) as error:  # of the array library
            shapes = " and ".join(str([tuple(array.shape) for array in one.arrays]) for one in (self, other))
            raise ValueError(f"cannot compose maps of shapes {shapes}; they must act on the same states") from error
        if product is None and not hasattr(other, "__rmatmul__"):
            raise TypeError(f"cannot compose {type(self).__name__} with {type(other).__name__}: give one same kind")
        return NotImplemented if product is None else product


@dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """R = I: pre-activation and pre-norm residual layers, ``x + block(x)``.

    >>> Identity().mv(3.0)
    3.0
    """

    def mv(self, v: Array) -> Array:
        return v

    def scaled(self, factor: Any) -> LinearOperator:
        return Scalar(factor)


@dataclass(frozen=True, eq=False)
class Zero(LinearOperator):
    """R = 0: no residual path, the fixed-point baseline of Wang and Ragni (2021)."""

    def mv(self, v: Array) -> Array:
        return v * 0

    def scaled(self, factor: Any) -> LinearOperator:
        return self


@dataclass(frozen=True, eq=False)
class Scalar(LinearOperator):
    """R = s I with a number (a stack of any length) or one number per layer, shape (L,).

    ``Scalar(1 - gamma)`` is the damped split that transformers need (equation 17 of the paper).

    >>> (Scalar(0.5) @ Scalar(0.5)).mv(8.0)
    2.0
    """

    value: Any

    def __post_init__(self) -> None:
        if isinstance(self.value, Real):
            object.__setattr__(self, "value", float(self.value))  # a NumPy scalar would widen float32 states
            if not isfinite(self.value):
                raise ValueError(f"Scalar({self.value}) is no residual path; give a finite number")
        elif not hasattr(self.value, "shape"):
            raise TypeError(f"Scalar takes a number or an (L,) array, not a {type(self.value).__name__}")

    def mv(self, v: Array) -> Array:
        return v * lift(self.value, v.ndim) if hasattr(self.value, "shape") else v * self.value

    def scaled(self, factor: Any) -> LinearOperator:
        return Scalar(self.value * factor)


@dataclass(frozen=True, eq=False)
class Diagonal(LinearOperator):
    """R = diag(values), shape (L, ...): gates of recurrent cells, ReLU masks, scales of a post-norm.

    One map broadcasts against one state as NumPy broadcasts; a boolean mask stands for ones and zeros.
    """

    values: Array

    def mv(self, v: Array) -> Array:
        return self.values * v

    def _target(self, like: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(like.shape), ()


@dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """R = a matrix per layer on the last axis of the state, shape (L, d, d), or (L, ..., d, d) with one per entry.

    Linear recurrences, and the exact parallel backward (BPPSA, DEER) when the whole Jacobian is in R.
    """

    matrix: Array

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        return Dense(self.matrix.swapaxes(-1, -2))

    def mv(self, v: Array) -> Array:
        return (self.matrix @ v[..., None])[..., 0]

    def _target(self, like: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*like.shape, *like.shape[-1:]), (-1, -2)


@dataclass(frozen=True, eq=False)
class Pair(LinearOperator):
    """R = left right^T on states that are pairs of arrays, shape (L, ..., 2, H): rank one for each unit.

    The LSTM's path c[t-1] -> c[t] -> h[t] on the state (c, h) is ``left = (f, o (1 - tanh^2 c) f)``,
    ``right = (1, 0)``: the matrix ``[[f, 0], [o (1 - tanh^2 c) f, 0]]``. Rank one is kept by ``@`` and ``.T``,
    and a scan of such maps is a scan of one diagonal (`hbp.core.scan.propagate_pair`).
    """

    left: Array
    right: Array

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        return Pair(self.right, self.left)

    def mv(self, v: Array) -> Array:
        return self.left * (self.right * v).sum(-2)[..., None, :]

    def _target(self, like: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if like.ndim < 2 or like.shape[-2] != 2:
            raise ValueError(f"a Pair acts on states of shape (..., 2, H), these have shape {tuple(like.shape)}")
        return tuple(like.shape), (-2,)


def compose(a: LinearOperator, b: LinearOperator) -> LinearOperator | None:
    """The maps ``v -> a(b(v))``: all of the algebra, kind by kind; None for kinds that do not compose."""
    match a, b:
        case (Zero(), _) | (_, Zero()):
            return Zero()
        case (Identity(), other) | (other, Identity()):
            return other
        case (Scalar(value), other) | (other, Scalar(value)):
            return other.scaled(value)
        case Diagonal(p), Diagonal(q):
            return Diagonal(p * q)
        case Diagonal(p), Dense(q):
            return Dense(p[..., None] * q)
        case Dense(p), Diagonal(q):
            return Dense(p * q[..., None, :])
        case Dense(p), Dense(q):
            return Dense(p @ q)
        case Pair(left, p), Pair(q, right):
            return Pair(left * (p * q).sum(-2)[..., None, :], right)
    return None


def zero(like: Array, backend: Backend) -> Array:
    """A 0-d zero with the dtype and device of the states ``like``."""
    return backend.zeros_like(like.reshape(-1)[:1].sum())


def lift(factor: Any, ndim: int) -> Any:
    """An (L,) array as (L, 1, ..., 1) with ``ndim`` axes; a number as it is."""
    return factor.reshape(tuple(factor.shape) + (1,) * (ndim - factor.ndim)) if hasattr(factor, "shape") else factor
