"""CuPy's operations: NumPy's, with a parallel scan and a check for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hbp.backends._array import NumpyLike
from hbp.backends._kernels import CUDA_CUPY
from hbp.core.backend import Array, dtype_name


class CupyBackend(NumpyLike):
    """CuPy behind the protocol.

    Raises:
        RuntimeError: CuPy imports but finds no CUDA device.
    """

    def __init__(self, xp: Any) -> None:
        if not xp.cuda.is_available():
            raise RuntimeError(
                f"cupy {xp.__version__} finds no CUDA device; check nvidia-smi and the driver, or use numpy"
            )
        super().__init__("cupy", xp, parallel=True)

    def kernel_state(self) -> str:
        return CUDA_CUPY.state()

    def kernel(self, name: str, *arrays: Array) -> Callable[..., Any] | None:
        module = CUDA_CUPY.load()
        if module is None or not {dtype_name(array) for array in arrays} <= set(module.WIDE):
            return None
        return CUDA_CUPY.find(name, lambda: module.place(arrays[0]))

    def device(self) -> str:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return f"cuda ({properties['name'].decode()})"
