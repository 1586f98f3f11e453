"""Numbers below the smallest normal one, 1.2e-38 in float32, taken as zero: a core takes up to a hundred times as long
for them, and cotangents pass through all of them where gates forget and the last step alone has a loss.

On x86, per thread, until it is set back; other processors are left as they are. LLVM does not know of this register:
what is computed in between are loops over arrays, whose loads and stores it does not move across such calls.
"""

# ruff: noqa: ARG001 - parameters that Numba wants there
from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLUSH = 0x8040
"""The bits of the control register by which results, and operands, below the smallest normal number are zero."""
WORD = ir.IntType(32)


def called(builder: Any, result: Any, name: str, *arguments: Any) -> None:
    """Call a function of the system, or of the compiler, by its name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _control(builder: Any, name: str, word: Any) -> None:
    """Load the control register from a word, or store it there."""
    called(builder, ir.VoidType(), f"llvm.x86.sse.{name}", builder.bitcast(word, ir.IntType(8).as_pointer()))


@intrinsic
def flushed(typing):  # type: ignore[no-untyped-def]
    """From here on such numbers are zero in this thread; returns what `restored` takes."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not X86:
            return WORD(0)
        word = cgutils.alloca_once(builder, WORD)
        _control(builder, "stmxcsr", word)
        before = builder.load(word)
        builder.store(builder.or_(before, WORD(FLUSH)), word)
        _control(builder, "ldmxcsr", word)
        return before

    return types.uint32(), build


@intrinsic
def restored(typing, before):  # type: ignore[no-untyped-def]
    """Put the control register back as it was."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if X86:
            word = cgutils.alloca_once(builder, WORD)
            builder.store(arguments[0], word)
            _control(builder, "ldmxcsr", word)
        return context.get_dummy_value()

    return types.void(types.uint32), build
