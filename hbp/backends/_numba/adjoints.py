"""The way back through a GRU and an LSTM, exact or in rounds of Highway-BP: products over all steps around one loop.

The mathematics is that of `hbp.cells`. The products are the array library's, on the threads that it always uses; the
gates are those that the forward kept, or are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.arrays import dense, empty, gru_bias, lstm_bias, rows_of, zeros
from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.backends._numba.passes import Loop, Span
from hbp.backends._numba.products import Product
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.cells._common import matmul, previous
from hbp.core.backend import Array
from hbp.core.solver import Solver
from hbp.directions import Directions

SPAN = 1 << 20
"""Numbers in the largest array of a span of time: it stays in the caches, and in memory that was written before."""
EXACT = Solver()


@dataclass(frozen=True, eq=False)
class How:
    """How a way back is solved: exact, or in rounds on single steps, with directions of the weights in the path."""

    solver: Solver
    directions: Directions | None
    entering: Sequence[Array]
    """The cotangents given from outside."""
    threads: Threads


@dataclass(frozen=True)
class Columns:
    """Which columns of the pre-activations' cotangents go into which products."""

    inputs: tuple[tuple[slice, slice], ...]
    """Those of the product with the inputs' weights, each with the rows of the weights."""
    recurrent: slice
    """Those of the product with the states' weights."""


def gru_adjoint(
    pullback: GRUPullback,
    dh: Array,
    with_inputs: bool = True,
    threads: Threads | None = None,
    solver: Solver = EXACT,
    directions: Directions | None = None,
) -> tuple[GRUParameters, Array | None, Array]:
    """``pullback(dh, solver=solver, rank=directions)`` for float32 or float64 in any layout; dx None if unwanted."""
    params, h, threads = pullback.params, pullback.h, threads or own_threads()
    size, dtype = h.shape[-1], as_numpy(h).dtype
    carry = zeros(pullback.h0, pullback.h0.shape)

    def gates(a: int, b: int, d: Array) -> tuple[Array, ...]:
        if pullback.gates is not None:
            return tuple(kept[a:b] for kept in pullback.gates)
        states = h[a - 1 : b - 1] if a else previous(pullback.h0, h[:b], pullback.backend)
        return _gru_gates(pullback, pullback.x[a:b], states, d, threads)

    def steps(a: int, b: int, d: Array, pulled: Array) -> Loop:
        states, arrays = (h[a - 1] if a else pullback.h0, h[a:b]), (dh[a:b], pulled, carry, d)
        run = loops.gru_steps(dtype)
        return partial(run, *map(as_numpy, gates(a, b, d)), *map(dense, states), *map(as_numpy, arrays))

    # the cotangents come as those of n, r, z and the candidate's recurrent part
    inputs = (slice(size, 3 * size), slice(0, 2 * size)), (slice(0, size), slice(2 * size, 3 * size))
    columns, how = Columns(inputs, slice(size, 4 * size)), How(solver, directions, [dh], threads)
    weights, recurrent, bias, dx = _back(pullback, (pullback.h0, h), steps, [carry], columns, with_inputs, how)
    given = params.bias_ih, params.bias_hh
    by_gate = pullback.backend.concat([bias[size : 3 * size], bias[:size]])
    biases = [None if own is None else part for own, part in zip(given, (by_gate, bias[size:]), strict=True)]
    return GRUParameters(weights, recurrent, *biases), dx, carry


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
    params, (h0, c0), threads = pullback.params, pullback.initial, threads or own_threads()
    (h, c), size, dtype = pullback.states, h0.shape[-1], as_numpy(h0).dtype
    gates = pullback.gates
    if gates is None:
        gates = _lstm_gates(pullback, previous(h0, h, pullback.backend), threads)
    if c is None:
        c = empty(h, h.shape)
        memory = partial(loops.lstm_memory(dtype), as_numpy(gates), dense(c0), as_numpy(c))
        threads.run(memory, len(h0), 4 * math.prod(gates.shape[1:]))
    none = np.empty((0, *h.shape[1:]), dtype)
    dh, dc = (none if one is None else one for one in dstates)
    carries = tuple(zeros(state, state.shape) for state in (h0, c0))

    def steps(a: int, b: int, d: Array, pulled: Array) -> Loop:
        states, arrays = (c[a - 1] if a else c0, c[a:b]), (dh[a:b], dc[a:b], pulled, *carries, d)
        run = loops.lstm_steps(dtype)
        return partial(run, as_numpy(gates[a:b]), *map(dense, states), *map(as_numpy, arrays))

    every = slice(0, 4 * size)
    columns, how = Columns(((every, every),), every), How(solver, directions, [dh, dc], threads)
    weights, recurrent, bias, dx = _back(pullback, (h0, h), steps, carries, columns, with_inputs, how)
    given = (params.bias_ih, bias), (params.bias_hh, pullback.backend.concat([bias]))  # apart: they may be written into
    biases = [None if own is None else part for own, part in given]
    return LSTMParameters(weights, recurrent, *biases), dx, carries


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


