"""CUDA C++ kernels for CuPy."""

from hbp.backends.cupy.kernels.scan import WIDE, suffix_scan

__all__ = ["WIDE", "suffix_scan"]
