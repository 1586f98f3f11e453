"""One rank's layers of a stack over several ranks: their options, and what ranks must agree on before each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbp.backends.torch.depth.exchange import Exchange
from hbp.backends.torch.depth.passage import Agreed
from hbp.backends.torch.depth.ranks import Ranks
from hbp.backends.torch.hooks import backward_hooks
from hbp.backends.torch.stack.options import Stack


class Piece(Stack):
    """This rank's consecutive layers of a stack."""

    ranks: Ranks
    numbers: range
    """Of this rank's layers in the whole stack."""
    exchange: Exchange | None = None
    last_only: bool = False
    training: bool
    passes: int = 0
    called_whole: bool = True
    """Whether a layer's own hooks run inside of its call, not around it."""

    def spread(self, ranks: Ranks, own: int, exchange: Any, last_only: Any = False) -> None:
        """Set the options that only several ranks have, checked.

        Raises:
            TypeError, ValueError: an option is not what its name says, or this rank has none of the layers.
        """
        if exchange is not None and not isinstance(exchange, Exchange):
            kind = type(exchange).__name__
            raise TypeError(f"exchange is a {kind}; give hb.AllGather(), hb.HillisSteele(), hb.Transpose() or None")
        if not isinstance(last_only, bool):
            raise TypeError(f"last_only={last_only!r}; give True or False")
        if not own:
            raise ValueError("has no layers; give each rank at least one, or use a smaller mesh")
        self.ranks, self.exchange, self.last_only = ranks, exchange, last_only

    def settle(self, own: int) -> None:
        """Find the place of this rank's layers; collective."""
        counts = [row[0] for row in self.ranks.agree("building the stack", {}, [own])]
        before = sum(counts[: self.ranks.here])
        self.numbers = range(before, before + own)

    def agreed(self, x: Any, outside: list[Tensor]) -> Agreed:
        """What all ranks need to know of a call that begins.

        Raises:
            ValueError: their settings or states differ, or one of them cannot go on; on all ranks.
        """
        solver, grads = self.current(), torch.is_grad_enabled()
        facts = {
            "iterations": solver.iterations,
            "tolerance": solver.tolerance,
            "exchange": self.exchange,
            "last_only": self.last_only,
            "the state": f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else None,
            "torch.is_grad_enabled()": grads,
            "training": self.training,
            "the shapes of arguments that need gradients": [tuple(tensor.shape) for tensor in outside],
        }
        wanted = grads and isinstance(x, Tensor) and x.requires_grad
        needed = grads and bool(wanted or outside or any(True for _ in self.trainable()))
        numbers = [needed, wanted, -(-len(self.numbers) // solver.chunk)]
        rows = self.ranks.agree("a call of the stack", facts, numbers, self._trouble(x, needed and not solver.exact))
        self.passes += 1
        needed, wanted = (any(row[i] for row in rows) for i in (0, 1))
        return Agreed(self.ranks, self.passes, sum(row[2] for row in rows), needed, solver.exact, wanted)

    def _trouble(self, x: Any, in_rounds: bool) -> str:
        """Why this rank cannot take part, or ""."""
        layers = list(self.members())
        if len(layers) != len(self.numbers):
            return f"has {len(layers)} layers and had {len(self.numbers)} when the stack was built; build it anew"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            return f"the state is {kind}, no real floating point tensor"
        if x.device.type != self.ranks.device.type:
            return f"the state is on {x.device} and the mesh is of {self.ranks.device.type} devices; move one of them"
        for number, layer in zip(self.numbers, layers, strict=True):
            places = {parameter.device for parameter in layer.parameters()} - {x.device}
            if places:
                return f"layer {number} is on {places.pop()} and the state on {x.device}; move one of them"
            name = f"layer {number}, a {type(layer).__name__},"
            hooks = backward_hooks(name, layer if self.called_whole else None, layer) if in_rounds else ""
            if hooks:
                return hooks
        return ""
