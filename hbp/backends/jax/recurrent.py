"""The GRU and the LSTM for `jax.grad`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hbp import cells
from hbp.backends.jax import following
from hbp.backends.jax.chains import BACKEND, as_varying_as, varying
from hbp.backends.jax.checks import check_static, static_solver
from hbp.cells._common import check_cell
from hbp.core.backend import Array
from hbp.core.solver import Solver
from hbp.directions import Directions, Rank, check_directions


def gru(
    params: cells.GRUParameters,
    xs: Array,
    h0: Array,
    *,
    iterations: int | None = ...,  # type: ignore[assignment]
    chunk: int = 1,
    tolerance: float | None = None,
    solver: Solver | None = None,
    rank: Rank = 0,
) -> tuple[Array, Array]:
    """A GRU over (T, B, I) from (B, H), in PyTorch's parameter layout: ``(h_T, h)``, pulled back by Highway-BP.

    Arguments, forward mode and second derivatives as for `hbp.backends.jax.scan`.

    ``rank`` is how many strong directions of the recurrent weights the residual path takes beside the gate's diagonal:
    a number, found by a singular value decomposition of the weights as they are in each backward pass, about 10 N H^2
    operations; or directions given (`hbp.directions`), which a training step follows by a step of subspace iteration:

        found = hbp.directions(params.weight_hh, 8)

        @jax.jit
        def step(params, found, batch):
            found = hbp.directions(params.weight_hh, 8, start=found)
            gradient = jax.grad(lambda params: loss(params, batch, rank=found))(params)
            return update(params, gradient), found

    "auto" needs the weights' numbers and is refused inside `jax.jit`; its directions, found outside, are taken there
    (one compilation per number of them). They count as constants, whose rows second derivatives do not see.

    >>> params = cells.GRUParameters(jnp.ones((9, 2)), jnp.ones((9, 3)))
    >>> loss = lambda params: gru(params, jnp.ones((5, 1, 2)), jnp.zeros((1, 3)), iterations=2)[0].sum()
    >>> jax.grad(loss)(params).weight_hh.shape
    (9, 3)
    """
    how = static_solver(solver, iterations, chunk, tolerance)
    check_cell(3, params, xs, {"h0": h0}, BACKEND)
    _check_rank(rank, params)
    h0 = varying(h0, params, xs, following.given(rank))
    if how.exact:
        h = _gru_states(params, xs, h0)
        return h[-1], h

    def pull(given: Any, h: Array, dh: Array, rank: Rank) -> Any:
        params, xs, h0 = given
        return cells.GRUPullback(params, xs, h0, h, BACKEND)(dh, solver=how, rank=rank)

    h = _with_adjoint(_gru_states, pull, rank)(params, xs, h0)
    return h[-1], h


def lstm(
    params: cells.LSTMParameters,
    xs: Array,
    h0: tuple[Array, Array],
    *,
    iterations: int | None = ...,  # type: ignore[assignment]
    chunk: int = 1,
    tolerance: float | None = None,
    solver: Solver | None = None,
    rank: Rank = 0,
) -> tuple[tuple[Array, Array], Array]:
    """An LSTM over (T, B, I) from ``(h0, c0)``: ``((h_T, c_T), h)``. Otherwise as `gru`."""
    how = static_solver(solver, iterations, chunk, tolerance)
    if not isinstance(h0, tuple | list) or len(h0) != 2:
        raise TypeError(f"the initial state of an LSTM is a pair (h0, c0), not a {type(h0).__name__}")
    check_cell(4, params, xs, {"h0": h0[0], "c0": h0[1]}, BACKEND)
    _check_rank(rank, params)
    h0 = tuple(varying(state, params, xs, h0, following.given(rank)) for state in h0)
    if how.exact:
        h, c = _lstm_states(params, xs, h0)
        return (h[-1], c[-1]), h

    def pull(given: Any, states: Any, d: Any, rank: Rank) -> Any:
        params, xs, h0 = given
        return cells.LSTMPullback(params, xs, h0, states, BACKEND)(d, solver=how, rank=rank)

    h, c = _with_adjoint(_lstm_states, pull, rank)(params, xs, h0)
    return (h[-1], c[-1]), h


def _check_rank(rank: Any, params: Any) -> None:
    check_static("rank", rank)
    check_directions(params.weight_hh, rank, BACKEND)


def _with_adjoint(run: Callable[..., Any], pull: Callable[..., Any], rank: Rank) -> Callable[..., Any]:
    """A cell's forward pass with ``pull(its arguments, its states, their cotangents, rank)`` for its reverse rule."""

    def checked(strong: Directions | None, *given: Any) -> Any:
        following.known(rank, strong or given[0].weight_hh)
        return run(*given)

    states: Callable[..., Any] = jax.custom_vjp(checked)

    def forward(*given: Any) -> tuple[Any, Any]:
        found = checked(*given)
        return found, (given, found)

    def backward(saved: Any, d: Any) -> Any:
        (strong, *given), found = saved
        pulled = tuple(pull(given, found, d, rank if strong is None else strong))
        return None, *jax.tree.map(as_varying_as, tuple(given), pulled)

    states.defvjp(forward, backward)  # type: ignore[attr-defined]
    return partial(states, following.given(rank))


# The cells' forward passes as one would write them in JAX: they differentiate 10 to 25 % faster than the
# backend-neutral ones (measured on two cores), whose slices leave paddings in the reverse.


def _gru_states(params: cells.GRUParameters, xs: Array, h0: Array) -> Array:
    def step(h: Array, inputs: Array) -> tuple[Array, Array]:
        (ar, az, an), (br, bz, bn) = (
            jnp.split(a, 3, -1) for a in (inputs, _linear(h, params.weight_hh, params.bias_hh))
        )
        r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
        n = jnp.tanh(an + r * bn)
        h = n + z * (h - n)
        return h, h

    states: Array = jax.lax.scan(step, h0, _linear(xs, params.weight_ih, params.bias_ih))[1]
    return states


def _lstm_states(params: cells.LSTMParameters, xs: Array, h0: tuple[Array, Array]) -> tuple[Array, Array]:
    def step(state: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        i, f, g, o = jnp.split(inputs + _linear(state[0], params.weight_hh, params.bias_hh), 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = jax.nn.sigmoid(o) * jnp.tanh(c), c
        return state, state

    states: tuple[Array, Array] = jax.lax.scan(step, tuple(h0), _linear(xs, params.weight_ih, params.bias_ih))[1]
    return states


def _linear(x: Array, weight: Array, bias: Array | None) -> Array:
    return x @ weight.T if bias is None else x @ weight.T + bias
