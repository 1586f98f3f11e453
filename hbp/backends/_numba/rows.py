"""Rows of arrays as vector instructions want them, and stores that leave the caches alone."""

# ruff: noqa: ARG001, ARG005 - parameters that Numba wants there
from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

VECTOR = 32
"""Bytes of one streaming store; its address is a multiple."""


@intrinsic
def contiguous_row(typing, row):  # type: ignore[no-untyped-def]
    """The same row, of a type that promises unit strides: from byte strides LLVM cannot tell, and loads one by one."""
    kind = row.copy(layout="C")
    return kind(row), lambda context, builder, signature, arguments: impl_ret_borrowed(
        context, builder, kind, arguments[0]
    )


@numba.njit(inline="always")
def packed(row, room):  # type: ignore[no-untyped-def]
    """The numbers of a row in any layout, contiguous: the row itself, or ``room``, where they are copied to."""
    if row.strides[0] == row.itemsize:
        found = contiguous_row(row)
    else:
        for n in range(len(row)):
            room[n] = row[n]
        found = contiguous_row(room[: len(row)])
    return found


@intrinsic
def _store(typing, target, source, n):  # type: ignore[no-untyped-def]
    """A vector of ``source`` from its n-th number on to ``target``, non-temporally; both are contiguous."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number = context.get_data_type(target.dtype)
        vector = ir.VectorType(number, VECTOR * 8 // target.dtype.bitwidth).as_pointer()
        there, here = (
            builder.bitcast(builder.gep(make_array(kind)(context, builder, array).data, arguments[2:]), vector)
            for kind, array in zip(signature.args, arguments[:2], strict=False)
        )
        stored = builder.store(builder.load(here, align=target.dtype.bitwidth // 8), there, align=VECTOR)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        stored.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(target, source, n), build


@intrinsic
def published(typing):  # type: ignore[no-untyped-def]
    """What was streamed before is seen by all threads before what is stored from here on."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@numba.njit(forceinline=True, error_model="numpy")
def stream(source, target):  # type: ignore[no-untyped-def]
    """``target[...] = source`` past the caches, both contiguous: an ordinary store first reads the line that it
    overwrites. `published` ends such stores.
    """
    size, step = len(source), VECTOR // target.itemsize
    head = min(-target.ctypes.data % VECTOR // target.itemsize, size)
    tail = size - (size - head) % step
    for n in range(head):
        target[n] = source[n]
    for n in range(head, tail, step):
        _store(target, source, n)
    for n in range(tail, size):
        target[n] = source[n]
