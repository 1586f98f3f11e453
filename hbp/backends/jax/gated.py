"""Scans of a user's own gated cell, ``h' = gate * h + update``, for `jax.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends.jax import following
from hbp.backends.jax.chains import Tree, highway_states, in_turn, of_each, settled, varying
from hbp.backends.jax.checks import check_function, check_stacked, check_state, closed, static_solver
from hbp.core.backend import Array
from hbp.core.operator import Diagonal
from hbp.core.solver import Solver
from hbp.directions import Rank


def scan(
    cell: Callable[[Tree, Array, Tree], tuple[Array, Array]],
    params: Tree,
    h0: Array,
    xs: Tree,
    *,
    iterations: int | None = ...,  # type: ignore[assignment]
    chunk: int = 1,
    tolerance: float | None = None,
    solver: Solver | None = None,
    rank: Rank = 0,
    weight: following.Weight | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Run ``h = gate * h + update`` with ``gate, update = cell(params, h, xs[t])``; pull back by Highway-BP.

    The residual path is diag(gate), the block whatever h does by way of gate and update. A cell whose gate and update
    do not read h is exact at k = 0.
    Random numbers, forward mode and second derivatives are as in `sequential`.

    Args:
        cell: a function; what it closes over may need gradients.
        params: a pytree.
        h0: the first state.
        xs: a pytree of arrays with the steps on axis 0.
        iterations: Highway-BP's k, a Python int; None is the plain program.
        chunk: steps per stage, inside which backprop is exact.
        tolerance: stop when the last increment is at most this fraction of the gradient; ``iterations`` is the cap.
        solver: these three in one `hbp.Solver`, instead.
        rank: how many strong directions of ``weight`` the residual path takes beside diag(gate), as for `gru`. What the
            block does along them costs as many pullbacks through all steps at each backward.
        weight: a function of ``params`` that gives the matrix which h enters by, (N, H):
            ``lambda params: params["hidden"].T`` where the cell computes ``h @ params["hidden"]``.
        reverse: from the last step to the first, as in `jax.lax.scan`.

    Returns:
        ``(h_T, h)`` as `jax.lax.scan` does: the final state, and the states after each step.

    >>> cell = lambda w, h, x: (jax.nn.sigmoid(x), jnp.tanh(x + h @ w))
    >>> last, h = scan(cell, jnp.ones((3, 3)), jnp.zeros(3), jnp.ones((5, 3)), iterations=1)
    >>> h.shape, bool((last == h[-1]).all())
    ((5, 3), True)
    """
    how = static_solver(solver, iterations, chunk, tolerance)
    check_function("cell", cell, "(params, h, x) -> (gate, update)")
    h0, length = jnp.asarray(h0), check_stacked("xs", xs, "steps")
    check_state("h0", h0)
    if not length:
        return h0, jnp.zeros((0, *h0.shape), h0.dtype)
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    h0, found = settled(lambda h: cell(params, h, first), h0)
    _check_cell(found, h0)
    if reverse:
        xs = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), xs)
    strong = following.source(rank, weight, params, h0)
    own, captured = closed(cell, params, h0, first)
    given = params, captured, strong

    def layer(given: tuple[Tree, ...], row: Tree, h: Array) -> Array:
        gate, update = own(given[0], h, row, given[1])
        return varying(gate * h + update, h)

    def maps(given: tuple[Tree, ...], row: Tree, h: Array, _: Array) -> Diagonal:
        return Diagonal(own(given[0], h, row, given[1])[0])

    if how.exact:
        h = in_turn(layer, given, xs, h0)[1]
    elif strong is None:
        h = highway_states(layer, of_each(maps), given, xs, h0, solver=how)
    else:
        h = highway_states(layer, following.maps(own, rank), given, xs, h0, solver=how, run=following.run(rank))
    return h[-1], jnp.flip(h, 0) if reverse else h


def _check_cell(found: Any, h: Array) -> None:
    if not isinstance(found, tuple) or len(found) != 2 or not all(hasattr(part, "shape") for part in found):
        raise TypeError(f"the cell returns a {type(found).__name__}; expected two arrays, (gate, update)")
    for name, part in zip(("gate", "update"), found, strict=True):
        if part.shape != jnp.shape(h) or part.dtype != jnp.result_type(h):
            raise ValueError(
                f"the cell's {name} is {part.dtype} of shape {part.shape}; the state is {jnp.result_type(h)} of shape "
                f"{jnp.shape(h)}"
            )
