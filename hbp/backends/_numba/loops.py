"""The loops of the exact adjoints: gates and their derivatives, and the step from one state's cotangent to the last.

All arrays hold the gates side by side on their last axis. A gate's sigmoid is ``(1 + tanh(a / 2)) / 2``; the tanh
itself is the array library's, between two loops.
"""

from __future__ import annotations

import numba
import numpy as np

from hbp.backends._numba.compile import compiled, contiguous, index, reads, writes


@numba.njit(inline="always")
def _add_product(rows, weight, sums, start, stop):  # type: ignore[no-untyped-def]
    """``sums[start:stop] += rows[start:stop] @ weight``, four rows at a time, so that each weight is loaded once."""
    length, width = weight.shape
    full = length - length % 4
    four = stop - (stop - start) % 4
    for b in range(start, four, 4):
        p0, p1, p2, p3 = rows[b], rows[b + 1], rows[b + 2], rows[b + 3]
        g0, g1, g2, g3 = sums[b], sums[b + 1], sums[b + 2], sums[b + 3]
        for j in range(0, full, 4):
            w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
            a00, a01, a02, a03 = p0[j], p0[j + 1], p0[j + 2], p0[j + 3]
            a10, a11, a12, a13 = p1[j], p1[j + 1], p1[j + 2], p1[j + 3]
            a20, a21, a22, a23 = p2[j], p2[j + 1], p2[j + 2], p2[j + 3]
            a30, a31, a32, a33 = p3[j], p3[j + 1], p3[j + 2], p3[j + 3]
            for i in range(width):
                g0[i] += a00 * w0[i] + a01 * w1[i] + a02 * w2[i] + a03 * w3[i]
                g1[i] += a10 * w0[i] + a11 * w1[i] + a12 * w2[i] + a13 * w3[i]
                g2[i] += a20 * w0[i] + a21 * w1[i] + a22 * w2[i] + a23 * w3[i]
                g3[i] += a30 * w0[i] + a31 * w1[i] + a32 * w2[i] + a33 * w3[i]
    for b in range(four, stop):
        p, g = rows[b], sums[b]
        for j in range(0, full, 4):
            w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
            a0, a1, a2, a3 = p[j], p[j + 1], p[j + 2], p[j + 3]
            for i in range(width):
                g[i] += (a0 * w0[i] + a1 * w1[i]) + (a2 * w2[i] + a3 * w3[i])
    for b in range(start, stop):
        for j in range(full, length):
            a, w, g = rows[b, j], weight[j], sums[b]
            for i in range(width):
                g[i] += a * w[i]


@compiled(writes(2), writes(2), reads(1), reads(1), index, index)
def gru_sum(
    inputs: np.ndarray, recurrent: np.ndarray, bias_ih: np.ndarray, bias_hh: np.ndarray, start: int, stop: int
) -> None:
    """Half the pre-activations of r and z, and both parts of n's with their biases, from the projections (N, 3H)."""
    size = inputs.shape[1] // 3
    half = inputs.dtype.type(0.5)
    for row in range(start, stop):
        x, h = inputs[row], recurrent[row]
        for i in range(2 * size):
            x[i] = half * (x[i] + h[i] + bias_ih[i] + bias_hh[i])
        for i in range(2 * size, 3 * size):
            x[i] += bias_ih[i]
            h[i] += bias_hh[i]


@compiled(writes(2), writes(2), index, index)
def gru_candidate(inputs: np.ndarray, recurrent: np.ndarray, start: int, stop: int) -> None:
    """N's pre-activation, ``a + r q``, from the tanh of the half of r's."""
    size = inputs.shape[1] // 3
    half = inputs.dtype.type(0.5)
    for row in range(start, stop):
        r, n, q = inputs[row, :size], inputs[row, 2 * size :], recurrent[row, 2 * size :]
        for i in range(size):
            n[i] += (half * r[i] + half) * q[i]


