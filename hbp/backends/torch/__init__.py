"""The PyTorch front end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbp.backends._surface import *
from hbp.backends._surface import COMMON, bound, jit
from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.damping import estimate_damping
from hbp.backends.torch.depth.exchange import AllGather, HillisSteele, Transpose
from hbp.backends.torch.depth.gradients import clip_grad_norm_
from hbp.backends.torch.depth.parallel import DepthParallel
from hbp.backends.torch.diagnosis import diagnose
from hbp.backends.torch.options import configure, follow, set_iterations, step
from hbp.backends.torch.planning import plan
from hbp.backends.torch.recurrent.gated import scan
from hbp.backends.torch.recurrent.modules import GRU, LSTM
from hbp.backends.torch.stack.conversion import convert, revert
from hbp.backends.torch.stack.residual import Downsampled, PostNorm, Residual
from hbp.backends.torch.stack.sequential import Sequential

if TYPE_CHECKING:
    from hbp.backends.torch.depth.pipeline import ScheduleHighway

backend = TorchBackend()
linearize, linearize_layers, backprop, highway, iterates, report, propagate, vjp = bound(backend)

OWN = [
    "GRU",
    "LSTM",
    "AllGather",
    "DepthParallel",
    "Downsampled",
    "HillisSteele",
    "PostNorm",
    "Residual",
    "ScheduleHighway",
    "Sequential",
    "Transpose",
    "clip_grad_norm_",
    "configure",
    "convert",
    "diagnose",
    "estimate_damping",
    "follow",
    "plan",
    "revert",
    "scan",
    "set_iterations",
    "step",
]
__all__ = [*COMMON, *OWN]


def __getattr__(name: str) -> Any:
    if name != "ScheduleHighway":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hbp.backends.torch.depth.pipeline import ScheduleHighway  # torch's own package takes a second to import

    return ScheduleHighway
