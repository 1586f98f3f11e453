"""The loops of the LSTM."""

from __future__ import annotations

import numba
import numpy as np

from hbp.backends._numba.compile import compiled, contiguous, doubles, index, reads, writes
from hbp.backends._numba.functions import OPTIONS, logistic, tanh
from hbp.backends._numba.loops.parts import LOW, add_pulled, enter, measure, quarters
from hbp.backends._numba.tiles import add_panels


@numba.njit(**OPTIONS)
def _lstm_row(a, bias, size):  # type: ignore[no-untyped-def]
    """From pre-activations without bias to i, f, g, o, in their place."""
    g, o, bias_g, bias_o = a[2 * size : 3 * size], a[3 * size :], bias[2 * size : 3 * size], bias[3 * size :]
    for n in range(2 * size):
        a[n] = logistic(a[n] + bias[n])
    for n in range(size):
        g[n] = tanh(g[n] + bias_g[n])
        o[n] = logistic(o[n] + bias_o[n])


@compiled(writes(2), contiguous(1), index, index)
def lstm_gates(a: np.ndarray, bias: np.ndarray, start: int, stop: int) -> None:
    """The gates i, f, g, o of N steps at once, from their pre-activations without bias, (N, 4H), in their place."""
    size = a.shape[1] // 4
    for row in range(start, stop):
        _lstm_row(a[row], bias, size)


@compiled(contiguous(3), contiguous(2), writes(3), index, index)
def lstm_memory(gates: np.ndarray, c0: np.ndarray, c: np.ndarray, start: int, stop: int) -> None:
    """The states c from the gates, one step after another."""
    size = c.shape[2]
    for t in range(gates.shape[0]):
        for b in range(start, stop):
            before = c[t - 1, b] if t else c0[b]
            now, i, f, g = c[t, b], gates[t, b, :size], gates[t, b, size : 2 * size], gates[t, b, 2 * size : 3 * size]
            for n in range(size):
                now[n] = f[n] * before[n] + i[n] * g[n]


@compiled(*[writes(3)] * 3, *[writes(2)] * 2, contiguous(3), contiguous(1), *[index] * 5)
def lstm_run(
    a: np.ndarray,
    h: np.ndarray,
    c: np.ndarray,
    h0: np.ndarray,
    c0: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """The forward, as `gru_run`'s: ``a`` has the inputs' projections, (T, B, 4H), and, if not computed here, the
    states' added; in its place the gates come.
    """
    size = h.shape[2]
    for t in range(first, last):
        if product:
            add_panels(h[t - 1] if t else h0, weight, a[t], start, stop)
        for b in range(start, stop):
            gates, before, now, new = a[t, b], c[t - 1, b] if t else c0[b], c[t, b], h[t, b]
            _lstm_row(gates, bias, size)
            i, f, g, o = quarters(gates, size)
            for n in range(size):
                memory = f[n] * before[n] + i[n] * g[n]
                now[n] = memory
                new[n] = o[n] * tanh(memory)


@compiled(
    contiguous(3),
    contiguous(2),
    contiguous(3),
    *[reads(3)] * 2,
    contiguous(3),
    *[writes(2)] * 2,
    writes(3),
    contiguous(3),
    *LOW,
    writes(3),
    doubles,
    *[index] * 5,
)
def lstm_steps(
    gates: np.ndarray,
    c0: np.ndarray,
    c: np.ndarray,
    dh: np.ndarray,
    dc: np.ndarray,
    pulled: np.ndarray,
    carry_h: np.ndarray,
    carry_c: np.ndarray,
    d: np.ndarray,
    weight: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    low: np.ndarray,
    fresh: np.ndarray,
    before: np.ndarray,
    sizes: np.ndarray,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """The same as `gru_steps`: the cotangents of the pre-activations i, f, g, o, (T, B, 4H), from gates and states."""
    size = carry_h.shape[1]
    one = gates.dtype.type(1)
    for t in range(last - 1, first - 1, -1):
        for b in range(start, stop):
            old, now = c[t - 1, b] if t else c0[b], c[t, b]
            g_h, g_c = carry_h[b], carry_c[b]
            if len(dh):
                enter(dh[t, b], g_h)
            if len(dc):
                enter(dc[t, b], g_c)
            di, df, dg, do = quarters(d[t, b], size)
            if len(sizes):
                measure(g_h, before[t, b, :size], sizes[b])
                measure(g_c, before[t, b, size:], sizes[b])
            i, f, g, o = quarters(gates[t, b], size)
            for n in range(size):
                exposed = tanh(now[n])
                gh = g_h[n]
                gc = g_c[n] + gh * o[n] * (one - exposed * exposed)
                di[n] = gc * g[n] * i[n] * (one - i[n])
                df[n] = gc * old[n] * f[n] * (one - f[n])
                dg[n] = gc * i[n] * (one - g[n] * g[n])
                do[n] = gh * exposed * o[n] * (one - o[n])
                g_c[n] = f[n] * gc
                g_h[n] = 0
        add_pulled(d[t], weight, pulled, left, right, low, fresh, carry_h, product, t, start, stop)
