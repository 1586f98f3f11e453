"""The loops of the GRU."""

from __future__ import annotations

import numba
import numpy as np

from hbp.backends._numba.compile import compiled, contiguous, doubles, index, reads, writes
from hbp.backends._numba.functions import OPTIONS, logistic, tanh
from hbp.backends._numba.loops.parts import LOW, add_pulled, enter, measure, quarters
from hbp.backends._numba.tiles import add_panels


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
            enter(dh[t, b], g)
            if len(sizes):
                measure(g, before[t, b], sizes[b])
            r, z, n = gates[t, b, :size], gates[t, b, size : 2 * size], gates[t, b, 2 * size :]
            dn, dr, dz, dq = quarters(d[t, b], size)
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
        add_pulled(d[t, :, size:], weight, pulled, left, right, low, fresh, carry, product, t, start, stop)
