"""Layers spread over devices: the mesh axis of a `jax.shard_map` as the depth of a stack."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hbp.backends._depth import scan_over_ranks
from hbp.backends.jax.array import JaxBackend, mesh_axes
from hbp.backends.jax.chains import Layer, Tree, in_turn, varying
from hbp.core.backend import Array
from hbp.core.chain import Composed
from hbp.core.operator import LinearOperator

LOCAL = JaxBackend()
"""What each device does alone."""


def check_axis(axis: Any, params: Tree) -> None:
    """Check that an axis, or several, are of a mesh, and that the layers' parameters are split over them.

    Raises:
        ValueError: they are not, as far as JAX keeps account of it.
    """
    names = axis if isinstance(axis, tuple) else (axis,)
    mesh = jax.sharding.get_abstract_mesh().axis_names
    if not set(names) <= set(mesh):
        raise ValueError(
            f"axis_name={axis!r} names no mesh axis here (known: {', '.join(map(str, mesh)) or 'none'}); call inside "
            "jax.shard_map with an axis of its mesh: jax.vmap's axes are no devices"
        )
    counted = mesh_axes(lax.axis_index(names))  # none under check_vma=False
    split: set[Any] = set().union(*map(mesh_axes, jax.tree.leaves(params)))
    if not set(names) & counted <= split:
        raise ValueError(
            f"params are the same on all devices along axis_name={axis!r}, so each would run all layers again; split "
            f"them on axis 0, in_specs=P({axis!r})"
        )


class DepthParallel(JaxBackend):
    """JAX where each device of a mesh axis holds consecutive layers of a stack, in the order of the axis.

    Its suffix scan crosses the devices. Parameters and states stay where they are; what travels is the state of the
    forward pass from device to device, and per scan one state and one residual map of each device.
    """

    def __init__(self, axis: Any, plain: bool) -> None:
        super().__init__()
        self.axis = axis
        # Where JAX differentiates the run, gradients of what devices share are summed over them inside the layers,
        # by all devices: then none may rest. Those not in turn compute what is dropped, on their own true first
        # states, found before without gradients: other states might have no derivative.
        self.plain = plain
        self.devices: int = lax.psum(1, axis)

    def check(self, length: int, chunk: int) -> None:
        """Check that no stage crosses devices."""
        if length % chunk:
            raise ValueError(f"chunk={chunk} does not divide the {length} layers of each device")

    def run(self, layer: Layer, shared: Tree, rows: Tree, x: Array) -> tuple[Array, Array]:
        """The first state of this device's layers and those after each of them; devices work in turn."""
        here = lax.axis_index(self.axis)

        def at_work(state: Array) -> tuple[Array, Array]:
            return in_turn(layer, shared, rows, state)

        def at_rest(state: Array) -> tuple[Array, Array]:
            length = len(jax.tree.leaves(rows)[0])
            zero = varying(jnp.zeros(state.shape, state.dtype), state)
            return zero, jnp.broadcast_to(zero, (length, *state.shape))

        def turn(number: Array, carry: tuple[Array, Array, Array], safe: Array | None = None) -> Any:
            arriving, first, after = carry
            if safe is None:
                found = lax.cond(here == number, at_work, at_rest, arriving)
            else:
                found = at_work(jnp.where(here == number, arriving, safe))
                found = tuple(jnp.where(here == number, states, 0) for states in found)
            arriving = lax.ppermute(found[1][-1], self.axis, [(i, i + 1) for i in range(self.devices - 1)])
            return arriving, first + found[0], after + found[1]

        _, first, after = lax.fori_loop(0, self.devices, turn, (x, *at_rest(x)))
        if self.plain:
            safe = lax.stop_gradient(first)
            _, first, after = lax.fori_loop(0, self.devices, partial(turn, safe=safe), (x, *at_rest(x)))
        return first, after

    def last(self, states: Array) -> Array:
        """The stack's last state on all devices, from each device's states."""
        here = lax.axis_index(self.axis)
        return lax.psum(jnp.where(here == self.devices - 1, states[-1], 0), self.axis)

    def total(self, length: int) -> int:
        return self.devices * length

    def measured(self, x: Array) -> set[Any]:
        return super().measured(x) | set(self.axis if isinstance(self.axis, tuple) else (self.axis,))

    def norm(self, x: Array) -> Array:
        """The norm over all devices' states; a device's last state is the next one's first."""
        last = lax.axis_index(self.axis) == self.devices - 1
        return super().norm(jnp.concatenate([x[:-1], jnp.where(last, x[-1:], 0)]))

    def here(self, g: Array) -> Array:
        """Cotangents of this device's states; the first state's is the first device's alone."""
        return g.at[0].multiply(lax.axis_index(self.axis) == 0)

    def propagate(self, operator: LinearOperator, c: Array) -> Array:
        """The suffix scan over all devices' layers, of which ``operator`` and ``c`` are this device's.

        A device's last state is the next one's first, and ``c[-1]`` enters there: nonzero on the last device only.
        """
        if len(c) == 1:
            return LOCAL.propagate(operator, c)
        length = len(c) - 1
        product = Composed(operator.T, length, length, length).bind(1, c[0], LOCAL).T

        def entering(start: Array) -> Array:
            starts, maps = jax.tree.map(lambda leaf: lax.all_gather(leaf, self.axis), (start, product))
            here, found = lax.axis_index(self.axis), jnp.zeros_like(start)
            for device in range(self.devices - 1, 0, -1):
                found = jnp.where(device > here, starts[device] + maps[device][0].mv(found), found)
            return found

        return scan_over_ranks(LOCAL.propagate, operator, c, entering, LOCAL)
