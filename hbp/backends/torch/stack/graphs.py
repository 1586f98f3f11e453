"""The pullbacks of a run's layers: through each layer's own graph, or all at once over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.autograd import SWAPPING
from hbp.core.backend import Backend
from hbp.core.operator import LinearOperator
from hbp.core.pullbacks import Pullbacks

# Median times on two cores, float32, of the backward of L residual MLPs of width d at batch B, k = 3: stacked over
# loop 0.13 at (L, d, B) = (64, 32, 4), 0.3 at (64, 64, 32), 0.8 at (32, 256, 64) and (64, 128, 256), then 1.3 at
# (12, 256, 1024) and (16, 1024, 64), 2.5 at (16, 512, 64). So: not beyond these numbers of elements per layer.
STACKED_PARAMETERS = 200_000
STACKED_STATE = 50_000


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as it was called."""

    module: nn.Module
    target: nn.Module
    """What was called, with ``parameters`` in place of its own: the layer, or a module that has it inside."""
    parameters: dict[str, Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    residual_map: LinearOperator
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: torch.dtype
    """That of its arithmetic."""
    version: int
    """Of all its parameters together, to notice writes between forward and backward."""


@dataclass(frozen=True, eq=False)
class Call:
    """A layer's call: its own graph from ``start`` to ``ends``, the first of which is the next state."""

    layer: Layer
    start: Tensor
    ends: tuple[Tensor, ...]
    cotangents: tuple[Tensor | None, ...] = ()
    """Of the ends, where a backward pass has brought them."""


def version(parameters: dict[str, Tensor]) -> int:
    """A number that grows with every write into one of these tensors."""
    return sum(p._version for p in parameters.values())


@dataclass(frozen=True, eq=False)
class LayerGraphs(Pullbacks):
    """The pullbacks of whole layers, each through its own graph, as core's `Pullbacks`."""

    starts: Sequence[Tensor]
    ends: Sequence[Tensor]
    traceable = False

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

    def at(self, i: Any, cotangent: Tensor, backend: Backend) -> Tensor:
        return self[i : i + 1](cotangent[None], backend)[0]

    def gradients(self, cotangents: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of all ends, (L, ...), pulled back to leaves of the graphs; None where nothing leads."""
        return pull_back(self.ends, leaves, cotangents.unbind(0))


@dataclass(frozen=True, eq=False)
class StackedGraph(Pullbacks):
    """The pullbacks of equal layers in one graph over their stacked parameters and states (`torch.vmap`).

    The layers run once more, all at once.
    """

    calls: Sequence[Call]
    graphs: dict[range, tuple[dict[str, Tensor], Tensor, Tensor]] = field(default_factory=dict)
    """Per selection of calls: stacked parameters, and states before and after."""
    selected: range | None = None
    traceable = False

    @property
    def _range(self) -> range:
        return range(len(self.calls)) if self.selected is None else self.selected

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: slice) -> StackedGraph:
        return StackedGraph(self.calls, self.graphs, self._range[index])

    def __call__(self, cotangents: Tensor, backend: Backend) -> Tensor:
        _, x, y = self.linearized()
        (pulled,) = pull_back([y], [x], [cotangents])
        return torch.zeros_like(x) if pulled is None else pulled

    def at(self, i: Any, cotangent: Tensor, backend: Backend) -> Tensor:
        return self[i : i + 1](cotangent[None], backend)[0]

    def gradients(self, cotangents: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """As `LayerGraphs.gradients`."""
        parameters, _, y = self.linearized()
        own = {id(leaf): n for n, leaf in enumerate(leaves)}
        everything = [*(p for p in parameters.values() if p.requires_grad), *leaves]
        found = dict(zip(map(id, everything), pull_back([y], everything, [cotangents]), strict=True))
        gradients = [found[id(leaf)] for leaf in leaves]
        for name, stacked in parameters.items():
            rows = found.get(id(stacked))
            if rows is None:
                continue
            for row, call in zip(rows.unbind(0), (self.calls[i] for i in self._range), strict=True):
                n = own.get(id(call.layer.parameters[name]))
                if n is not None:
                    gradients[n] = row if gradients[n] is None else gradients[n] + row
        return gradients

    def linearized(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The graph of the selected calls: stacked parameters, and states before and after."""
        if self._range not in self.graphs:
            calls = [self.calls[i] for i in self._range]
            first = calls[0].layer
            args, kwargs = first.arguments
            parameters = {}
            for name in calls[0].layer.parameters:
                rows = [call.layer.parameters[name] for call in calls]
                stacked = torch.stack([row.detach() for row in rows])
                parameters[name] = stacked.requires_grad_(any(row.requires_grad for row in rows))
            x = torch.stack([call.start.detach() for call in calls]).requires_grad_()

            def layer(own: dict[str, Tensor], state: Tensor) -> Tensor:
                output = torch.func.functional_call(first.target, own, (state, *args), kwargs)
                return output[0] if isinstance(output, tuple) else output

            with SWAPPING, _attributes_kept(first.target), first.autocast(), torch.enable_grad():
                self.graphs[self._range] = parameters, x, torch.vmap(layer)(parameters, x)
        return self.graphs[self._range]


@contextmanager
def _attributes_kept(target: nn.Module) -> Iterator[None]:
    """Put all attributes of a module and its children back at the end, buffers apart: what runs in vmap stays there."""
    before = [(module, dict(vars(module))) for module in target.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def refusal(calls: Sequence[Call]) -> str | None:
    """Why these calls cannot be pulled back by a `StackedGraph`, or None: they can, unless `torch.vmap` objects."""
    first = calls[0].layer
    modules = list(first.target.modules())
    if len(calls) < 2:
        return "one layer only"
    if any(_signature(call.layer) != _signature(first) for call in calls):
        return "the layers differ"
    if any(True for _ in first.target.buffers()):
        return "the layers have buffers"
    if any(m.p and m.training for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)):
        return "the layers are random"
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules if m is not first.module):
        return "there are hooks inside the layers"
    if not all(_same(a.layer.arguments, b.layer.arguments) for a, b in pairwise(calls)):
        return "the layers take different or opaque arguments"
    return None


def promising(calls: Sequence[Call]) -> bool:
    """Whether a `StackedGraph` is worth trying: the layers' settings agree, and at their size it was faster."""
    first = calls[0].layer
    if sum(p.numel() for p in first.parameters.values()) > STACKED_PARAMETERS:
        return False
    if calls[0].start.numel() > STACKED_STATE:
        return False
    return all(_alike(first.target, call.layer.target) for call in calls[1:])


def _signature(layer: Layer) -> Any:
    shapes = [(name, p.shape, p.dtype) for name, p in layer.parameters.items()]
    return [type(module) for module in layer.target.modules()], shapes


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one structure hold equal values, or the same objects, in all their attributes."""
    plain = (bool, int, float, str, tuple, type(None))
    own = vars(nn.Module()).keys() | {"forward"}
    for one, other in zip(a.modules(), b.modules(), strict=True):
        left, right = ({k: v for k, v in vars(m).items() if k not in own} for m in (one, other))
        if left.keys() != right.keys():
            return False
        for key, value in left.items():
            same = isinstance(value, plain) and type(value) is type(right[key]) and value == right[key]
            if not same and value is not right[key]:
                return False
    return all(one.training == other.training for one, other in zip(a.modules(), b.modules(), strict=True))


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of arguments are the same tensors and plain values."""
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b if isinstance(a, Tensor) else isinstance(a, bool | int | float | str | None) and bool(a == b)


def pull_back(ends: Sequence[Tensor], starts: Sequence[Tensor], cotangents: Iterable[Tensor]) -> list[Tensor | None]:
    """Cotangents of some tensors pulled back to others, None where nothing leads there; the graph stays."""
    return list(torch.autograd.grad(ends, starts, list(cotangents), retain_graph=True, allow_unused=True))
