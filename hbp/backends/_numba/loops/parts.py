"""What the loops of both cells are made of."""

from __future__ import annotations

import numba

from hbp.backends._numba.compile import contiguous, counters, index, writes
from hbp.backends._numba.functions import OPTIONS
from hbp.backends._numba.rows import contiguous_row
from hbp.backends._numba.tiles import add_product

APART, EXACT, ROUND = 0, 1, 2
"""Where the product with the weights comes from: it is added between calls, or here, or taken from the round before."""

LOW = contiguous(2), contiguous(2), writes(3), writes(2)
"""``left, right, low`` and as much room as for one step of the latter."""


TEAM = contiguous(4), index, counters, index
"""``weight, own, meeting, me``: see `hbp.backends._numba.loops`."""


@numba.njit(**OPTIONS)
def units_of(part, own, size):  # type: ignore[no-untyped-def]
    """The first unit of a part, and the one behind its last."""
    return part * own, min((part + 1) * own, size)


@numba.njit(**OPTIONS)
def quarters(row, size, lo, hi):  # type: ignore[no-untyped-def]
    """Of a row of four gates' numbers, of ``size`` units each, those of some units."""
    return (
        row[lo:hi],
        row[size + lo : size + hi],
        row[2 * size + lo : 2 * size + hi],
        row[3 * size + lo : 3 * size + hi],
    )


@numba.njit(**OPTIONS)
def add_pulled(d, pulled, left, right, low, fresh, carry, product, t, start, stop):  # type: ignore[no-untyped-def]
    """Add to ``carry`` what ``d``, step t's, gave the state before through the weights a round ago, and what the
    directions give it more now.
    """
    if product == ROUND:
        for b in range(start, stop):
            for i in range(carry.shape[1]):
                carry[b, i] += pulled[t, b, i]
    if left.shape[1]:
        add_directions(d, left, right, low[t], fresh, carry, start, stop)


@numba.njit(**OPTIONS)
def add_directions(d, left, right, low, fresh, carry, start, stop):  # type: ignore[no-untyped-def]
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
def enter(entering, carry):  # type: ignore[no-untyped-def]
    """``carry += entering``, a row in any layout."""
    if entering.strides[0] == entering.itemsize:
        row = contiguous_row(entering)
        for i in range(carry.shape[0]):
            carry[i] += row[i]
    else:
        for i in range(carry.shape[0]):
            carry[i] += entering[i]


@numba.njit(forceinline=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def measure(carry, before, sizes):  # type: ignore[no-untyped-def]
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
