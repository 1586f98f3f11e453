"""The loops of the GRU and the LSTM: forward, gates alone, and the way back from one state's cotangent to the last.

All arrays hold the gates side by side on their last axis. The way back is exact where each step adds its product with
the weights, a round of Highway-BP where what was pulled back before is added instead (`EXACT`, `ROUND`). In a round
strong directions of the weights are part of the residual path: ``left``, (N, r), ``right``, (r, H), with ``low``,
(T, B, r), the last round's ``d left``, which what was pulled back holds as well; r = 0 where there are none. A round
may also measure what it changes: from ``before``, the last round's cotangents of the states, it adds to ``sizes``,
(B, 3), behind a factor, the sums of squares of change and whole times that factor; (0, 3) where nobody asks.

Numba compiles these anew when this file has changed, not when `functions`, `rows` or `tiles` alone has, whose code is
compiled into them: who works on those deletes the cached code (``__pycache__/*.nb?``).
"""

from __future__ import annotations

import numba
import numpy as np

from hbp.backends._numba.compile import compiled, contiguous, doubles, index, reads, writes
from hbp.backends._numba.functions import OPTIONS, logistic, tanh
from hbp.backends._numba.rows import contiguous_row
from hbp.backends._numba.tiles import add_panels, add_product

APART, EXACT, ROUND = 0, 1, 2
"""Where the product with the weights comes from: it is added between calls, or here, or taken from the round before."""


@numba.njit(**OPTIONS)
def _quarters(row, size):  # type: ignore[no-untyped-def]
    """A row of four gates' numbers as four."""
    return row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size : 4 * size]


@numba.njit(**OPTIONS)
def _add_directions(d, left, right, low, fresh, carry, start, stop):  # type: ignore[no-untyped-def]
    """``carry += (d left - low) right``, with ``d left`` in the place of ``low``."""
    fresh[start:stop] = 0
    add_product(d, left, fresh, start, stop)
    for b in range(start, stop):
        for j in range(left.shape[1]):
            new = fresh[b, j]
            fresh[b, j] = new - low[b, j]
            low[b, j] = new
    add_product(fresh, right, carry, start, stop)


@numba.njit(**OPTIONS)
def _enter(entering, carry):  # type: ignore[no-untyped-def]
    """``carry += entering``, a row in any layout."""
    if entering.strides[0] == entering.itemsize:
        row = contiguous_row(entering)
        for i in range(carry.shape[0]):
            carry[i] += row[i]
    else:
        for i in range(carry.shape[0]):
            carry[i] += entering[i]


