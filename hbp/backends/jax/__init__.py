"""The JAX front end."""

from __future__ import annotations

from jax import jit

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound
from hbp.backends.jax.operations import JaxBackend

backend = JaxBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = COMMON
