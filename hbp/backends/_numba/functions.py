"""Branch-free tanh and logistic function, which LLVM turns into vector instructions.

Relatively to their values off by less than 3e-7 in float32 and 5e-16 in float64, where these are no subnormal numbers;
NaN stays NaN. What a gate loses that is not quite open, or lets through that is not quite shut, adds up over the steps;
so the logistic function is 1 where 1 is the nearest number. It is 0 only where the libraries' is, below -104 (float64:
-745), and from -87 (-708) to there what it is at -87.
"""

# ruff: noqa: ARG001 - parameters that Numba wants there
from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

OPTIONS = {"forceinline": True, "fastmath": {"contract"}, "error_model": "numpy"}
ROUNDER = 1.5 * 2.0**52
"""Added to a small float64, it leaves its nearest integer in the lowest bits; in float32 it is `ROUNDER_SINGLE`."""
ROUNDER_SINGLE = 1.5 * 2.0**23
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""ln 2 in two parts, of which a small integer times the first is exact."""
LN2_HIGH_SINGLE, LN2_LOW_SINGLE = 0.693359375, -2.12194440e-4


@intrinsic
def _power(typing, shifted):  # type: ignore[no-untyped-def]
    """``2^-n`` of the integer n in the lowest bits of a number shifted by its rounder."""
    width, mantissa, bias = (64, 52, 1023) if shifted == types.float64 else (32, 23, 127)
    whole = ir.IntType(width)

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        n = builder.shl(builder.bitcast(arguments[0], whole), whole(mantissa))
        return builder.bitcast(builder.sub(whole(bias << mantissa), n), arguments[0].type)

    return shifted(shifted), build


@numba.njit(**OPTIONS)
def _decay_single(y):  # type: ignore[no-untyped-def]
    """``2^-n`` and ``exp(r) - 1`` with ``exp(-y) = 2^-n exp(r)``, ``|r| <= ln(2) / 2``, for y from 0 on."""
    f = np.float32
    given, y = y, f(87) if y > f(87) else y
    shifted = y * f(1.44269504088896341) + f(ROUNDER_SINGLE)
    n = shifted - f(ROUNDER_SINGLE)
    r = (n * f(LN2_HIGH_SINGLE) - y) + n * f(LN2_LOW_SINGLE)
    p = f(1.0 / 5040.0)
    p = p * r + f(1.0 / 720.0)
    p = p * r + f(1.0 / 120.0)
    p = p * r + f(1.0 / 24.0)
    p = p * r + f(1.0 / 6.0)
    p = p * r + f(0.5)
    p = p * r + f(1.0)
    return f(0) if given > f(104) else _power(shifted), p * r


@numba.njit(**OPTIONS)
def _decay_double(y):  # type: ignore[no-untyped-def]
    """The same by more terms of the Taylor series."""
    given, y = y, 708.0 if y > 708.0 else y
    shifted = y * 1.4426950408889634 + ROUNDER
    n = shifted - ROUNDER
    r = (n * LN2_HIGH - y) + n * LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    return 0.0 if given > 745.0 else _power(shifted), p * r


def _of(x: Any) -> tuple[Any, Any, Any]:
    """The decay for numbers of a type, and its 1 and 2."""
    kind, decay = (np.float32, _decay_single) if x == types.float32 else (np.float64, _decay_double)
    return decay, kind(1), kind(2)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, ``-u / (2 + u)`` with ``u = exp(-2 |x|) - 1``."""
    raise NotImplementedError("compiled code only")


@overload(tanh, jit_options=OPTIONS)
def _(x):  # type: ignore[no-untyped-def]
    decay, one, two = _of(x)

    def run(x):  # type: ignore[no-untyped-def]
        power, rest = decay(two * abs(x))
        u = power * rest + (power - one)
        return math.copysign(u / (two + u), x)

    return run


def logistic(x: Any) -> Any:
    """``1 / (1 + exp(-x))``, for x below 0 as ``exp(x) / (1 + exp(x))``."""
    raise NotImplementedError("compiled code only")


@overload(logistic, jit_options=OPTIONS)
def _(x):  # type: ignore[no-untyped-def]
    decay, one, _ = _of(x)

    def run(x):  # type: ignore[no-untyped-def]
        power, rest = decay(abs(x))
        small = power * rest + power  # exp(-|x|)
        opened = one / (one + small)
        return small * opened if x < 0 else opened

    return run