@numba.njit(forceinline=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _measure(carry, before, sizes):  # type: ignore[no-untyped-def]
    """Add one state's part to the sums, of numbers that neither overflow nor vanish squared."""
    factor, change, whole = sizes[0], 0.0, 0.0
    for i in range(carry.shape[0]):
        g = carry[i]
        new, old = factor * g, factor * before[i]
        change += (new - old) * (new - old)
        whole += new * new
        before[i] = g
    sizes[1] += change
    sizes[2] += whole


@numba.njit(**OPTIONS)
def _gru_row(a, rec, bias, q, size):  # type: ignore[no-untyped-def]
    """From projections of input and state to r, z, n in ``a``, and the candidate's recurrent part in ``q``."""
    for i in range(2 * size):
        a[i] = logistic(a[i] + rec[i] + bias[i])
    r, n, own, shared, inputs = a[:size], a[2 * size :], rec[2 * size :], bias[2 * size : 3 * size], bias[3 * size :]
    for i in range(size):
        q[i] = own[i] + shared[i]
        n[i] = tanh(n[i] + inputs[i] + r[i] * q[i])


@compiled(writes(2), contiguous(2), contiguous(1), writes(2), index, index)
def gru_gates(a: np.ndarray, rec: np.ndarray, bias: np.ndarray, q: np.ndarray, start: int, stop: int) -> None:
    """The gates of N steps at once, from the projections of their inputs and states, (N, 3H); ``bias``: (4H,)."""
    for row in range(start, stop):
        _gru_row(a[row], rec[row], bias, q[row], q.shape[1])


@compiled(*[writes(3)] * 3, writes(2), writes(2), contiguous(3), contiguous(1), *[index] * 6)
def gru_run(
    a: np.ndarray,
    q: np.ndarray,
    h: np.ndarray,
    h0: np.ndarray,
    rec: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    kept: int,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """The forward: states and gates of the steps from ``first`` up to ``last``, of the batch entries from ``start`` on.

    ``a``: the inputs' projections, (T, B, 3H), in whose place the gates r, z, n come; ``q``: (T, B, H), or (1, B, H)
    where it is not ``kept``; ``rec``: (B, 3H), the product of the states before with ``weight``, (H, 3H) in `panels`,
    if not computed here.
    """
    size = h.shape[2]
    for t in range(first, last):
        before = h[t - 1] if t else h0
        if product:
            rec[start:stop] = 0
            add_panels(before, weight, rec, start, stop)
        for b in range(start, stop):
            gates, old, new = a[t, b], before[b], h[t, b]
            _gru_row(gates, rec[b], bias, q[t * kept, b], size)
            z, n = gates[size : 2 * size], gates[2 * size :]
            for i in range(size):
                new[i] = n[i] + z[i] * (old[i] - n[i])


LOW = contiguous(2), contiguous(2), writes(3), writes(2)
"""``left, right, low`` and as much room as for one step of the latter."""


@compiled(
    *[contiguous(3)] * 2,
    contiguous(2),
    contiguous(3),
    reads(3),
    contiguous(3),
    writes(2),
    writes(3),
    contiguous(3),
    *LOW,
    writes(3),
    doubles,
    *[index] * 5,
)
def gru_steps(
    gates: np.ndarray,
    q: np.ndarray,
    h0: np.ndarray,
    h: np.ndarray,
    dh: np.ndarray,
    pulled: np.ndarray,
    carry: np.ndarray,
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
    """The cotangents ``d`` of the pre-activations n, r, z and the candidate's recurrent part, (T, B, 4H), for the steps
    from ``last - 1`` to ``first`` and the batch entries from ``start`` on; the last three are those of the product with
    the recurrent weights. ``carry`` goes from the cotangent of a step's state to that of the state before.
    """
    size = carry.shape[1]
    one = gates.dtype.type(1)
    for t in range(last - 1, first - 1, -1):
        for b in range(start, stop):
            old = h[t - 1, b] if t else h0[b]
            g = carry[b]
            _enter(dh[t, b], g)
            if len(sizes):
                _measure(g, before[t, b], sizes[b])
            r, z, n = gates[t, b, :size], gates[t, b, size : 2 * size], gates[t, b, 2 * size :]
            dn, dr, dz, dq = _quarters(d[t, b], size)
            candidate = q[t, b]
            for i in range(size):
                gi = g[i]
                dni = gi * (one - z[i]) * (one - n[i] * n[i])
                dqi = dni * r[i]
                g[i] = z[i] * gi
                dn[i] = dni
                dr[i] = dqi * candidate[i] * (one - r[i])
                dz[i] = gi * (old[i] - n[i]) * z[i] * (one - z[i])
                dq[i] = dqi
        if product == EXACT:
            add_panels(d[t, :, size:], weight, carry, start, stop)
        elif product == ROUND:
            for b in range(start, stop):
                for i in range(size):
                    carry[b, i] += pulled[t, b, i]
        if left.shape[1]:
            _add_directions(d[t, :, size:], left, right, low[t], fresh, carry, start, stop)


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
            i, f, g, o = _quarters(gates, size)
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
                _enter(dh[t, b], g_h)
            if len(dc):
                _enter(dc[t, b], g_c)
            di, df, dg, do = _quarters(d[t, b], size)
            if len(sizes):
                _measure(g_h, before[t, b, :size], sizes[b])
                _measure(g_c, before[t, b, size:], sizes[b])
            i, f, g, o = _quarters(gates[t, b], size)
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
        if product == EXACT:
            add_panels(d[t], weight, carry_h, start, stop)
        elif product == ROUND:
            for b in range(start, stop):
                for n in range(size):
                    carry_h[b, n] = pulled[t, b, n]
        if left.shape[1]:
            _add_directions(d[t], left, right, low[t], fresh, carry_h, start, stop)
