"""The NumPy front end: the reference."""

from __future__ import annotations

import numpy as np

from hbp.backends._array import NumpyLike
from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit

backend = NumpyLike("numpy", np)
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = COMMON
