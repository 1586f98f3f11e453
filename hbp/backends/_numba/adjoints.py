"""The way back through a GRU and an LSTM, exact or in rounds of Highway-BP, on single steps or on stages.

The mathematics is that of `hbp.cells`. The products are the array library's, on the threads that it always uses; the
gates are those that the forward kept, or are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.arrays import dense, empty, gru_bias, lstm_bias, rows_of, zeros
from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.backends._numba.passes import Loop
from hbp.backends._numba.stages import Layout, Residual, Rounds
from hbp.backends._numba.way_back import EXACT, Columns, How, WayBack
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.cells._common import matmul, previous
from hbp.core.backend import Array
from hbp.core.solver import Solver
from hbp.directions import Directions


def gru_adjoint(
    pullback: GRUPullback,
    dh: Array,
    with_inputs: bool = True,
    threads: Threads | None = None,
    solver: Solver = EXACT,
    directions: Directions | None = None,
) -> tuple[GRUParameters, Array | None, Array]:
    """``pullback(dh, solver=solver, rank=directions)`` for float32 or float64 in any layout; dx None if unwanted.

    Directions go with single steps alone.
    """
    params, size, how = pullback.params, dh.shape[-1], How(solver, directions, threads or own_threads())
    (weights, recurrent, bias, dx), (dh0,) = _gradients(pullback, how, [dh], with_inputs, _gru_way, _gru_apart)
    given = params.bias_ih, params.bias_hh
    by_gate = pullback.backend.concat([bias[size : 3 * size], bias[:size]])
    biases = [None if own is None else part for own, part in zip(given, (by_gate, bias[size:]), strict=True)]
    return GRUParameters(weights, recurrent, *biases), dx, dh0


def _gru_way(pullback: GRUPullback, how: How, entering: Sequence[Array], carries: Sequence[Array]) -> WayBack:
    """With cotangents ``d`` of n, r, z and the candidate's recurrent part."""
    h, (dh,), (carry,) = pullback.h, entering, carries
    size, run = h.shape[-1], loops.gru_steps(as_numpy(h).dtype)

    def gates(a: int, b: int, d: Array) -> tuple[Array, ...]:
        if pullback.gates is not None:
            return tuple(kept[a:b] for kept in pullback.gates)
        states = h[a - 1 : b - 1] if a else previous(pullback.h0, h[:b], pullback.backend)
        return _gru_gates(pullback, pullback.x[a:b], states, d, how.threads)

    def steps(a: int, b: int, d: Array, pulled: Array) -> Loop:
        states, arrays = (h[a - 1] if a else pullback.h0, h[a:b]), (dh[a:b], pulled, carry, d)
        return partial(run, *map(as_numpy, gates(a, b, d)), *map(dense, states), *map(as_numpy, arrays))

    inputs = (slice(size, 3 * size), slice(0, 2 * size)), (slice(0, size), slice(2 * size, 3 * size))
    columns = Columns(inputs, slice(size, 4 * size))
    return WayBack("gru backward", pullback, (pullback.h0, h), steps, entering, carries, columns, how)


def _gru_apart(pullback: GRUPullback, layout: Layout, threads: Threads) -> tuple[GRUPullback, Residual]:
    """The stages as a batch of short sequences with gates, which each round needs, and the residual path through each.

    Steps that the last stage does not have are led to by no cotangent, whatever their gates.
    """
    h0, h, apart, size = pullback.h0, pullback.h, layout.apart, pullback.h.shape[-1]
    inner, gates = replace(pullback, x=apart(pullback.x), h0=layout.before(h0, h), h=apart(h)), pullback.gates
    if gates is None:
        before, room = previous(inner.h0, inner.h, inner.backend), empty(h, (*inner.h.shape[:2], 3 * size))
        gates = _gru_gates(inner, inner.x, before, room, threads)
    else:
        gates = apart(gates[0]), apart(gates[1])
    return replace(inner, gates=gates), Residual.of(layout, gates[0][..., size : 2 * size])


def _gru_gates(pullback: GRUPullback, x: Array, before: Array, scratch: Array, threads: Threads) -> tuple[Array, Array]:
    """r, z, n, (T, B, 3H), and the candidate's recurrent part, (T, B, H), of all steps at once."""
    params, size = pullback.params, before.shape[-1]
    a, q = matmul(x, params.weight_ih.T), empty(before, before.shape)
    rows = rows_of(a)
    rec = scratch.reshape((-1,))[: rows.size].reshape(rows.shape)
    pullback.backend.xp.matmul(before.reshape((len(rows), size)), params.weight_hh.T, out=rec)
    run = partial(loops.gru_gates(rows.dtype), rows, as_numpy(rec), gru_bias(params, rows.dtype), rows_of(q))
    threads.run(run, len(rows), 8 * rows.size)
    return a, q


