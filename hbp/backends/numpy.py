"""The NumPy front end: the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hbp.backends._array import NumpyLike
from hbp.backends._kernels import CPU
from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit


class NumpyBackend(NumpyLike):
    """NumPy behind the protocol, with Numba's kernels where it is installed."""

    def __init__(self) -> None:
        super().__init__("numpy", np)

    def kernel_state(self) -> str:
        return CPU.state()

    def kernel(self, name: str, *arrays: np.ndarray) -> Callable[..., Any] | None:
        kinds, classes = {array.dtype for array in arrays}, {type(array) for array in arrays}
        if len(kinds) > 1 or not kinds <= {np.dtype("f4"), np.dtype("f8")} or not classes <= {np.ndarray, np.memmap}:
            return None
        return getattr(CPU.load(), name, None)


backend = NumpyBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = COMMON
