"""Small matrix products with sums that stay in vector registers.

A tile of the sums, some rows by some vectors, is loaded once, gets all its products, and is stored once. A loop over
columns that LLVM vectorises itself loads and stores the sums again and again, and was 1.1 to 2.5 times slower. A tile
and what it multiplies fill the registers and no more: sixteen of 32 bytes, or, with AVX-512, thirty-two of 64; sums
that went through memory took twice the time.
"""

# ruff: noqa: ARG001 - parameters that Numba wants there
from __future__ import annotations

from itertools import product
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hbp.backends._tuning import vector_bytes

BYTES = vector_bytes()
"""Of a vector."""

PANEL = 256
"""Bytes of a row of a panel (`hbp.backends._numba.products.panels`)."""

WIDEST = {4: 2, 2: 4, 1: PANEL // BYTES}
"""The vectors of a tile of so many rows."""


def _tile(height: int, width: int) -> Any:
    """An intrinsic: ``sums[b : b + height, i : i + width * V] += rows[b : b + height] @ weight[:, the same columns]``.

    V numbers make a vector. The last axes are contiguous; nothing is checked.
    """

    @intrinsic
    def add(typing, rows, weight, sums, b, i):  # type: ignore[no-untyped-def]
        return types.void(rows, weight, sums, b, i), lambda *given: _generate(height, width, *given)

    return add


def _generate(height: int, width: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The code of a tile: a loop over the weights' rows, whose phis are the sums."""
    number, size = context.get_value_type(signature.args[0].dtype), signature.args[0].dtype.bitwidth // 8
    arrays = [
        context.make_array(kind)(context, builder, value=value)
        for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
    ]
    b, i = arguments[3:]
    vector, places = ir.VectorType(number, BYTES // size), list(product(range(height), range(width)))

    def row(array: Any, index: Any) -> Any:
        """The address of a row."""
        start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        return builder.gep(start, [builder.mul(builder.extract_value(array.strides, 0), index)])

    def at(address: Any, index: Any, kind: Any) -> Any:
        """The address of a number in a row, as that of some kind of value."""
        return builder.bitcast(builder.gep(address, [builder.mul(index, i.type(size))]), kind.as_pointer())

    def vectors(array: Any, index: Any) -> list[Any]:
        start = row(array, index)
        return [at(start, builder.add(i, i.type(n * BYTES // size)), vector) for n in range(width)]

    rows, weight, sums = arrays
    inputs = [row(rows, builder.add(b, i.type(r))) for r in range(height)]
    outputs = [place for r in range(height) for place in vectors(sums, builder.add(b, i.type(r)))]
    before = [builder.load(place, align=size) for place in outputs]
    length, entry = builder.extract_value(weight.shape, 0), builder.block
    body, after = builder.append_basic_block("tile"), builder.append_basic_block("tiled")
    builder.cbranch(builder.icmp_signed(">", length, i.type(0)), body, after)
    builder.position_at_end(body)
    j, *running = (builder.phi(kind) for kind in (i.type, *[vector] * len(places)))
    loaded = [builder.load(place, align=size) for place in vectors(weight, j)]
    factors = [_spread(builder, builder.load(at(start, j, number)), vector) for start in inputs]
    added = [
        builder.fadd(total, builder.fmul(factors[r], loaded[c], flags=("contract",)), flags=("contract",))
        for total, (r, c) in zip(running, places, strict=True)
    ]
    following = builder.add(j, i.type(1))
    for phi, first, next_one in zip((j, *running), (i.type(0), *before), (following, *added), strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(next_one, body)
    builder.cbranch(builder.icmp_signed("<", following, length), body, after)
    builder.position_at_end(after)
    found = [builder.phi(vector) for _ in places]
    for phi, first, last in zip(found, before, added, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(last, body)
    for total, place in zip(found, outputs, strict=True):
        builder.store(total, place, align=size)
    return context.get_dummy_value()


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of one number again and again."""
    empty, first = ir.Constant(vector, ir.Undefined), ir.IntType(32)(0)
    alone = builder.insert_element(empty, number, first)
    return builder.shuffle_vector(alone, empty, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


_four_wide, _two_wide, _one_wide = (_tile(height, width) for height, width in WIDEST.items())
_four, _two, _one = _tile(4, 1), _tile(2, 1), _tile(1, 1)
WIDE_FOUR, WIDE_TWO, WIDE_ONE = WIDEST.values()


@numba.njit(inline="always")
def add_product(rows, weight, sums, start, stop):  # type: ignore[no-untyped-def]
    """``sums[start:stop] += rows[start:stop] @ weight``, of float32 or float64, rows and columns contiguous; columns of
    the weight beyond those of the sums count for nothing.
    """
    lanes, width = BYTES // sums.itemsize, sums.shape[1]
    full = width - width % lanes
    four = stop - (stop - start) % 4
    two = stop - (stop - start) % 2
    wide = width - width % (WIDE_FOUR * lanes)
    for b in range(start, four, 4):
        for i in range(0, wide, WIDE_FOUR * lanes):
            _four_wide(rows, weight, sums, b, i)
        for i in range(wide, full, lanes):
            _four(rows, weight, sums, b, i)
    wide = width - width % (WIDE_TWO * lanes)
    for b in range(four, two, 2):
        for i in range(0, wide, WIDE_TWO * lanes):
            _two_wide(rows, weight, sums, b, i)
        for i in range(wide, full, lanes):
            _two(rows, weight, sums, b, i)
    wide = width - width % (WIDE_ONE * lanes)
    for b in range(two, stop):
        for i in range(0, wide, WIDE_ONE * lanes):
            _one_wide(rows, weight, sums, b, i)
        for i in range(wide, full, lanes):
            _one(rows, weight, sums, b, i)
    for b in range(start, stop):
        for j in range(weight.shape[0]):
            a, w, g = rows[b, j], weight[j], sums[b]
            for i in range(full, width):
                g[i] += a * w[i]


@numba.njit(inline="always")
def add_panels(rows, weight, sums, start, stop):  # type: ignore[no-untyped-def]
    """`add_product` with a weight in panels."""
    most = PANEL // sums.itemsize
    for p in range(weight.shape[0]):
        add_product(rows, weight[p], sums[:, p * most : (p + 1) * most], start, stop)
