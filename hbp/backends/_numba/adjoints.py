"""The exact adjoints of the GRU and the LSTM: matrix products over all steps at once around one compiled loop.

The mathematics is that of `hbp.cells`. Products and tanh are the array library's, so that NumPy and PyTorch each use
the threads they always use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.cells._common import matmul, previous, weight_gradient
from hbp.cells._spans import pull_in_spans, spans_of
from hbp.core.backend import Array

COMPILED = 1 << 15
"""Batch size times the square of the hidden size, for each thread, below which a step's product is compiled too; from
there on the library's is so much faster that two calls for each step are made up for."""


def gru_adjoint(
    pullback: GRUPullback, dh: Array, with_inputs: bool = True, threads: Threads | None = None
) -> tuple[GRUParameters, Array | None, Array]:
    """``pullback(dh)``, exact, for arrays of float32 or float64 in any layout; None for dx where unwanted."""

    def solve(span: GRUPullback, start: int, carry: Array) -> tuple[Array, Array, Array]:
        return _gru_span(span, dh[start : start + len(span.h)], carry, threads or own_threads())

    return pull_in_spans(pullback, spans_of(pullback), solve, with_inputs)


def _gru_span(span: GRUPullback, dh: Array, carry: Array, threads: Threads) -> tuple[Array, Array, Array]:
    """The cotangents of both pre-activations, (T, B, 3H), and of the initial state, from those of the states."""
    params, tanh, size = span.params, span.backend.xp.tanh, span.h.shape[-1]
    inputs = matmul(span.x, params.weight_ih.T)
    recurrent = matmul(previous(span.h0, span.h, span.backend), params.weight_hh.T)
    pair = _rows(inputs), _rows(recurrent)
    biases = _bias(params.bias_ih, pair[0]), _bias(params.bias_hh, pair[0])
    dtype, count, numbers = pair[0].dtype, len(pair[0]), pair[0].size
    threads.run(partial(loops.gru_sum(dtype), *pair, *biases), count, numbers)
    tanh(inputs[..., : 2 * size], out=inputs[..., : 2 * size])
    threads.run(partial(loops.gru_candidate(dtype), *pair), count, numbers)
    tanh(inputs[..., 2 * size :], out=inputs[..., 2 * size :])
    carry = _own(carry, span.backend)
    arrays = (*map(as_numpy, (inputs, recurrent, span.h0, span.h, dh, carry)), _weight(params.weight_hh))
    _steps(partial(loops.gru_steps(dtype), *arrays), recurrent, carry, params.weight_hh, span.backend, threads)
    return inputs, recurrent, carry


def _steps(run: Callable[..., None], rows: Array, carry: Array, weight: Array, backend: Any, threads: Threads) -> None:
    """All steps from the last to the first, with the product ``carry += rows[t] @ weight`` at the end of each."""
    length, (batch, size) = len(rows), carry.shape
    if batch * size**2 < COMPILED * min(threads.count, batch):
        threads.run(partial(run, 1, 0, length), batch, length * batch * rows.shape[-1] * size)
        return
    for t in range(length - 1, -1, -1):
        run(0, t, t + 1, 0, batch)
        backend.add_product(carry, rows[t], weight)


def lstm_adjoint(
    pullback: LSTMPullback,
    dstates: tuple[Array, Array | None],
    with_inputs: bool = True,
    threads: Threads | None = None,
) -> tuple[LSTMParameters, Array | None, tuple[Array, Array]]:
    """``pullback(dstates)``, exact, for arrays of float32 or float64; None for dx where unwanted."""
    params, (h0, c0), backend, threads = pullback.params, pullback.initial, pullback.backend, threads or own_threads()
    joined = backend.concat([pullback.x, previous(h0, pullback.states[0], backend)], 2)  # one product for both weights
    a = matmul(joined, backend.concat([params.weight_ih, params.weight_hh], 1).T)
    rows, dtype = _rows(a), _rows(a).dtype
    biases = _bias(params.bias_ih, rows), _bias(params.bias_hh, rows)
    threads.run(partial(loops.lstm_sum(dtype), rows, *biases), len(rows), rows.size)
    backend.xp.tanh(a, out=a)
    c = pullback.states[1]
    if c is None:
        c = _own(pullback.states[0], backend)  # as many numbers, to be overwritten
        memory = partial(loops.lstm_memory(dtype), *map(as_numpy, (a, c0, c)))
        threads.run(memory, len(h0), rows.size)
    cotangents = [np.broadcast_to(dtype.type(0), c.shape) if d is None else as_numpy(d) for d in dstates]
    carries = tuple(_own(backend.zeros_like(state), backend) for state in (h0, c0))
    arrays = (*map(as_numpy, (a, c0, c, backend.xp.tanh(c))), *cotangents, *map(as_numpy, carries))
    run = partial(loops.lstm_steps(dtype), *arrays, _weight(params.weight_hh))
    _steps(run, a, carries[0], params.weight_hh, backend, threads)
    dx = matmul(a, params.weight_ih) if with_inputs else None
    return _lstm_parameters(params, a, joined), dx, carries


def _lstm_parameters(params: LSTMParameters, a: Array, joined: Array) -> LSTMParameters:
    """The parameters' gradients from the cotangents of the pre-activations, and the inputs beside the states."""
    weights, bias, width = weight_gradient(a, joined), a.sum((0, 1)), params.weight_ih.shape[1]
    return LSTMParameters(
        weights[:, :width],
        weights[:, width:],
        None if params.bias_ih is None else bias,
        None if params.bias_hh is None else bias,
    )


def _own(x: Array, backend: Any) -> Array:
    """A contiguous copy: NumPy keeps the order of axes wherever it can."""
    return backend.concat([x.reshape((-1,))]).reshape(x.shape)


def _rows(x: Array) -> np.ndarray:
    """All steps of all sequences as the rows of a NumPy matrix, without a copy."""
    return as_numpy(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _bias(bias: Array | None, rows: np.ndarray) -> np.ndarray:
    return np.zeros(rows.shape[1], rows.dtype) if bias is None else as_numpy(bias)


def _weight(weight: Array) -> np.ndarray:
    return np.ascontiguousarray(as_numpy(weight))
