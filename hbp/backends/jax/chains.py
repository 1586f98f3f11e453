"""Chains of layers as differentiable functions: a forward scan, and Highway-BP as its reverse rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from hbp.backends.jax.array import JaxBackend, in_mesh_order, mesh_axes
from hbp.backends.jax.checks import check_draws, check_maps_vary
from hbp.core.adjoint import highway
from hbp.core.backend import Array, Backend, dtype_name
from hbp.core.chain import Composed, LayerChain
from hbp.core.operator import LinearOperator
from hbp.core.pullbacks import Pullbacks
from hbp.core.solver import Solver

Tree: TypeAlias = Any
Layer: TypeAlias = Callable[[Tree, Tree, Array], Array]
"""``layer(shared, row, state) -> state`` with what all layers share and what each has of its own."""
Maps: TypeAlias = Callable[[Tree, Tree, Array, Array], LinearOperator]
"""``maps(shared, rows, before, after)`` -> the residual maps of all layers."""
Run: TypeAlias = Callable[[Layer, Tree, Tree, Array], tuple[Array, Array]]
"""``run(layer, shared, rows, x)`` -> the first state, and the states after each layer, (L, ...)."""

Found = TypeVar("Found")

BACKEND = JaxBackend()


def in_turn(layer: Layer, shared: Tree, rows: Tree, x: Array) -> tuple[Array, Array]:
    """The first state and those after each layer: the plain program, whose reverse rule is JAX's own."""

    def body(state: Array, row: Tree) -> tuple[Array, Array]:
        state = layer(shared, row, state)
        return state, state

    return x, lax.scan(body, x, rows)[1]


