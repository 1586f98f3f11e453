"""Triton kernels for CUDA devices: the suffix scan, and the rounds of Highway-BP on GRUs and LSTMs.

Each function has the contract of a plain definition, which stays the specification: the backend's `suffix_scan`, and
`hbp.core.adjoint.highway` on the chains of `hbp.cells`.
"""

from hbp.backends.torch.kernels.rounds import gru_rounds, lstm_rounds
from hbp.backends.torch.kernels.scan import Blocks, suffix_scan

__all__ = ["Blocks", "gru_rounds", "lstm_rounds", "suffix_scan"]
