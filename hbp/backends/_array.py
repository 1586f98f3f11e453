"""What the four libraries share: their NumPy-like namespaces do nearly all of a backend's work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from hbp.core.backend import Array, Gauge, Pullback, dtype_name
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero
from hbp.core.scan import hillis_steele, loop, propagate_pair, sequential
from hbp.lowrank import LowRank

HALF = ("float16", "bfloat16")
PATHS = (Identity, Scalar, Diagonal, Pair, Zero)
"""Kinds beside which directions have kernels."""


class ArrayBackend:
    """A backend over a NumPy-like namespace, with the sequential scan.

    Subclasses replace what their library does faster or differently; the contracts are those of
    `hbp.core.backend.Backend`.
    """

    def __init__(self, name: str, xp: Any) -> None:
        self.name = name
        self.xp = xp

    def device(self) -> str:
        return "cpu"

    def kernel_state(self) -> str:
        return "plain"

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        return self.xp.concatenate(tuple(arrays), axis)

    def stack(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        return self.xp.stack(tuple(arrays), axis)

    def zeros_like(self, x: Array) -> Array:
        return self.xp.zeros_like(x)

    def cast(self, x: Array, like: Array) -> Array:
        """``x`` in the dtype of ``like``."""
        return x.astype(like.dtype)

    def widened(self, x: Array) -> Array:
        """A half-precision array as float32, for sums of many terms; others as they are."""
        return x.astype(self.xp.float32) if dtype_name(x) in HALF else x

    def constant(self, x: Array) -> Array:
        """``x`` as what the library's derivatives do not see."""
        return x

    def map(self, pullbacks: Sequence[Pullback], cotangents: Sequence[Array]) -> list[Array]:
        return [pullback(g) for pullback, g in zip(pullbacks, cotangents, strict=True)]

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        raise NotImplementedError(
            f"{self.name} has no automatic differentiation; write the block as a function x -> (y, pullback)"
        )

    def propagate(self, operator: LinearOperator, c: Array) -> Array:
        if isinstance(operator, Zero) or len(c) == 1:
            return c
        if isinstance(operator, Identity | Scalar | Diagonal):
            scan = self.kernel("suffix_scan", c, *operator.arrays)
            if scan is not None:
                return scan(operator, c)
        if isinstance(operator, LowRank) and isinstance(operator.path, PATHS):
            scan = self.kernel("low_rank_scan", c, *operator.arrays)
            if scan is not None:
                return scan(operator, c)
        if dtype_name(c) in HALF:  # the scan adds L terms: once rounded, not L times
            return self.cast(self.propagate(operator.mapped(self.widened), self.widened(c)), c)
        if isinstance(operator, Identity):
            return self.suffix_sum(c)
        if isinstance(operator, Pair):
            return propagate_pair(operator, c, self)
        if not isinstance(operator, Scalar | Diagonal | Dense):  # a `LowRank`, or a user's own kind
            return self.sequential(operator, c)
        return self.suffix_scan(operator, c)

    def sequential(self, operator: LinearOperator, c: Array) -> Array:
        """The solution for kinds whose products cost more than their maps, one map after another."""
        return sequential(operator, c, self)

    def suffix_sum(self, c: Array) -> Array:
        """The solution for `Identity`: ``g[i] = c[i] + c[i+1] + ... + c[L]``."""
        return self.xp.flip(self.xp.cumsum(self.xp.flip(c, (0,)), 0), (0,))

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        """The solution for `Scalar`, `Diagonal` and `Dense` in a dtype that needs no widening."""
        return sequential(operator, c, self)

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, rows: Array | int, reverse: bool = False) -> Any:
        return loop(step, carry, rows, reverse, backend=self)

    def repeat(self, step: Callable[[Any], Any], state: Any, most: int, gauge: Gauge | None = None) -> Any:
        if gauge is None:
            for _ in range(most):
                state = step(state)
            return state
        sizes = [gauge.measure(state)]
        while len(sizes) <= most and not gauge.settled(sizes[-1]):
            state = step(state)
            sizes.append(gauge.measure(state))
        gauge.told(sizes)
        return state

    def total(self, length: int) -> int:
        return length

    def kernel(self, name: str, *arrays: Array) -> Callable[..., Any] | None:
        return None

    def add_product(self, sums: Array, rows: Array, weight: Array) -> None:
        """``sums += rows @ weight``, in place."""
        sums += rows @ weight

    def norm(self, x: Array) -> float:
        wide = self.widened(x).reshape(-1)
        largest = float(abs(wide).max()) if len(wide) else 0.0
        if not largest or not math.isfinite(largest):
            return largest
        return largest * float(self.xp.linalg.norm(wide / largest))  # squares might overflow or vanish


class NumpyLike(ArrayBackend):
    """NumPy and CuPy: arrays that are written in place.

    On a CPU the suffix scan is one in-place sequential loop; on a GPU, where each operation costs a launch, it is
    Hillis-Steele's.
    """

    def __init__(self, name: str, xp: Any, parallel: bool = False) -> None:
        super().__init__(name, xp)
        self._parallel = parallel

    def suffix_sum(self, c: Array) -> Array:
        g = self.xp.empty_like(c)
        self.xp.cumsum(c[::-1], axis=0, out=g[::-1])
        return g

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        if self._parallel:
            return hillis_steele(operator, c, self)
        g = c.copy()
        if isinstance(operator, Dense):
            for i in range(len(c) - 2, -1, -1):
                g[i] += operator[i].mv(g[i + 1])
            return g
        states = list(g.reshape((len(c), -1) if c.ndim == 1 else c.shape))  # views: rows that can be written
        values = list(operator.arrays[0]) if operator.arrays else [cast(Scalar, operator).value] * (len(c) - 1)
        carried = self.xp.empty_like(states[-1])
        for i in range(len(c) - 2, -1, -1):
            self.xp.multiply(values[i], states[i + 1], out=carried)
            self.xp.add(states[i], carried, out=states[i])
        return g