def _back(
    pullback: Any,
    states: tuple[Array, Array],
    steps: Callable[[int, int, Array, Array], Loop],
    carries: Sequence[Array],
    columns: Columns,
    with_inputs: bool,
    how: How,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of both weights, the sums of ``d``, and dx where it is wanted, of either cell.

    Args:
        pullback: the cell's.
        states: h, the initial ones and all others.
        steps: the loop over the steps from a to b, given a, b, where ``d`` goes, the cotangents of the
            pre-activations, (b - a, B, 4H), and what was pulled back.
        carries: the cotangents that leave a step, zeros; the first gets the products with the weights.
        columns: those of ``d`` in each product.
        with_inputs: whether dx is wanted.
        how: exact, in spans of time, or in rounds over all steps at once.
    """
    x, params, backend, (h0, h) = pullback.x, pullback.params, pullback.backend, states
    carry, length = carries[0], len(x)
    batch, size = carry.shape
    if how.solver.exact:
        task = f"{'gru' if isinstance(pullback, GRUPullback) else 'lstm'} backward"
        product = Product.of(task, backend, params.weight_hh, size, length, batch, how.threads)
    else:
        product = Product.called(params.weight_hh, size, how.threads)
    most = max(SPAN // max(4 * size * batch, 1), 8) if how.solver.exact else length
    d = empty(carry, (min(most, length), batch, 4 * size))
    inputs, recurrent = empty(carry, params.weight_ih.shape), empty(carry, params.weight_hh.shape)
    bias, dx = zeros(carry, (4 * size,)), None
    for b in range(length, 0, -most):
        a = max(b - most, 0)
        own = d[: b - a]
        span = Span(partial(steps, a, b, own), carries, own, columns.recurrent, params.weight_hh, backend, product)
        if how.solver.exact:
            span.exact()
        else:
            span.rounds(how.solver, how.directions, how.entering)
        rows = own.reshape(((b - a) * batch, 4 * size))
        add = backend.add_product if b < length else partial(_put, backend)  # a matrix of zeros would take its time
        given = x[a:b].reshape((len(rows), x.shape[-1]))
        for part, gates in columns.inputs:
            add(inputs[gates], rows[:, part].T, given)
        first = 0 if a else batch  # the rows whose states lie apart
        by_state = rows[:, columns.recurrent]
        add(recurrent, by_state[first:].T, h[max(a - 1, 0) : b - 1].reshape((len(rows) - first, size)))
        if first:
            backend.add_product(recurrent, by_state[:first].T, h0)
        bias += rows.sum(0)
        if with_inputs:
            dx = empty(carry, x.shape) if dx is None else dx  # not while rounds hold their arrays
            add = partial(_put, backend)
            for part, gates in columns.inputs:
                add(dx[a:b].reshape(given.shape), rows[:, part], params.weight_ih[gates])
                add = backend.add_product
    return inputs, recurrent, bias, dx


def _put(backend: Any, product: Array, rows: Array, weight: Array) -> None:
    """The product of two matrices, written into a third."""
    backend.xp.matmul(rows, weight, out=product)
