"""The pullbacks of equal layers all at once, by `torch.vmap` over their stacked parameters and states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.vmap import lazy_load_decompositions

from hbp.backends._tuning import fastest
from hbp.backends.torch.autograd import SWAPPING
from hbp.backends.torch.hooks import hooked
from hbp.backends.torch.stack.graphs import Call, pull_back
from hbp.core.backend import Backend
from hbp.core.pullbacks import Pullbacks


@dataclass(frozen=True, eq=False)
class BatchedGraph(Pullbacks):
    """The pullbacks of equal layers in one graph; the layers run once more, all at once."""

    calls: Sequence[Call]
    choosy: bool
    """Whether an operation that torch.vmap runs in a loop, which is no gain, is an error."""
    graphs: dict[range, tuple[dict[str, Tensor], Tensor, Tensor]] = field(default_factory=dict)
    """Per selection of calls: joined parameters, and states before and after."""
    selected: range | None = None

    @property
    def _range(self) -> range:
        return range(len(self.calls)) if self.selected is None else self.selected

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: slice) -> BatchedGraph:
        return replace(self, selected=self._range[index])

    def __call__(self, cotangents: Tensor, backend: Backend) -> Tensor:
        _, x, y = self.linearized()
        (pulled,) = pull_back([y], [x], [cotangents])
        return torch.zeros_like(x) if pulled is None else pulled

    def gradients(self, cotangents: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """As `LayerGraphs.gradients`."""
        parameters, _, y = self.linearized()
        own = {id(leaf): n for n, leaf in enumerate(leaves)}
        everything = [*(p for p in parameters.values() if p.requires_grad), *leaves]
        found = dict(zip(map(id, everything), pull_back([y], everything, [cotangents]), strict=True))
        gradients = [found[id(leaf)] for leaf in leaves]
        for name, joined in parameters.items():
            rows = found.get(id(joined))
            if rows is None:
                continue
            for row, call in zip(rows.unbind(0), (self.calls[i] for i in self._range), strict=True):
                n = own.get(id(call.parameters[name]))
                if n is not None:
                    gradients[n] = row if gradients[n] is None else gradients[n] + row
        return gradients

    def linearized(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The graph of the selected calls: joined parameters, and states before and after."""
        if self._range not in self.graphs:
            calls = [self.calls[i] for i in self._range]
            first = calls[0]
            args, kwargs = first.arguments
            parameters = {}
            for name in first.parameters:
                rows = [call.parameters[name] for call in calls]
                joined = torch.stack([row.detach() for row in rows])
                parameters[name] = joined.requires_grad_(any(row.requires_grad for row in rows))
            x = torch.stack([call.start.detach() for call in calls]).requires_grad_()

            def layer(own: dict[str, Tensor], state: Tensor) -> Tensor:
                output = torch.func.functional_call(first.target, own, (state, *args), kwargs)
                return output[0] if isinstance(output, tuple) else output

            with (
                SWAPPING,
                _attributes_kept(first.target),
                first.modes.autocast(),
                torch.enable_grad(),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("error" if self.choosy else "ignore", "There is a performance drop")
                self.graphs[self._range] = parameters, x, _mapped(layer, parameters, x)
        return self.graphs[self._range]


def _mapped(layer: Callable[[dict[str, Tensor], Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """``torch.vmap(layer)(parameters, x)``, without its pytrees, which leave reference cycles in each step."""
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(len(x), "error")
    try:
        own = {name: functorch._add_batch_dim(p, 0, level) for name, p in parameters.items()}
        y: Tensor = layer(own, functorch._add_batch_dim(x, 0, level))
        return functorch._remove_batch_dim(y, level, len(x), 0)
    finally:
        functorch._vmap_decrement_nesting()


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


@dataclass(frozen=True, eq=False)
class Candidates:
    """Calls that may be pulled back by a `BatchedGraph`, with all modules inside each."""

    calls: Sequence[Call]
    modules: Sequence[Sequence[nn.Module]]

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Candidates:
        return cls(calls, [list(call.target.modules()) for call in calls])

    def structure(self, i: int = 0) -> Any:
        """The kinds of a layer's parts and the shapes of its parameters."""
        shapes = tuple((name, p.shape, p.dtype) for name, p in self.calls[i].parameters.items())
        return tuple(map(type, self.modules[i])), shapes

    def refusal(self) -> str | None:
        """Why these calls cannot be pulled back all at once, or None: they can, unless `torch.vmap` objects."""
        calls, parts, structure = self.calls, self.modules[0], self.structure()
        if len(calls) < 2:
            return "one layer only"
        if any(self.structure(i) != structure for i in range(1, len(calls))):
            return "the layers differ"
        if any(True for _ in calls[0].target.buffers()):
            return "the layers have buffers"
        if any(m.p and m.training for m in parts if isinstance(m, nn.modules.dropout._DropoutNd)):
            return "the layers are random"
        if any(hooked(call.target, call.module, own) for call, own in zip(calls, self.modules, strict=True)):
            return "there are hooks inside the layers"
        if any(call.modes.packed for call in calls):
            return "hooks on saved tensors held in the forward"
        if not all(_same(a.arguments, b.arguments) for a, b in pairwise(calls)):
            return "the layers take different or opaque arguments"
        return None

    def promising(self) -> bool:
        """Whether a `BatchedGraph` is worth trying: the layers' settings agree, and at their size it was faster."""
        first = self.calls[0]
        parameters = sum(p.numel() for p in first.parameters.values())
        if fastest("stack", "torch", first.start.numel(), parameters, ("loop", "stacked")) == "loop":
            return False
        settings = [_settings(module) for module in self.modules[0]]
        return all(_alike(settings, [_settings(module) for module in own]) for own in self.modules[1:])


OWN = (vars(nn.Module()).keys() | {"forward"}) - {"training"}


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's attributes beside its parts, hooks and tensors."""
    return {name: value for name, value in vars(module).items() if name not in OWN}


def _alike(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    """Whether modules of one structure have equal values, or the same objects, in all their settings."""
    plain = (bool, int, float, str, tuple, type(None))
    for one, other in zip(some, others, strict=True):
        if one.keys() != other.keys():
            return False
        for name, value in one.items():
            same = isinstance(value, plain) and type(value) is type(other[name]) and value == other[name]
            if not same and value is not other[name]:
                return False
    return True


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of arguments are the same tensors and plain values."""
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b if isinstance(a, Tensor) else isinstance(a, bool | int | float | str | None) and bool(a == b)
