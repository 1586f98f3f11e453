"""A stack of layers: its options, and what is remembered of its calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.autograd import refuse_transforms, tensors
from hbp.backends.torch.options import Scheduled
from hbp.backends.torch.stack.batched import BatchedGraph
from hbp.backends.torch.stack.calling import places_of
from hbp.backends.torch.stack.graphs import Call, LayerGraphs
from hbp.backends.torch.stack.verdict import Verdict
from hbp.core.backend import Backend
from hbp.core.operator import LinearOperator
from hbp.core.solver import Solver
from hbp.linearization import stack_maps


class Stack(Scheduled):
    """Layers called one after another, with the options of their backward pass.

    What belongs to one forward and backward is a `Run` (hbp.backends.torch.stack.run).
    """

    residual: LinearOperator | None = None
    damping: float | Sequence[float] = 0
    stacked: bool | None = None
    """Whether equal layers are pulled back all at once over stacked parameters; None: where that was faster."""
    backend: Backend = TorchBackend()
    """What solves the adjoint equation."""
    verdict: Verdict = Verdict()
    """On the last backward pass."""

    def configure(self, solver: Solver, residual: Any = None, damping: Any = 0, stacked: bool | None = None) -> None:
        """Set the options, checked.

        Raises:
            TypeError, ValueError: an option is not what its name says.
        """
        layers = len(list(self.members()))
        if residual is not None and not isinstance(residual, LinearOperator):
            raise TypeError(f"residual is a {type(residual).__name__}; give an operator, as hbp.Identity(), or None")
        if residual is not None:
            residual.check_length(layers)
        _gammas(damping, layers)
        if stacked not in (None, True, False):
            raise ValueError(f"stacked={stacked!r}; give True, False, or None for the faster one")
        self.solver, self.residual, self.damping, self.stacked = solver, residual, damping, stacked

    @property
    def path(self) -> str:
        """How the last backward pass pulled back: "stacked", or "loop" with the reason."""
        return self.verdict.path

    def members(self) -> Iterable[nn.Module]:
        """The layers, in order."""
        raise NotImplementedError

    def tracks(self, *given: Any) -> bool:
        """Whether a call on these arguments is pulled back here; otherwise torch's own graph is as good."""
        if self.current().exact:
            return False
        refuse_transforms()
        if any(getattr(module, "_is_replica", False) for module in (self, *self.members())):
            raise RuntimeError("replicas of DataParallel have no parameters of their own; use DistributedDataParallel")
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in tensors(given)) or any(True for _ in self.trainable())

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters of all layers that need gradients; one in several places comes as often."""
        return (place.held for layer in self.members() for place in places_of(layer) if place.held.requires_grad)

    def pullbacks(self, calls: Sequence[Call], leaves: Sequence[Tensor]) -> LayerGraphs | BatchedGraph:
        """The pullbacks of these calls, in the way ``stacked`` says; `path` tells which."""
        found, self.verdict = self.verdict.judge(calls, leaves, self.stacked, self.backend)
        return found

    def residual_maps(self, calls: Sequence[Call], x: Tensor, damped: bool = True) -> LinearOperator:
        """The residual maps of some calls: the layers' own or replaced, and damped, where so chosen."""
        ids = [id(member) for member in self.members()]
        whole = len(calls) == len(ids)
        places = list(range(len(ids))) if whole else [ids.index(id(call.module)) for call in calls]
        maps = [call.residual_map for call in calls]
        if self.residual is not None:
            bound = self.residual.bind(len(ids), x, self.backend)
            maps = [bound[i] for i in places]
        gammas = _gammas(self.damping, len(ids))
        if damped and self.damping:
            maps = [one.scaled(1 - gammas[i]) for one, i in zip(maps, places, strict=True)]
        return stack_maps(maps, x, self.backend).bind(len(calls), x, self.backend)


def _gammas(damping: Any, layers: int) -> Sequence[float]:
    """One gamma per layer, after checking that damping is a finite number or as many of them."""
    gammas = damping if isinstance(damping, list | tuple) else [damping] * layers
    if not all(isinstance(gamma, Real) for gamma in gammas):
        raise TypeError(f"damping is {damping!r}; give a number, or one per layer")
    if not all(map(math.isfinite, gammas)):
        raise ValueError(f"damping is {damping!r}; give a finite number, or one per layer")
    if len(gammas) != layers:
        raise ValueError(f"damping has {len(gammas)} entries and the stack {layers} layers")
    return gammas