@compiled(*[writes(3)] * 2, reads(2), *[reads(3)] * 2, writes(2), contiguous(2), *[index] * 5)
def gru_steps(
    inputs: np.ndarray,
    recurrent: np.ndarray,
    h0: np.ndarray,
    h: np.ndarray,
    dh: np.ndarray,
    carry: np.ndarray,
    weight: np.ndarray,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """From tanh'd gates to the cotangents of both pre-activations, in place, for the steps from ``last - 1`` to
    ``first`` and the batch entries from ``start`` on; ``carry`` goes from the cotangent of a step's state to that of
    the state before, which lacks the product with the weights where ``product`` is 0.
    """
    size = carry.shape[1]
    half, one = inputs.dtype.type(0.5), inputs.dtype.type(1)
    for t in range(last - 1, first - 1, -1):
        for b in range(start, stop):
            before = h[t - 1, b] if t else h0[b]
            entering, g = dh[t, b], carry[b]
            r, z, n = inputs[t, b, :size], inputs[t, b, size : 2 * size], inputs[t, b, 2 * size :]
            dr, dz, q = recurrent[t, b, :size], recurrent[t, b, size : 2 * size], recurrent[t, b, 2 * size :]
            for i in range(size):
                gi, ri, zi, ni = g[i] + entering[i], half * r[i] + half, half * z[i] + half, n[i]
                dn = gi * (one - zi) * (one - ni * ni)
                dq = dn * ri
                g[i] = zi * gi
                n[i] = dn
                z[i] = dz[i] = gi * (before[i] - ni) * zi * (one - zi)
                r[i] = dr[i] = dq * q[i] * (one - ri)
                q[i] = dq
        if product:
            _add_product(recurrent[t], weight, carry, start, stop)


@compiled(writes(2), reads(1), reads(1), index, index)
def lstm_sum(a: np.ndarray, bias_ih: np.ndarray, bias_hh: np.ndarray, start: int, stop: int) -> None:
    """Half the pre-activations of i, f and o, and g's, from their projections (N, 4H)."""
    size = a.shape[1] // 4
    half = a.dtype.type(0.5)
    for row in range(start, stop):
        x = a[row]
        for i in range(4 * size):
            x[i] += bias_ih[i] + bias_hh[i]
        for i in range(2 * size):
            x[i] *= half
        for i in range(3 * size, 4 * size):
            x[i] *= half


@compiled(writes(3), reads(2), writes(3), index, index)
def lstm_memory(a: np.ndarray, c0: np.ndarray, c: np.ndarray, start: int, stop: int) -> None:
    """The states c from the tanh'd gates, one step after another."""
    size = c.shape[2]
    half = a.dtype.type(0.5)
    for t in range(a.shape[0]):
        for b in range(start, stop):
            before = c[t - 1, b] if t else c0[b]
            now, i, f, g = c[t, b], a[t, b, :size], a[t, b, size : 2 * size], a[t, b, 2 * size : 3 * size]
            for n in range(size):
                now[n] = (half * f[n] + half) * before[n] + (half * i[n] + half) * g[n]


@compiled(writes(3), reads(2), *[reads(3)] * 4, *[writes(2)] * 2, contiguous(2), *[index] * 5)
def lstm_steps(
    a: np.ndarray,
    c0: np.ndarray,
    c: np.ndarray,
    tanh_c: np.ndarray,
    dh: np.ndarray,
    dc: np.ndarray,
    carry_h: np.ndarray,
    carry_c: np.ndarray,
    weight: np.ndarray,
    product: int,
    first: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """The same as `gru_steps`, from tanh'd gates to the cotangents of their pre-activations."""
    size = carry_h.shape[1]
    half, one = a.dtype.type(0.5), a.dtype.type(1)
    for t in range(last - 1, first - 1, -1):
        for b in range(start, stop):
            before = c[t - 1, b] if t else c0[b]
            tanh, entering_h, entering_c, g_h, g_c = tanh_c[t, b], dh[t, b], dc[t, b], carry_h[b], carry_c[b]
            gates = a[t, b]
            i, f, g, o = gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size], gates[3 * size :]
            for n in range(size):
                i_n, f_n, g_n, o_n = half * i[n] + half, half * f[n] + half, g[n], half * o[n] + half
                gh = g_h[n] + entering_h[n]
                gc = g_c[n] + entering_c[n] + gh * o_n * (one - tanh[n] * tanh[n])
                i[n] = gc * g_n * i_n * (one - i_n)
                f[n] = gc * before[n] * f_n * (one - f_n)
                g[n] = gc * i_n * (one - g_n * g_n)
                o[n] = gh * tanh[n] * o_n * (one - o_n)
                g_c[n] = f_n * gc
                g_h[n] = 0
        if product:
            _add_product(a[t], weight, carry_h, start, stop)
