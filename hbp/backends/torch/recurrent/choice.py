"""Who computes a recurrent layer's forward and backward, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from hbp.backends import _tuning
from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.cells._common import Keep

Exact: TypeAlias = Literal["adjoint", "library"]
WAYS: dict[str, tuple[Literal["compiled", "library"], Literal["adjoint", "library"]]] = {
    "library": ("library", "library"),
    "adjoint": ("library", "adjoint"),
    "compiled": ("compiled", "adjoint"),
}


@dataclass(frozen=True)
class Path:
    """Who computes what of a recurrent layer, for some input.

    >>> print(Path("library", "rounds", "on a GPU"))
    forward: library, backward: rounds (on a GPU)
    """

    forward: Literal["compiled", "library"]
    """"compiled": this library's; "library": PyTorch's, bit for bit."""
    backward: Literal["adjoint", "rounds", "library"]
    """"adjoint": exact, without a graph; "rounds": Highway-BP; "library": PyTorch's own."""
    why: str

    def __str__(self) -> str:
        return f"forward: {self.forward}, backward: {self.backward} ({self.why})"


def choose(
    mode: str,
    data: Tensor,
    size: tuple[int, int, int],
    compiled: bool,
    options: tuple[bool | None, Exact | None, Keep, bool],
) -> Path:
    """The path of a "GRU" or an "LSTM".

    Args:
        mode, data, size: the layer's and its input's: steps, batch and hidden size.
        compiled: whether there is a compiled forward for these.
        options: the layer's ``compiled``, ``exact``, not "library", and ``keep``, and whether the backward is exact.
    """
    pinned, exact, keep, is_exact = options
    lacking = "there is no compiled forward for such an input"
    ways = ["library", "adjoint"] if is_exact and exact is None and keep == "gates" else ["adjoint"]
    if compiled and pinned is not False:
        ways = ["compiled"] if pinned else [*ways, "compiled"]
    if len(ways) == 1:
        obeyed = compiled if pinned else pinned is False or exact
        kept = 'keep="states" takes no graph; ' if keep == "states" and is_exact and exact is None else ""
        return _path(ways[0], is_exact, "pinned" if obeyed else kept + lacking)
    told = f"{lacking}; " if pinned and not compiled else ""
    if data.device.type != "cpu":
        return _path("library", is_exact, f"{told}on {data.device} the library's own is taken")
    library = "torch" if compiled or BACKEND.adjoint_compiled(mode, data) else "torch, plain"
    steps, batch, hidden = size
    way, why = _tuning.explained(f"{mode.lower()} step", library, batch, hidden, tuple(ways), steps)
    return _path(way, is_exact, told + why)


def _path(way: str, is_exact: bool, why: str) -> Path:
    forward, backward = WAYS[way]
    return Path(forward, backward if is_exact else "rounds", why)
