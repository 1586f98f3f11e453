"""The forward of a GRU and an LSTM: one product for all inputs, then one compiled loop over the steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.arrays import empty, gru_bias, lstm_bias
from hbp.backends._numba.compile import Threads, as_numpy
from hbp.backends._numba.products import Product
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
    (length, batch, _), size, weight = x.shape, h0.shape[-1], params.weight_hh.T
    product = Product.of("gru forward", backend, weight, size, length, batch, threads)
    a, h, q = (
        matmul(x, params.weight_ih.T),
        empty(h0, (length, batch, size)),
        empty(h0, (length if keep else 1, batch, size)),
    )
    rec = empty(h0, (len(product.weight), batch, 3 * product.own))
    dtype = as_numpy(a).dtype
    arrays = map(as_numpy, (a, q, h, np.array(as_numpy(h0), order="C"), rec))
    run = partial(loops.gru_run(dtype), *arrays, gru_bias(params, dtype), int(keep))
    _run(run, product, h, h0, rec, weight, backend)
    return h, (a, q) if keep else None


def lstm_forward(
    params: LSTMParameters,
    x: Array,
    initial: tuple[Array, Array],
    backend: Any,
    threads: Threads | None = None,
) -> tuple[Array, Array, Array]:
    """All states h and c, (T, B, H), and the gates i, f, g, o, (T, B, 4H)."""
    (length, batch, _), (h0, c0), weight = x.shape, initial, params.weight_hh.T
    size = h0.shape[-1]
    product = Product.of("lstm forward", backend, weight, size, length, batch, threads)
    a, h, c = matmul(x, params.weight_ih.T), empty(h0, (length, batch, size)), empty(h0, (length, batch, size))
    rec = empty(h0, (len(product.weight), batch, 4 * product.own))
    dtype = as_numpy(a).dtype
    states = (np.array(as_numpy(state), order="C") for state in (h0, c0))
    arrays = (*map(as_numpy, (a, h, c)), *states, as_numpy(rec), lstm_bias(params, dtype))
    _run(partial(loops.lstm_run(dtype), *arrays), product, h, h0, rec, weight, backend)
    return h, c, a


def _run(
    loop: Callable[..., None], product: Product, h: Array, h0: Array, rec: Array, weight: Array, backend: Any
) -> None:
    """Go through all steps, with the product ``h[t-1] @ weight`` in the loop, or in ``rec`` before each."""
    length, batch, _ = h.shape
    if product.way != "calls":
        product.run(lambda team, start, stop: loop(*team, 1, 0, length, start, stop), length, batch)
        return
    step = partial(loop, *product.alone, 0)
    for t in range(length):
        backend.xp.matmul(h[t - 1] if t else h0, weight, out=rec[0])
        step(t, t + 1, 0, batch)
