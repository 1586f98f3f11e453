"""The CuPy front end: NumPy's code on CUDA arrays."""

from __future__ import annotations

import cupy

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit
from hbp.backends.cupy.array import CupyBackend

backend = CupyBackend(cupy)
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = COMMON
