"""The PyTorch front end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hbp.backends._array import bound
from hbp.backends.torch.operations import TorchBackend
from hbp.backends.torch.recurrent import GRU, LSTM, set_iterations, step
from hbp.core.chain import LinearizedChain
from hbp.core.increments import Iterate, Report
from hbp.core.operator import Dense, Diagonal, Identity, Pair, Scalar, Zero
from hbp.core.schedule import Schedule

F = TypeVar("F", bound=Callable[..., Any])

backend = TorchBackend()


def jit(function: F) -> F:
    """``function`` itself: PyTorch runs it as it is. In the JAX front end this is `jax.jit`."""
    return function


linearize, linearize_layers, backprop, highway, iterates, report, propagate = bound(backend)
vjp = backend.vjp

__all__ = [
    "GRU",
    "LSTM",
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
    "set_iterations",
    "step",
    "vjp",
]
