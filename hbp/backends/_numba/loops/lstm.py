"""The loops of the LSTM."""

from __future__ import annotations

import numba
import numpy as np

from hbp.backends._numba.compile import compiled, contiguous, doubles, index, reads, writes
from hbp.backends._numba.functions import OPTIONS, logistic, tanh
from hbp.backends._numba.loops.parts import EXACT, LOW, TEAM, add_pulled, enter, measure, quarters, units_of
from hbp.backends._numba.meeting import join, meet
from hbp.backends._numba.subnormals import flushed, restored
from hbp.backends._numba.tiles import add_panels


@numba.njit(**OPTIONS)
def _add(row, more):  # type: ignore[no-untyped-def]
    for n in range(row.shape[0]):
        row[n] += more[n]


@numba.njit(**OPTIONS)
def _lstm_row(a, bias, size, lo, hi):  # type: ignore[no-untyped-def]
    """From pre-activations without bias to i, f, g, o, in their place, of the units from ``lo`` up to ``hi``."""
    i, f, g, o = quarters(a, size, lo, hi)
    bias_i, bias_f, bias_g, bias_o = quarters(bias, size, lo, hi)
    for n in range(hi - lo):
        i[n] = logistic(i[n] + bias_i[n])
        f[n] = logistic(f[n] + bias_f[n])
    for n in range(hi - lo):
        g[n] = tanh(g[n] + bias_g[n])
        o[n] = logistic(o[n] + bias_o[n])


@compiled(writes(2), contiguous(1), index, index)
def lstm_gates(a: np.ndarray, bias: np.ndarray, start: int, stop: int) -> None:
    """The gates i, f, g, o of N steps at once, from their pre-activations without bias, (N, 4H), in their place."""
    size = a.shape[1] // 4
    for row in range(start, stop):
        _lstm_row(a[row], bias, size, 0, size)


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


@compiled(*[writes(3)] * 3, *[writes(2)] * 2, writes(3), contiguous(1), *TEAM, *[index] * 5)
def lstm_run(
    a: np.ndarray,
    h: np.ndarray,
    c: np.ndarray,
    h0: np.ndarray,
    c0: np.ndarray,
    rec: np.ndarray,
    bias: np.ndarray,
    weight: np.ndarray,
    own: int,
    meeting: np.ndarray,
    me: int,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """The forward, as `gru_run`'s; ``a``: (T, B, 4H)."""
    size, parts = h.shape[2], weight.shape[0]
    begin, end = join(meeting, me, parts)
    if begin == end:
        return
    for t in range(first, last):
        for part in range(begin, end):
            lo, hi = units_of(part, own, size)
            sums = rec[part]
            if product:
                sums[start:stop] = 0
                add_panels(h[t - 1] if t else h0, weight[part], sums, start, stop)
            for b in range(start, stop):
                i, f, g, o = quarters(a[t, b], size, lo, hi)
                rec_i, rec_f, rec_g, rec_o = quarters(sums[b], hi - lo, 0, hi - lo)
                _add(i, rec_i)
                _add(f, rec_f)
                _add(g, rec_g)
                _add(o, rec_o)
                _lstm_row(a[t, b], bias, size, lo, hi)
                before = c[t - 1, b, lo:hi] if t else c0[b, lo:hi]
                now, new = c[t, b, lo:hi], h[t, b, lo:hi]
                for n in range(hi - lo):
                    memory = f[n] * before[n] + i[n] * g[n]
                    now[n] = memory
                    new[n] = o[n] * tanh(memory)
        if end - begin < parts:
            meet(meeting, me, parts, t - first + 1)


@compiled(
    contiguous(3),
    contiguous(2),
    contiguous(3),
    *[reads(3)] * 2,
    contiguous(3),
    *[writes(2)] * 2,
    writes(3),
    *TEAM,
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
    own: int,
    meeting: np.ndarray,
    me: int,
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
    size, parts = carry_h.shape[1], weight.shape[0]
    one = gates.dtype.type(1)
    begin, end = join(meeting, me, parts)
    if begin == end:
        return
    control = flushed()
    for t in range(last - 1, first - 1, -1):
        for part in range(begin, end):
            lo, hi = units_of(part, own, size)
            for b in range(start, stop):
                old, now = c[t - 1, b, lo:hi] if t else c0[b, lo:hi], c[t, b, lo:hi]
                g_h, g_c = carry_h[b, lo:hi], carry_c[b, lo:hi]
                if len(dh):
                    enter(dh[t, b, lo:hi], g_h)
                if len(dc):
                    enter(dc[t, b, lo:hi], g_c)
                di, df, dg, do = quarters(d[t, b], size, lo, hi)
                if len(sizes):
                    measure(g_h, before[t, b, :size], sizes[b])
                    measure(g_c, before[t, b, size:], sizes[b])
                i, f, g, o = quarters(gates[t, b], size, lo, hi)
                for n in range(hi - lo):
                    exposed = tanh(now[n])
                    gh = g_h[n]
                    gc = g_c[n] + gh * o[n] * (one - exposed * exposed)
                    di[n] = gc * g[n] * i[n] * (one - i[n])
                    df[n] = gc * old[n] * f[n] * (one - f[n])
                    dg[n] = gc * i[n] * (one - g[n] * g[n])
                    do[n] = gh * exposed * o[n] * (one - o[n])
                    g_c[n] = f[n] * gc
                    g_h[n] = 0
        if end - begin < parts:
            meet(meeting, me, parts, last - t)
        if product == EXACT:
            for part in range(begin, end):
                lo, hi = units_of(part, own, size)
                add_panels(d[t], weight[part], carry_h[:, lo:hi], start, stop)
        else:
            add_pulled(d[t], pulled, left, right, low, fresh, carry_h, product, t, start, stop)
    restored(control)
