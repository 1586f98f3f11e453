"""CuPy's operations: NumPy's, with a parallel scan and a check for a device."""

from __future__ import annotations

from typing import Any

from hbp.backends._array import NumpyLike


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

    def device(self) -> str:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return f"cuda ({properties['name'].decode()})"
