"""JAX's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends._array import ArrayBackend
from hbp.backends._kernels import CUDA_JAX
from hbp.core.backend import Array, Pullback
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero
from hbp.core.scan import hillis_steele


class JaxBackend(ArrayBackend):
    """JAX behind the protocol; the pullbacks are `jax.vjp`'s.

    Scans are `jax.lax.scan` on a CPU and Hillis-Steele's elsewhere. A chain whose pullbacks are a list of callables is
    unrolled, any other (the cells') compiled as a loop.
    """

    def __init__(self) -> None:
        super().__init__("jax", jnp)

    def device(self) -> str:
        device = jax.devices()[0]
        return "cpu" if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"

    def kernels(self) -> str:
        return CUDA_JAX.state() if jax.default_backend() == "gpu" else "XLA"

    def kernel(self, name: str, *arrays: Array) -> Callable[..., Any] | None:
        module = CUDA_JAX.load() if jax.default_backend() == "gpu" else None
        known = len({array.dtype for array in arrays}) == 1
        return getattr(module, name, None) if known else None

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        y, pullback = jax.vjp(fn, x)
        return y, lambda cotangent: pullback(cotangent)[0]

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        if jax.default_backend() != "cpu":
            return hillis_steele(operator, c, self)
        return _suffix_scan(operator, c)

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, rows: Array | int, reverse: bool = False) -> Any:
        def body(carry: Any, row: Array) -> tuple[Any, Any]:
            carry = step(carry, row)
            return carry, carry

        return jax.lax.scan(body, carry, jnp.arange(rows) if isinstance(rows, int) else rows, reverse=reverse)[1]

    def norm(self, x: Array) -> float:
        if isinstance(x, jax.core.Tracer):
            raise TypeError("the size of an increment is not known while JAX traces; give iterations, no tolerance")
        return super().norm(x)


@jax.jit
def _suffix_scan(operator: LinearOperator, c: Array) -> Array:
    """`hbp.core.scan.sequential` as one compiled loop."""

    def body(g: Array, layer: tuple[LinearOperator, Array]) -> tuple[Array, Array]:
        g = layer[0].mv(g) + layer[1]
        return g, g

    states = jax.lax.scan(body, c[-1], (operator, c[:-1]), reverse=True)[1]
    return jnp.concatenate([states, c[-1:]])


def _register(kind: type[LinearOperator]) -> None:
    """Make an operator a pytree: its arrays are leaves, a plain number is part of its structure."""

    def flatten(operator: LinearOperator) -> tuple[tuple[Array, ...], Any]:
        return operator.arrays, None if operator.arrays else tuple(vars(operator).values())

    def unflatten(numbers: Any, arrays: Any) -> LinearOperator:
        operator = object.__new__(kind)  # leaves may be placeholders, which no check would accept
        for name, value in zip(kind.__dataclass_fields__, arrays if numbers is None else numbers, strict=True):
            object.__setattr__(operator, name, value)
        return operator

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


for _kind in (Identity, Zero, Scalar, Diagonal, Dense, Pair):
    _register(_kind)
