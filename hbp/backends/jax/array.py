"""JAX's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hbp.backends._array import ArrayBackend
from hbp.backends._kernels import CUDA_JAX
from hbp.core.backend import Array, Gauge, Pullback
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero
from hbp.core.scan import hillis_steele
from hbp.directions import Directions
from hbp.lowrank import LowRank

UNROLLED = 8
"""Rounds up to which a compiled iteration is written out; from there on it is a loop, which compiles in one piece."""


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

    def kernel_state(self) -> str:
        return CUDA_JAX.state() if jax.default_backend() == "gpu" else "XLA"

    def kernel(self, name: str, *arrays: Array) -> Callable[..., Any] | None:
        module = CUDA_JAX.load() if jax.default_backend() == "gpu" else None
        if module is None or len({array.dtype for array in arrays}) > 1:
            return None
        return CUDA_JAX.find(name, lambda: module.place(arrays[0]))

    def constant(self, x: Array) -> Array:
        return lax.stop_gradient(x)

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        y, pullback = jax.vjp(fn, x)
        return y, lambda cotangent: pullback(cotangent)[0]

    def suffix_sum(self, c: Array) -> Array:
        if jax.default_backend() != "cpu":
            return super().suffix_sum(c)
        return _suffix_scan(Identity(), c)  # on a CPU ten times as fast as XLA's cumulative sum

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        if jax.default_backend() != "cpu":
            return hillis_steele(operator, c, self)
        return _suffix_scan(operator, c)

    def sequential(self, operator: LinearOperator, c: Array) -> Array:
        return _suffix_scan(operator, c) if isinstance(operator, LowRank) else super().sequential(operator, c)

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, rows: Array | int, reverse: bool = False) -> Any:
        def body(carry: Any, row: Array) -> tuple[Any, Any]:
            carry = step(carry, row)
            return carry, carry

        return lax.scan(body, carry, jnp.arange(rows) if isinstance(rows, int) else rows, reverse=reverse)[1]

    def repeat(self, step: Callable[[Any], Any], state: Any, most: int, gauge: Gauge | None = None) -> Any:
        if not isinstance(jax.tree.leaves(state)[0], jax.core.Tracer) or (gauge is None and most <= UNROLLED):
            return super().repeat(step, state, most, gauge)
        if gauge is None:  # the first time apart: from then on states keep their types
            return lax.fori_loop(1, most, lambda _, state: step(state), step(state))
        first = jnp.stack(gauge.measure(state))
        axes = self.measured(jax.tree.leaves(state)[0])
        if gauge.settled((first[0], first[1])) is not False and (unknown := _uncounted() - axes):
            raise ValueError(
                f"a tolerance inside jax.shard_map needs its check_vma=True, to stop on all of {unknown} at once"
            )
        sizes = jnp.concatenate([first[None], jnp.full((most, 2), jnp.nan, first.dtype) * first])
        count = 0

        def unsettled(carry: tuple[Array, Any, Array]) -> Array:
            count, _, sizes = carry
            return (count < most) & jnp.logical_not(gauge.settled((sizes[count, 0], sizes[count, 1])))

        def body(carry: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
            count, state, sizes = carry
            state = step(state)
            return count + 1, state, sizes.at[count + 1].set(jnp.stack(gauge.measure(state)))

        if most:
            count, state, sizes = lax.while_loop(unsettled, body, (0, state, sizes))
        _tell_once(gauge, sizes, count, axes)
        return state

    def measured(self, x: Array) -> set[Any]:
        """The mesh axes over all of which `norm` measures such states."""
        return mesh_axes(x)

    def here(self, g: Array) -> Array:
        """What of the cotangents of a chain's states is this device's."""
        return g

    def norm(self, x: Array) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return super().norm(x)
        wide, axes = self.widened(x).reshape(-1), in_mesh_order(self.measured(x))
        largest = jnp.max(jnp.abs(wide), initial=0)
        largest = lax.pmax(largest, axes) if axes else largest
        squares = jnp.sum((wide / jnp.where(largest == 0, 1, largest)) ** 2)
        return largest * jnp.sqrt(lax.psum(squares, axes) if axes else squares)


def mesh_axes(x: Array) -> set[Any]:
    """The mesh axes over which an array varies, as far as JAX keeps account of them."""
    kind: Any = jax.typeof(x) if hasattr(jax, "typeof") else None
    return set(kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ()))


def in_mesh_order(axes: set[Any]) -> tuple[Any, ...]:
    """Mesh axes in the order of the mesh: a set's differs from process to process, which would then wait in vain."""
    return tuple(sorted(axes, key=jax.sharding.get_abstract_mesh().axis_names.index))


def _uncounted() -> set[Any]:
    """The mesh axes of a `jax.shard_map` here that keeps no account of what varies over them."""
    found = set()
    for name in jax.sharding.get_abstract_mesh().axis_names:
        try:
            counted = mesh_axes(lax.axis_index(name))
        except NameError:  # a mesh without shard_map
            continue
        if not counted:
            found.add(name)
    return found


def _tell_once(gauge: Gauge, sizes: Array, count: Any, axes: set[Any]) -> None:
    """Tell the gauge of the sizes of states 0 to ``count``, when the program runs, on the first device of some axes."""

    def arrived(sizes: Array, count: Array) -> None:
        # Lists, since a callback that computes by JAX may wait for the program that waits for it.
        gauge.told([(increment, solution) for increment, solution in sizes.tolist()[: int(count) + 1]])

    def tell() -> None:
        jax.debug.callback(arrived, sizes, count)

    if axes:
        lax.cond(lax.axis_index(in_mesh_order(axes)) == 0, tell, lambda: None)
    else:
        tell()


@jax.jit
def _suffix_scan(operator: LinearOperator, c: Array) -> Array:
    """`hbp.core.scan.sequential` as one compiled loop."""
    rows = jnp.arange(len(c) - 1) if isinstance(operator, LowRank) else operator  # whose factors layers may share

    def body(g: Array, layer: tuple[Any, Array]) -> tuple[Array, Array]:
        one = operator[layer[0]] if isinstance(operator, LowRank) else layer[0]
        g = one.mv(g) + layer[1]
        return g, g

    states = lax.scan(body, c[-1], (rows, c[:-1]), reverse=True)[1]
    return jnp.concatenate([states, c[-1:]])


def _register(kind: type[LinearOperator]) -> None:
    """Make an operator a pytree: its arrays are leaves, a plain number is part of its structure."""

    def flatten(operator: LinearOperator) -> tuple[tuple[Any, ...], Any]:
        values = tuple(vars(operator).values())
        return (values, None) if operator.arrays else ((), values)

    def unflatten(numbers: Any, arrays: Any) -> LinearOperator:
        operator = object.__new__(kind)  # leaves may be placeholders, which no check would accept
        for name, value in zip(kind.__dataclass_fields__, arrays if numbers is None else numbers, strict=True):
            object.__setattr__(operator, name, value)
        return operator

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


jax.tree_util.register_dataclass(Directions, ["left", "right"], ["rank"])
for _kind in (Identity, Zero, Scalar, Diagonal, Dense, Pair, LowRank):
    _register(_kind)
