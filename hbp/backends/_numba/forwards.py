"""The forward of a GRU and an LSTM: one product for all inputs, then one compiled loop over the steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.arrays import empty, for_loop, gru_bias, in_loop, lstm_bias
from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.cells import GRUParameters, LSTMParameters
from hbp.cells._common import matmul
from hbp.core.backend import Array


def gru_forward(
    params: GRUParameters, x: Array, h0: Array, keep: bool, backend: Any, threads: Threads | None = None
) -> tuple[Array, tuple[Array, Array] | None]:
    """All states, (T, B, H), and for the way back the gates r, z, n, (T, B, 3H), and W_hn h + b_hn, (T, B, H), if kept.

    >>> from hbp.backends.numpy import backend
    >>> h, gates = gru_forward(GRUParameters(np.zeros((3, 1)), np.zeros((3, 1))), np.zeros((2, 1, 1)), np.ones((1, 1)),
    ...                        True, backend)
    >>> h.ravel().tolist(), [kept.shape for kept in gates]
    ([0.5, 0.25], [(2, 1, 3), (2, 1, 1)])
    """
    threads, (length, batch, _), size = threads or own_threads(), x.shape, h0.shape[-1]
    a, h, q = (
        matmul(x, params.weight_ih.T),
        empty(h0, (length, batch, size)),
        empty(h0, (length if keep else 1, batch, size)),
    )
    rec = empty(h0, (batch, 3 * size))
    dtype, compiled = as_numpy(a).dtype, in_loop("gru forward", backend, batch, size)
    arrays = map(as_numpy, (a, q, h, np.array(as_numpy(h0), order="C"), rec))
    run = partial(
        loops.gru_run(dtype), *arrays, for_loop(params.weight_hh.T, compiled), gru_bias(params, dtype), int(keep)
    )
    if compiled:
        threads.run(partial(run, 1, 0, length), batch, length * batch * 3 * size * size)
    else:
        for t in range(length):
            backend.xp.matmul(h[t - 1] if t else h0, params.weight_hh.T, out=rec)
            run(0, t, t + 1, 0, batch)
    return h, (a, q) if keep else None


def lstm_forward(
    params: LSTMParameters,
    x: Array,
    initial: tuple[Array, Array],
    backend: Any,
    threads: Threads | None = None,
) -> tuple[Array, Array, Array]:
    """All states h and c, (T, B, H), and the gates i, f, g, o, (T, B, 4H)."""
    threads, (length, batch, _), (h0, c0) = threads or own_threads(), x.shape, initial
    size = h0.shape[-1]
    a, h, c = matmul(x, params.weight_ih.T), empty(h0, (length, batch, size)), empty(h0, (length, batch, size))
    dtype, compiled = as_numpy(a).dtype, in_loop("lstm forward", backend, batch, size)
    states = (np.array(as_numpy(state), order="C") for state in (h0, c0))
    arrays = (*map(as_numpy, (a, h, c)), *states, for_loop(params.weight_hh.T, compiled), lstm_bias(params, dtype))
    run = partial(loops.lstm_run(dtype), *arrays)
    if compiled:
        threads.run(partial(run, 1, 0, length), batch, length * batch * 4 * size * size)
    else:
        for t in range(length):
            backend.add_product(a[t], h[t - 1] if t else h0, params.weight_hh.T)
            run(0, t, t + 1, 0, batch)
    return h, c, a
