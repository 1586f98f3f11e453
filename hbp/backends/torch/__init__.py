"""The PyTorch front end."""

from __future__ import annotations

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit
from hbp.backends.torch.gated import scan
from hbp.backends.torch.operations import TorchBackend
from hbp.backends.torch.recurrent import GRU, LSTM, set_iterations, step

backend = TorchBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

__all__ = [*COMMON, "GRU", "LSTM", "scan", "set_iterations", "step"]