def lstm_adjoint(
    pullback: LSTMPullback,
    dstates: tuple[Array, Array | None],
    with_inputs: bool = True,
    threads: Threads | None = None,
    solver: Solver = EXACT,
    directions: Directions | None = None,
) -> tuple[LSTMParameters, Array | None, tuple[Array, Array]]:
    """``pullback(dstates, solver=solver, rank=directions)`` for float32 or float64; dx None if unwanted."""
    params, how = pullback.params, How(solver, directions, threads or own_threads())
    pullback = _with_memory(pullback, how.threads)
    none = zeros(pullback.states[0], pullback.states[0].shape if how.in_stages else (0, *pullback.states[0].shape[1:]))
    entering = [none if one is None else one for one in dstates]
    found, (dh0, dc0) = _gradients(pullback, how, entering, with_inputs, _lstm_way, _lstm_apart)
    weights, recurrent, bias, dx = found
    given = (params.bias_ih, bias), (params.bias_hh, pullback.backend.concat([bias]))  # apart: they may be written into
    biases = [None if own is None else part for own, part in given]
    return LSTMParameters(weights, recurrent, *biases), dx, (dh0, dc0)


def _lstm_way(pullback: LSTMPullback, how: How, entering: Sequence[Array], carries: Sequence[Array]) -> WayBack:
    """With cotangents ``d`` of i, f, g, o."""
    (h0, c0, h, c, gates), (dh, dc) = _numbers(pullback), entering
    run, every = loops.lstm_steps(as_numpy(h).dtype), slice(0, 4 * h.shape[-1])

    def steps(a: int, b: int, d: Array, pulled: Array) -> Loop:
        states, arrays = (c[a - 1] if a else c0, c[a:b]), (dh[a:b], dc[a:b], pulled, *carries, d)
        return partial(run, as_numpy(gates[a:b]), *map(dense, states), *map(as_numpy, arrays))

    columns = Columns(((every, every),), every)
    return WayBack("lstm backward", pullback, (h0, h), steps, entering, carries, columns, how)


def _lstm_apart(pullback: LSTMPullback, layout: Layout, _: Threads) -> tuple[LSTMPullback, Residual]:
    """As `_gru_apart`, of a pullback with gates and states c."""
    (h0, c0, h, c, gates), apart, size = _numbers(pullback), layout.apart, pullback.params.weight_hh.shape[-1]
    initial = layout.before(h0, h), layout.before(c0, c)
    inner = replace(pullback, x=apart(pullback.x), initial=initial, states=(apart(h), apart(c)), gates=apart(gates))
    exposed = np.tanh(as_numpy(c)[layout.last])
    exposed = as_numpy(gates)[layout.last, :, 3 * size :] * (1 - exposed * exposed)
    return inner, Residual.of(layout, cast(Any, inner.gates)[..., size : 2 * size], exposed)


def _numbers(pullback: LSTMPullback) -> Any:
    """h0, c0, h, c and the gates, where all are there."""
    return (*pullback.initial, *pullback.states, pullback.gates)


def _with_memory(pullback: LSTMPullback, threads: Threads) -> LSTMPullback:
    """With gates and states c, which are computed again where they were not kept."""
    (h0, c0), (h, c), gates = pullback.initial, pullback.states, pullback.gates
    if gates is None:
        gates = _lstm_gates(pullback, previous(h0, h, pullback.backend), threads)
    if c is None:
        c = empty(h, h.shape)
        memory = partial(loops.lstm_memory(as_numpy(h).dtype), as_numpy(gates), dense(c0), as_numpy(c))
        threads.run(memory, len(h0), 4 * math.prod(gates.shape[1:]))
    return replace(pullback, states=(h, c), gates=gates)


def _lstm_gates(pullback: LSTMPullback, before: Array, threads: Threads) -> Array:
    """i, f, g, o of all steps at once, (T, B, 4H)."""
    params, backend = pullback.params, cast(Any, pullback.backend)
    a = matmul(pullback.x, params.weight_ih.T)
    rows = rows_of(a)
    by_row = [part.reshape((len(rows), part.shape[-1])) for part in (a, before)]
    backend.add_product(*by_row, params.weight_hh.T)
    run = partial(loops.lstm_gates(rows.dtype), rows, lstm_bias(params, rows.dtype))
    threads.run(run, len(rows), 8 * rows.size)
    return a


def _gradients(
    pullback: Any,
    how: How,
    entering: Sequence[Array],
    with_inputs: bool,
    way: Callable[[Any, How, Sequence[Array], Sequence[Array]], WayBack],
    apart: Callable[[Any, Layout, Threads], tuple[Any, Residual]],
) -> tuple[tuple[Array, Array, Array, Array | None], Sequence[Array]]:
    """What `WayBack.gradients` returns, and the first states' cotangents, (B, H) each."""
    solver = how.solver.above(float(np.finfo(as_numpy(entering[0]).dtype).eps))
    if not how.in_stages:
        carries, own = [zeros(one, one.shape[1:]) for one in entering], replace(how, solver=solver)
        return way(pullback, own, entering, carries).gradients(with_inputs), carries
    spans = 3 if pullback.gates is None else 1  # who does not keep gates would rather have memory than time
    layout, exact = Layout.of(solver, entering[0]), How(EXACT, None, how.threads, least=1, spans=spans)
    inner, residual = apart(pullback, layout, how.threads)
    rounds = Rounds.of(layout, solver, residual, entering, partial(way, inner, exact))
    firsts = rounds.solved()
    weights, recurrent, bias, dx = rounds.way.gradients(with_inputs)
    del inner, rounds  # their arrays are not needed beside another dx
    return (weights, recurrent, bias, None if dx is None else layout.together(dx)), firsts
