"""The JAX front end."""

from __future__ import annotations

from jax import jit

from hbp.backends._array import bound
from hbp.backends.jax.operations import JaxBackend
from hbp.core.chain import LinearizedChain
from hbp.core.increments import Iterate, Report
from hbp.core.operator import Dense, Diagonal, Identity, Pair, Scalar, Zero
from hbp.core.schedule import Schedule

backend = JaxBackend()
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
