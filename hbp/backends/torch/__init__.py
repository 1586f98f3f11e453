"""The PyTorch front end."""

from __future__ import annotations

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit
from hbp.backends.torch.conversion import convert, revert
from hbp.backends.torch.diagnosis import diagnose, estimate_damping
from hbp.backends.torch.gated import scan
from hbp.backends.torch.operations import TorchBackend
from hbp.backends.torch.recurrent import GRU, LSTM
from hbp.backends.torch.residual import Downsampled, PostNorm, Residual
from hbp.backends.torch.sequential import Sequential
from hbp.backends.torch.training import follow, set_iterations, step

backend = TorchBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

OWN = [
    "GRU",
    "LSTM",
    "Downsampled",
    "PostNorm",
    "Residual",
    "Sequential",
    "convert",
    "diagnose",
    "estimate_damping",
    "follow",
    "revert",
    "scan",
    "set_iterations",
    "step",
]
__all__ = [*COMMON, *OWN]
