"""hbp: the backward pass made parallel.

Highway backpropagation (arXiv 2501.17086) splits every layer's Jacobian into a cheap residual path and an
expensive block, and alternates a scan along the residual path with one pullback through all blocks at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hbp.availability import available
from hbp.core.adjoint import backprop, highway, iterates, propagate, report
from hbp.core.chain import LinearizedChain
from hbp.core.increments import DivergenceWarning, Iterate, Report
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero
from hbp.core.registry import backend_of, use, using
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver
from hbp.directions import Directions, directions
from hbp.linearization import linearize, linearize_layers
from hbp.lowrank import LowRank

if TYPE_CHECKING:
    from types import ModuleType

    from hbp import cells

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "Diagonal",
    "Directions",
    "DivergenceWarning",
    "Identity",
    "Iterate",
    "LinearOperator",
    "LinearizedChain",
    "LowRank",
    "Pair",
    "Report",
    "Scalar",
    "Schedule",
    "Solver",
    "Zero",
    "available",
    "backend_of",
    "backprop",
    "cells",
    "directions",
    "highway",
    "iterates",
    "linearize",
    "linearize_layers",
    "propagate",
    "report",
    "use",
    "using",
]


def __getattr__(name: str) -> ModuleType:
    """`hbp.cells`, imported when it is first used, to keep `import hbp` short."""
    if name == "cells":
        return import_module("hbp.cells")
    raise AttributeError(f"module 'hbp' has no attribute {name!r}")
