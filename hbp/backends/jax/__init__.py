"""The JAX front end."""

from __future__ import annotations

from jax import jit

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound
from hbp.backends.jax.array import JaxBackend
from hbp.backends.jax.diagnosis import diagnose
from hbp.backends.jax.gated import scan
from hbp.backends.jax.recurrent import gru, lstm
from hbp.backends.jax.sequential import sequential

backend = JaxBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = [*COMMON, "diagnose", "gru", "lstm", "scan", "sequential"]
