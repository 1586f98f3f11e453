"""CUDA C++ kernels for CuPy."""

from hbp.backends.cupy.kernels.scan import WIDE, Blocks, place, suffix_scan

__all__ = ["WIDE", "Blocks", "place", "suffix_scan"]
