"""Triton kernels for CUDA devices: suffix scans, and the rounds of Highway-BP on GRUs and LSTMs.

Each function has the contract of a plain definition, which stays the specification: the backend's `suffix_scan`, and
`hbp.core.adjoint.highway` on the chains of `hbp.cells`.
"""

from hbp.backends.torch.kernels.gru import gru_low_rank_rounds, gru_rounds
from hbp.backends.torch.kernels.lowrank import Held, low_rank_scan
from hbp.backends.torch.kernels.lstm import lstm_low_rank_rounds, lstm_rounds
from hbp.backends.torch.kernels.scan import Blocks, suffix_scan

__all__ = [
    "Blocks",
    "Held",
    "gru_low_rank_rounds",
    "gru_rounds",
    "low_rank_scan",
    "lstm_low_rank_rounds",
    "lstm_rounds",
    "suffix_scan",
]