def highway_states(
    layer: Layer,
    maps: Maps,
    shared: Tree,
    rows: Tree,
    x: Array,
    *,
    solver: Solver,
    run: Run = in_turn,
    backend: JaxBackend = BACKEND,
) -> Array:
    """The states after each layer, with Highway-BP for their reverse rule.

    Args:
        layer: one layer, with no arrays closed over.
        maps: gives the residual maps of the L layers.
        shared, rows: what all layers share, and what each has of its own, with a leading axis of L.
        x: the first state.
        solver: how the adjoint equation of the stages is solved.
        run: how the layers are run.
        backend: whose scan goes along the stages.
    """
    leaves, tree = jax.tree.flatten((shared, rows))
    inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def joined(real: list[Array], fixed: list[Array]) -> tuple[Tree, Tree]:
        reals, others = iter(real), iter(fixed)
        both: tuple[Tree, Tree] = jax.tree.unflatten(tree, [next(reals if own else others) for own in inexact])
        return both

    @jax.custom_vjp
    def states(real: list[Array], fixed: list[Array], x: Array) -> Array:
        return run(layer, *joined(real, fixed), x)[1]

    def forward(real: list[Array], fixed: list[Array], x: Array) -> tuple[Array, Any]:
        start, y = run(layer, *joined(real, fixed), x)
        return y, (real, fixed, x, start, y)

    def backward(saved: Any, dy: Array) -> tuple[list[Array], None, Array]:
        real, fixed, x, start, y = saved
        before, length = jnp.concatenate([start[None], y[:-1]]), len(y)
        size = min(solver.chunk, length)
        residual = maps(*joined(real, fixed), before, y)
        check_maps_vary(set().union(*map(mesh_axes, residual.arrays)), mesh_axes(y))
        residual = Composed(residual, length, size, size).bind(-(-length // size), start, BACKEND)

        def stages(real: list[Array], starts: Array) -> Array:
            shared, rows = joined(real, fixed)
            return jax.vmap(partial(_stage, layer, shared, before[-1]))(_cut(rows, length, size), starts)

        starts = before[::size]
        own = _at_ends(dy, size)  # what enters at the states from outside, (stages, size, ...)
        check_draws(jax.make_jaxpr(lambda *at: jax.vjp(stages, *at)[1](own))(real, starts))
        pull = jax.vjp(partial(stages, real), starts)[1]
        entering = jnp.concatenate([jnp.zeros_like(own[:1, -1]), own[:-1, -1]])
        if size > 1:
            entering = entering + pull(own.at[:, -1].set(0))[0]
        chain = LayerChain(StagePullbacks(pull, len(starts), size), residual, (tuple(start.shape), dtype_name(start)))
        g = highway(chain, own[-1, -1], sources=entering, solver=replace(solver, chunk=1), backend=backend)
        g = backend.here(g)
        (dreal,) = jax.vjp(lambda real: stages(real, starts), real)[1](own.at[:, -1].set(g[1:]))
        return jax.tree.map(as_varying_as, real, dreal), None, as_varying_as(x, g[0])

    states.defvjp(forward, backward)
    real = [leaf for leaf, own in zip(leaves, inexact, strict=True) if own]
    return states(real, [leaf for leaf, own in zip(leaves, inexact, strict=True) if not own], x)


@dataclass(frozen=True, eq=False)
class StagePullbacks(Pullbacks):
    """The pullbacks of all stages at once, of cotangents of their ends, as core's `Pullbacks`."""

    pull: Callable[[Array], tuple[Array]]
    """Of the cotangents of all states, (stages, size, ...)."""
    count: int
    size: int
    selected: range | None = None
    traceable = True

    def __len__(self) -> int:
        return self.count if self.selected is None else len(self.selected)

    def __getitem__(self, index: slice) -> StagePullbacks:
        return replace(self, selected=(self.selected or range(self.count))[index])

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        if self.selected is None and self.size == 1:
            return self.pull(cotangents[:, None])[0]
        rows = jnp.arange(self.count) if self.selected is None else jnp.array(self.selected)
        zeros = jnp.zeros((self.count, self.size, *cotangents.shape[1:]), cotangents.dtype)
        return self.pull(zeros.at[rows, -1].set(cotangents))[0][rows]

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        zeros = jnp.zeros((self.count, self.size, *cotangent.shape), cotangent.dtype)
        return self.pull(zeros.at[i, -1].set(cotangent))[0][i]


def of_each(one: Callable[[Tree, Tree, Array, Array], Found]) -> Callable[[Tree, Tree, Array, Array], Found]:
    """The residual maps of all layers, or what makes them up, from a function that gives that of one."""
    every = jax.vmap(one, (None, 0, 0, 0))

    def all_of(*given: Any) -> Found:
        check_draws(jax.make_jaxpr(every)(*given))
        return every(*given)  # type: ignore[no-any-return]

    return all_of


def _stage(layer: Layer, shared: Tree, safe: Array, rows: tuple[Tree, Array | None], start: Array) -> Array:
    """The states inside one stage, (size, ...); behind the chain's end its last state stays.

    What fills the last stage up is the last layer on ``safe``, its own input, so that no derivative is lost there.
    """
    own, there = rows
    if there is None:
        return in_turn(layer, shared, own, start)[1]

    def body(shared: Tree, row: tuple[Tree, Array], state: Array) -> Array:
        return jnp.where(row[1], layer(shared, row[0], jnp.where(row[1], state, safe)), state)

    return in_turn(body, shared, rows, start)[1]


def _cut(rows: Tree, length: int, size: int) -> tuple[Tree, Array | None]:
    """Rows in stages, (stages, size, ...); the last is filled up, and then says which of its rows are there."""
    missing, count = -length % size, -(-length // size)

    def cut(leaf: Array) -> Array:
        if missing:
            leaf = jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])
        return leaf.reshape(count, size, *leaf.shape[1:])

    return jax.tree.map(cut, rows), (jnp.arange(count * size) < length).reshape(count, size) if missing else None


def _at_ends(dy: Array, size: int) -> Array:
    """Cotangents of all states in stages, the chain's last state at the end of its stage."""
    missing = -len(dy) % size
    filled = jnp.concatenate([dy[:-1], jnp.zeros((missing, *dy.shape[1:]), dy.dtype), dy[-1:]])
    return filled.reshape(len(filled) // size, size, *dy.shape[1:])


def as_varying_as(primal: Array, cotangent: Array) -> Array:
    """A cotangent, summed over those mesh axes of a `jax.shard_map` over which only it varies."""
    axes = in_mesh_order(mesh_axes(cotangent) - mesh_axes(primal))
    return lax.psum(cotangent, axes) if axes else cotangent


def settled(run: Callable[[Tree], Tree], state: Tree) -> tuple[Tree, Tree]:
    """A first state, counted as varying over all mesh axes over which those that ``run`` makes of it vary; their shape.

    What ``run`` sums over an axis inside itself, as tensor-parallel layers do, does not vary over it.
    """
    found = jax.eval_shape(run, state)
    wider = jax.tree.map(lambda leaf: varying(leaf, state, found), state)
    same = all(a is b for a, b in zip(jax.tree.leaves(wider), jax.tree.leaves(state), strict=True))
    return (state, found) if same else settled(run, wider)


def varying(x: Array, *like: Tree) -> Array:
    """An array, counted as varying over all mesh axes of a `jax.shard_map` over which anything in some trees does."""
    axes = in_mesh_order(set().union(*map(mesh_axes, jax.tree.leaves(like))) - mesh_axes(x))
    if not axes:
        return x
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)
