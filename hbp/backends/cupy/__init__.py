"""The CuPy front end: NumPy's code on CUDA arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import cupy

from hbp.backends._array import bound
from hbp.backends.cupy.operations import CupyBackend
from hbp.core.chain import LinearizedChain
from hbp.core.increments import Iterate, Report
from hbp.core.operator import Dense, Diagonal, Identity, Pair, Scalar, Zero
from hbp.core.schedule import Schedule

F = TypeVar("F", bound=Callable[..., Any])

backend = CupyBackend(cupy)


def jit(function: F) -> F:
    """``function`` itself: CuPy runs it as it is. In the JAX front end this is `jax.jit`."""
    return function


linearize, linearize_layers, backprop, highway, iterates, report, propagate = bound(backend)
vjp = backend.vjp

__all__ = [
    "Dense",
    "Diagonal",
    "Identity",
    "Iterate",
    "LinearizedChain",
    "Pair",
    "Report",
    "Scalar",
    "Schedule",
    "Zero",
    "backend",
    "backprop",
    "highway",
    "iterates",
    "jit",
    "linearize",
    "linearize_layers",
    "propagate",
    "report",
    "vjp",
]
