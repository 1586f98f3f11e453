"""Kernels for CPUs, compiled by Numba: the suffix scans, and the adjoints of the GRU and the LSTM.

They work on NumPy arrays and, since ``numpy.asarray`` copies nothing, on PyTorch's CPU tensors. They release the
interpreter's lock and are spread over threads by channels, batch entries or units; compiled code is cached on disk.
"""

from hbp.backends._numba.adjoints import gru_adjoint, lstm_adjoint
from hbp.backends._numba.forwards import gru_forward, lstm_forward
from hbp.backends._numba.lowrank import low_rank_scan
from hbp.backends._numba.scan import suffix_scan, suffix_scan_

__all__ = [
    "gru_adjoint",
    "gru_forward",
    "low_rank_scan",
    "lstm_adjoint",
    "lstm_forward",
    "suffix_scan",
    "suffix_scan_",
]
