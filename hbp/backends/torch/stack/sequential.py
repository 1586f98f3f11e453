"""Stacks of whole layers, skip included, whose backward pass is Highway-BP over depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hbp.backends.torch.stack.options import Stack
from hbp.backends.torch.stack.tracked import call_layers
from hbp.core.operator import LinearOperator
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver

OPTIONS = ("solver", "residual", "damping", "stacked", "backend", "training_step")


class Sequential(Stack, nn.Sequential):
    """`torch.nn.Sequential` of layers that keep their input's shape, with a backward pass parallel over them.

    Each layer runs once in the forward; its own graph stays, and the backward pulls back through all of them at once
    and scans along their residual maps. Randomness and buffers are those of that one run. A tensor that needs gradients
    and is neither a layer's parameter nor given to it is refused, as are second derivatives and backward hooks inside
    a layer, which would run once per round; hooks on a state's ``grad_fn`` are not seen. `torch.compile` breaks its
    graph at the stack.

    Args:
        *layers: whole layers, skip included; those of `Residual` and `PostNorm` know their residual map, any other
            counts as having the identity.
        iterations: Highway-BP's k, a `Schedule` of it, or None for exact (torch's own graph).
        chunk: layers per chunk.
        residual: an operator that replaces the layers' own maps.
        damping: gamma, or one per layer; all maps are multiplied by 1 - gamma (equation 17 of the paper).
        stacked: whether equal layers are pulled back all at once, over stacked parameters, which runs them once more;
            None takes that where it was measured faster, for small layers, and ``path`` tells what was done; for layers
            that log or count in their forward give False.
        tolerance: stop when the last increment is at most this fraction of the gradient; ``iterations`` is the cap.
        solver: iterations, chunk and tolerance in one `hbp.Solver`, instead; all are attributes afterwards.

    Further arguments of a call go to every layer; tensors among them may need gradients. A layer may return a tuple,
    whose first entry is the next state; the rest is dropped. Slices keep the options.

    >>> import torch
    >>> model = Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)), iterations=1)
    >>> model(torch.randn(2, 4)).sum().backward()
    """

    def __init__(
        self,
        *layers: Any,
        iterations: int | Schedule | None = None,
        chunk: int = 1,
        residual: LinearOperator | None = None,
        damping: float | Sequence[float] = 0,
        tolerance: float | None = None,
        solver: Solver | None = None,
        stacked: bool | None = None,
    ) -> None:
        given = list(layers[0].values()) if len(layers) == 1 and isinstance(layers[0], dict) else layers
        for i, layer in enumerate(given):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layer {i} is a {type(layer).__name__}; give torch.nn.Modules, as hbp's Residual")
        super().__init__(*layers)
        how = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance)
        self.configure(how, residual, damping, stacked)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            for name in OPTIONS:
                value = getattr(self, name)
                per_layer = isinstance(value, list | tuple) or getattr(value, "length", None) is not None
                setattr(found, name, value[index] if per_layer else value)
        return found

    def members(self) -> Iterable[nn.Module]:
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self) and self.tracks(x, args, kwargs):
            return call_layers(self, x, args, kwargs)
        for layer in self:
            found = layer(x, *args, **kwargs)
            x = found[0] if isinstance(found, tuple) else found
        return x
