"""Threads that go through the steps together: each has its units, and reads what all found at the step before.

So each reads its own columns of the recurrent weights alone, which stay in its core's cache where all do not fit. They
meet at every step by counters that each writes and the others watch. No thread waits for one that may never come: until
all are there nothing is begun, and where one does not come in time, another goes through all units alone.
"""

# ruff: noqa: ARG001 - parameters that Numba wants there
from __future__ import annotations

import os
import sys
import time
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from hbp.backends._numba.subnormals import X86, called

POSIX = os.name == "posix" and sys.maxsize > 1 << 32
"""Whether the system has ``sched_yield`` and a ``clock_gettime`` of two 64-bit numbers; else no threads go together."""
CLOCK = getattr(time, "CLOCK_MONOTONIC", 0)

LINE = 16
"""Counters from one thread's to the next one's, so that no two share what a core fetches at once: 128 bytes."""
LOOKS = 100
"""At a counter, before the system may let others run: a meeting of threads that all run takes fewer."""
PATIENCE = 1_000_000
"""Nanoseconds in which threads that are free come."""
CLOSED = -(1 << 40)
"""What the number of threads that came turns into where the others are not waited for."""


def meeting(parts: int) -> np.ndarray:
    """The counters of so many threads, behind the number of those that came; none where one goes alone."""
    return np.zeros((0 if parts == 1 else LINE * (1 + parts)), np.int64)


def _address(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Where the counter of an index lies."""
    return builder.gep(make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])


@intrinsic
def _seen(typing, counters, i):  # type: ignore[no-untyped-def]
    """A counter, and whatever its thread had stored before it was."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_address(context, builder, signature, arguments), "acquire", 8)

    return types.int64(counters, i), build


@intrinsic
def _show(typing, counters, i, value):  # type: ignore[no-untyped-def]
    """Set a counter, behind all that was stored before."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store_atomic(arguments[2], _address(context, builder, signature, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(counters, i, types.int64), build


@intrinsic
def _come(typing, counters, i):  # type: ignore[no-untyped-def]
    """Count one more."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = _address(context, builder, signature, arguments)
        builder.atomic_rmw("add", place, ir.IntType(64)(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(counters, i), build


@intrinsic
def _exchange(typing, counters, i, old, new):  # type: ignore[no-untyped-def]
    """Set a counter if it still is ``old``; returns whether it was."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = _address(context, builder, signature, arguments)
        found = builder.cmpxchg(place, *arguments[2:], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(counters, i, types.int64, types.int64), build


@intrinsic
def _pause(typing):  # type: ignore[no-untyped-def]
    """The shortest rest that x86 processors know."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if X86:
            called(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _let_others_run(typing):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if POSIX:
            called(builder, ir.IntType(32), "sched_yield")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def _nanoseconds(typing):  # type: ignore[no-untyped-def]
    """On a clock that goes on."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        whole = ir.IntType(64)
        if not POSIX:
            return whole(0)
        found = cgutils.alloca_once(builder, ir.ArrayType(whole, 2))
        place = builder.bitcast(found, whole.as_pointer())
        called(builder, ir.IntType(32), "clock_gettime", ir.IntType(32)(CLOCK), place)
        seconds, rest = (builder.extract_value(builder.load(found), n) for n in range(2))
        return builder.add(builder.mul(seconds, whole(1_000_000_000)), rest)

    return types.int64(), build


@numba.njit(inline="always")
def _wait(looks):  # type: ignore[no-untyped-def]
    """Between two looks at a counter; returns their number."""
    if looks < LOOKS:
        _pause()
    else:
        _let_others_run()
    return looks + 1


@numba.njit
def join(counters, me, parts):  # type: ignore[no-untyped-def]
    """Which parts thread ``me`` goes through, from the first up to the last: its own when all have come; all where they
    did not come in time; none where another goes through all.
    """
    if len(counters) == 0:
        return 0, parts
    _come(counters, 0)
    looks, start = 0, _nanoseconds()
    while True:
        came = _seen(counters, 0)
        if came == parts:
            return me, me + 1
        if came < 0:
            return 0, 0
        if looks > LOOKS and _nanoseconds() - start > PATIENCE and _exchange(counters, 0, came, CLOSED):
            return 0, parts
        looks = _wait(looks)


@numba.njit(inline="always")
def meet(counters, me, parts, turn):  # type: ignore[no-untyped-def]
    """Go on when all have come to their ``turn``-th meeting, from 1 on."""
    _show(counters, LINE * (1 + me), turn)
    for other in range(parts):
        looks = 0
        while _seen(counters, LINE * (1 + other)) < turn:
            looks = _wait(looks)
