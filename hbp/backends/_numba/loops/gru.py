"""The loops of the GRU."""

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
def _gru_row(a, rec, bias, q, lo, hi):  # type: ignore[no-untyped-def]
    """From projections of input and state to r, z, n in ``a``, and the candidate's recurrent part in ``q``, of the
    units from ``lo`` up to ``hi``; ``rec`` has no others.
    """
    size, own = q.shape[0], hi - lo
    r, z, n = a[lo:hi], a[size + lo : size + hi], a[2 * size + lo : 2 * size + hi]
    bias_r, bias_z, shared, inputs = quarters(bias, size, lo, hi)
    rec_r, rec_z, rec_q, candidate = rec[:own], rec[own : 2 * own], rec[2 * own : 3 * own], q[lo:hi]
    for i in range(own):
        r[i] = logistic(r[i] + rec_r[i] + bias_r[i])
    for i in range(own):
        z[i] = logistic(z[i] + rec_z[i] + bias_z[i])
    for i in range(own):
        candidate[i] = rec_q[i] + shared[i]
        n[i] = tanh(n[i] + inputs[i] + r[i] * candidate[i])


@compiled(writes(2), contiguous(2), contiguous(1), writes(2), index, index)
def gru_gates(a: np.ndarray, rec: np.ndarray, bias: np.ndarray, q: np.ndarray, start: int, stop: int) -> None:
    """The gates of N steps at once, from the projections of their inputs and states, (N, 3H); ``bias``: (4H,)."""
    for row in range(start, stop):
        _gru_row(a[row], rec[row], bias, q[row], 0, q.shape[1])


@compiled(*[writes(3)] * 3, writes(2), writes(3), contiguous(1), index, *TEAM, *[index] * 5)
def gru_run(
    a: np.ndarray,
    q: np.ndarray,
    h: np.ndarray,
    h0: np.ndarray,
    rec: np.ndarray,
    bias: np.ndarray,
    kept: int,
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
    """The forward: states and gates of the steps from ``first`` up to ``last``, of the batch entries from ``start`` on.

    ``a``: the inputs' projections, (T, B, 3H), in whose place the gates r, z, n come; ``q``: (T, B, H), or (1, B, H)
    where it is not ``kept``; ``rec``: (parts, B, 3 own), the product of the states before with the weights, (H, 3H),
    if not computed here.
    """
    size, parts = h.shape[2], weight.shape[0]
    begin, end = join(meeting, me, parts)
    if begin == end:
        return
    for t in range(first, last):
        before = h[t - 1] if t else h0
        for part in range(begin, end):
            lo, hi = units_of(part, own, size)
            sums = rec[part]
            if product:
                sums[start:stop] = 0
                add_panels(before, weight[part], sums, start, stop)
            for b in range(start, stop):
                gates, old, new = a[t, b], before[b, lo:hi], h[t, b, lo:hi]
                _gru_row(gates, sums[b], bias, q[t * kept, b], lo, hi)
                z, n = gates[size + lo : size + hi], gates[2 * size + lo : 2 * size + hi]
                for i in range(hi - lo):
                    new[i] = n[i] + z[i] * (old[i] - n[i])
        if end - begin < parts:
            meet(meeting, me, parts, t - first + 1)


@compiled(
    *[contiguous(3)] * 2,
    contiguous(2),
    contiguous(3),
    reads(3),
    contiguous(3),
    writes(2),
    writes(3),
    *TEAM,
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
    """The cotangents ``d`` of the pre-activations n, r, z and the candidate's recurrent part, (T, B, 4H), for the steps
    from ``last - 1`` to ``first`` and the batch entries from ``start`` on; the last three are those of the product with
    the recurrent weights. ``carry`` goes from the cotangent of a step's state to that of the state before.
    """
    size, parts = carry.shape[1], weight.shape[0]
    one = gates.dtype.type(1)
    begin, end = join(meeting, me, parts)
    if begin == end:
        return
    control = flushed()
    for t in range(last - 1, first - 1, -1):
        for part in range(begin, end):
            lo, hi = units_of(part, own, size)
            for b in range(start, stop):
                old = h[t - 1, b, lo:hi] if t else h0[b, lo:hi]
                g = carry[b, lo:hi]
                enter(dh[t, b, lo:hi], g)
                if len(sizes):
                    measure(g, before[t, b], sizes[b])
                values = gates[t, b]
                r, z, n = values[lo:hi], values[size + lo : size + hi], values[2 * size + lo : 2 * size + hi]
                dn, dr, dz, dq = quarters(d[t, b], size, lo, hi)
                candidate = q[t, b, lo:hi]
                for i in range(hi - lo):
                    gi = g[i]
                    dni = gi * (one - z[i]) * (one - n[i] * n[i])
                    dqi = dni * r[i]
                    g[i] = z[i] * gi
                    dn[i] = dni
                    dr[i] = dqi * candidate[i] * (one - r[i])
                    dz[i] = gi * (old[i] - n[i]) * z[i] * (one - z[i])
                    dq[i] = dqi
        if end - begin < parts:
            meet(meeting, me, parts, last - t)
        if product == EXACT:
            for part in range(begin, end):
                lo, hi = units_of(part, own, size)
                add_panels(d[t, :, size:], weight[part], carry[:, lo:hi], start, stop)
        else:
            add_pulled(d[t, :, size:], pulled, left, right, low, fresh, carry, product, t, start, stop)
    restored(control)
