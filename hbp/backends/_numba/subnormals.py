"""Numbers below the smallest normal one, 1.2e-38 in float32, taken as zero: a core takes up to a hundred times as long
for them, and cotangents pass through all of them where gates forget and the last step alone has a loss.

On x86, per thread, until it is set back; other processors are left as they are.
"""

# ruff: noqa: ARG001 - parameters that Numba wants there
from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

X86 = platform.machine() in ("x86_64", "AMD64")
ZERO = 0x8040
"""The bits of the control register by which results, and operands, below the smallest normal number are zero."""
_WORD = ir.IntType(32)


def _call(builder: Any, name: str, word: Any) -> None:
    """Load the control register from a word, or store it there."""
    address = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [address]), f"llvm.x86.sse.{name}"
    )
    builder.call(function, [builder.bitcast(word, address)])


@intrinsic
def flushed(typing):  # type: ignore[no-untyped-def]
    """From here on such numbers are zero in this thread; returns what `restored` takes."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not X86:
            return _WORD(0)
        word = cgutils.alloca_once(builder, _WORD)
        _call(builder, "stmxcsr", word)
        before = builder.load(word)
        builder.store(builder.or_(before, _WORD(ZERO)), word)
        _call(builder, "ldmxcsr", word)
        return before

    return types.uint32(), build


@intrinsic
def restored(typing, before):  # type: ignore[no-untyped-def]
    """From here on they are again what they were."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if X86:
            word = cgutils.alloca_once(builder, _WORD)
            builder.store(arguments[0], word)
            _call(builder, "ldmxcsr", word)
        return context.get_dummy_value()

    return types.void(types.uint32), build
