"""What every front end offers: the core's names, its functions bound to one backend, and `jit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from hbp import linearization
from hbp.core import adjoint
from hbp.core.backend import Backend
from hbp.core.chain import LinearizedChain
from hbp.core.increments import Iterate, Report
from hbp.core.operator import Dense, Diagonal, Identity, Pair, Scalar, Zero
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver
from hbp.lowrank import LowRank

__all__ = [
    "Dense",
    "Diagonal",
    "Identity",
    "Iterate",
    "LinearizedChain",
    "LowRank",
    "Pair",
    "Report",
    "Scalar",
    "Schedule",
    "Solver",
    "Zero",
    "bound",
]

FUNCTIONS = ("linearize", "linearize_layers", "backprop", "highway", "iterates", "report", "propagate", "vjp")
COMMON = [*(name for name in __all__ if name != "bound"), *FUNCTIONS, "backend", "jit"]
"""What every front end offers."""

F = TypeVar("F", bound=Callable[..., Any])


def bound(backend: Backend) -> tuple[Callable[..., Any], ...]:
    """The core's functions bound to one backend, which then never read `use` and `using`.

    In the order of `FUNCTIONS`.
    """
    core = {**vars(linearization), **vars(adjoint)}
    return (*(partial(core[name], backend=backend) for name in FUNCTIONS[:-1]), backend.vjp)


def jit(function: F) -> F:
    """``function`` itself: the library runs it as it is. In the JAX front end this is `jax.jit`."""
    return function
