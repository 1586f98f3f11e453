"""Stacks of layers with stacked parameters, for `jax.grad`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hbp.backends.jax.chains import BACKEND, Maps, Tree, highway_states, in_turn, of_each, settled, varying
from hbp.backends.jax.checks import check_function, check_like, check_stacked, check_state, closed, static_solver
from hbp.backends.jax.depth import DepthParallel, check_axis
from hbp.core.backend import Array
from hbp.core.operator import Identity, LinearOperator, Scalar, Zero
from hbp.core.solver import Solver

IDENTITY = Identity()


def sequential(
    layer: Callable[..., Tree],
    params: Tree,
    x: Tree,
    *shared: Tree,
    iterations: int | None = ...,  # type: ignore[assignment]
    residual: LinearOperator | Callable[[Tree, Array], LinearOperator] = IDENTITY,
    chunk: int = 1,
    tolerance: float | None = None,
    solver: Solver | None = None,
    axis_name: Any = None,
) -> Tree:
    """Run ``x = layer(params[i], x, *shared)`` for all i; under `jax.grad` pull back by Highway-BP.

    The forward is one `jax.lax.scan`; what the layers compute is computed again in the backward, for all at once.
    Random numbers drawn inside are drawn again: by threefry keys, other generators are refused.

    With a finite k, forward mode (`jax.jvp`) is refused by JAX, and second derivatives (`jax.hessian`) are the
    derivatives of the truncated gradient, symmetric and those of the loss from k = L only.

    Args:
        layer: whole layers, skip included, that keep the shape and dtype of their state. What it closes over may
            need gradients. Inside `jax.shard_map` it may sum over mesh axes, as tensor-parallel layers do.
        params: a pytree of arrays stacked on axis 0; whatever differs from layer to layer belongs here.
        x: the first state, an array or a pytree of arrays of one dtype.
        shared: further arguments of each layer.
        iterations: Highway-BP's k, a Python int; None is the plain program, exact and differentiable in all modes.
        residual: the layers' residual maps, an operator or a function ``(params[i], x[i]) -> one map``. States that
            are pytrees take `Identity`, `Scalar` and `Zero`. It counts as constant.
        chunk: layers per stage, inside which backprop is exact.
        tolerance: stop when the last increment is at most this fraction of the gradient; ``iterations`` is the cap.
        solver: these three in one `hbp.Solver`, instead.
        axis_name: inside `jax.shard_map`, the mesh axis over which ``params`` are split; each device keeps its own
            layers and their states. Take gradients outside of the `shard_map`; inside, only with its ``check_vma``.
            The axis may cross processes (`jax.distributed`), which then run the same program with the same options,
            as JAX demands: with others they wait for one another and nothing says so, unless
            `jax.experimental.multihost_utils.assert_equal` compares the options before. A solver's ``watch`` is told
            in the process of the first device.

    Returns:
        The last state.

    Raises:
        TypeError, ValueError: at trace time, where an argument is not what it should be.

    >>> import jax.numpy as jnp
    >>> layer = lambda w, x: x + jnp.tanh(x @ w)
    >>> loss = lambda w: sequential(layer, w, jnp.ones(3), iterations=2).sum()
    >>> jax.grad(loss)(jnp.ones((8, 3, 3))).shape
    (8, 3, 3)
    """
    x = jax.tree.map(jnp.asarray, x)
    how = static_solver(solver, iterations, chunk, tolerance)
    length, single = _checked_length(layer, params, x, residual), hasattr(x, "shape")
    if axis_name is not None:
        check_axis(axis_name, params)
    if not length:
        return x
    first = jax.tree.map(lambda leaf: leaf[0], params)
    if axis_name is not None:
        x = jax.tree.map(lambda leaf: varying(leaf, jax.lax.axis_index(axis_name)), x)
    x, found = settled(lambda x: layer(first, x, *shared), x)
    check_like("the layer", found, x)
    flat, unravel = (x, lambda state: state) if single else ravel_pytree(x)

    def on_arrays(shared: Tree, row: Tree, state: Array) -> Array:
        found = layer(row, unravel(state), *shared)
        return varying(found if single else ravel_pytree(found)[0], state)

    depth = None if axis_name is None else DepthParallel(axis_name, plain=how.exact)
    run = in_turn if depth is None else depth.run
    if how.exact:
        states = run(on_arrays, shared, params, flat)[1]
        return unravel(states[-1] if depth is None else depth.last(states))
    own, captured = closed(on_arrays, shared, first, flat)
    given: tuple[Tree, ...] = (shared, captured)

    def pure(both: tuple[Tree, ...], row: Tree, state: Array) -> Array:
        return own(both[0], row, state, both[1])

    maps, held = _maps(residual, first, flat, length)
    given = (*given, jax.tree.map(jax.lax.stop_gradient, held))

    if depth is None:
        return unravel(highway_states(pure, maps, given, params, flat, solver=how)[-1])
    depth.check(length, how.chunk)
    return unravel(depth.last(highway_states(pure, maps, given, params, flat, solver=how, run=run, backend=depth)))


def _checked_length(layer: Any, params: Tree, x: Tree, residual: Any) -> int:
    """The number of layers, after checking what can be checked of the arguments as they are."""
    check_function("layer", layer, "(params[i], x) -> x")
    if not isinstance(residual, LinearOperator):
        check_function("residual", residual, "(params[i], x[i]) -> one map, or an operator, as hbp.Scalar(0.5)")
    length = check_stacked("params", params)
    if not jax.tree.leaves(x):
        raise ValueError("x holds no arrays; give the first state")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        check_state(f"x{jax.tree_util.keystr(path)}", leaf)
    if not hasattr(x, "shape") and not isinstance(residual, Identity | Scalar | Zero):
        raise TypeError("states that are pytrees take Identity(), Scalar(...) or Zero() as residual")
    return length


def _maps(residual: Any, row: Tree, state: Array, length: int) -> tuple[Maps, Tree]:
    """The residual maps from ``(..., the arrays they hold)``, rows and states, and those arrays."""
    if isinstance(residual, LinearOperator):
        residual.bind(length, state, BACKEND)  # checked before any work
        return lambda given, *_: given[-1], residual
    one, held = closed(partial(_checked_map, residual), row, state)
    return of_each(lambda given, row, state, _: one(row, state, given[-1])), held


def _checked_map(residual: Callable[[Tree, Array], LinearOperator], row: Tree, state: Array) -> LinearOperator:
    found: Any = residual(row, state)
    if not isinstance(found, LinearOperator):
        raise TypeError(f"residual returned a {type(found).__name__}; return one of hbp's operators")
    return found
