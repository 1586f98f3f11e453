"""Calls of layers, each with a graph of its own, and the pullbacks through these graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hbp.backends.torch.autograd import autocast_of
from hbp.core.backend import Backend
from hbp.core.operator import LinearOperator
from hbp.core.pullbacks import Pullbacks


@dataclass(frozen=True, eq=False)
class Modes:
    """What holds around a call, of which its backward must know."""

    autocast: Callable[[], AbstractContextManager[Any]]
    precision: torch.dtype
    """That of the call's arithmetic."""
    packed: bool
    """Whether there are hooks on saved tensors."""

    @classmethod
    def now(cls, x: Tensor) -> Modes:
        """The present modes, for calls on x."""
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # from torch 2.8 on
        return cls(*autocast_of(x), top is not None and top(False) is not None)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: its own graph leads from ``start`` to ``ends``, the first of which is the next state."""

    module: nn.Module
    target: nn.Module
    """What was called, with ``parameters`` in place of its own: the layer, or a module that has it inside."""
    parameters: dict[str, Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    residual_map: LinearOperator
    modes: Modes
    start: Tensor
    ends: tuple[GradientEdge, ...]
    """Edges, not tensors: whoever got the results may write into them, as far as the graph itself allows."""
    state: Tensor
    """The next state's values."""
    version: int
    """Of parameters, start and next state together, to notice writes between forward and backward."""

    def written(self) -> bool:
        """Whether a parameter, the start or the next state was written since."""
        return version(self.parameters, self.start, self.state) != self.version


def version(parameters: dict[str, Tensor], *states: Tensor) -> int:
    """A number that grows with every write into one of these tensors."""
    count: int = sum(tensor._version for tensor in (*parameters.values(), *states))
    return count


def edge(end: Tensor) -> GradientEdge:
    """The end of a graph, without its values."""
    if isinstance(end.grad_fn, torch._C._FunctionBase):  # its Python object does not keep the graph; a view's does
        with torch.enable_grad():
            end = end.view_as(end)
    return get_gradient_edge(end)


@dataclass(frozen=True, eq=False)
class LayerGraphs(Pullbacks):
    """The pullbacks of whole layers, each through its own graph, as core's `Pullbacks`."""

    starts: Sequence[Tensor]
    ends: Sequence[GradientEdge]

    @classmethod
    def of(cls, calls: Sequence[Call]) -> LayerGraphs:
        return cls([call.start for call in calls], [call.ends[0] for call in calls])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: slice) -> LayerGraphs:
        return LayerGraphs(self.starts[index], self.ends[index])

    def __call__(self, cotangents: Tensor, backend: Backend) -> Tensor:
        # One call on graphs that share nothing but leaves: autograd walks through all of them.
        pulled = pull_back(self.ends, self.starts, cotangents.unbind(0))
        return torch.stack([torch.zeros_like(x) if d is None else d for d, x in zip(pulled, self.starts, strict=True)])

    def gradients(self, cotangents: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of all ends, (L, ...), pulled back to leaves of the graphs; None where nothing leads."""
        return pull_back(self.ends, leaves, cotangents.unbind(0))


def pull_back(
    ends: Sequence[Tensor | GradientEdge], starts: Sequence[Tensor], cotangents: Iterable[Tensor]
) -> list[Tensor | None]:
    """Cotangents of some ends pulled back to tensors, None where nothing leads there; the graph stays."""
    if not starts:
        return []
    options = {"retain_graph": True, "allow_unused": True}
    return list(torch.autograd.grad(ends, starts, list(cotangents), **options))


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is zero."""
    return b if a is None else a if b is None else a + b
