"""Stacks of whole layers, skip included, whose backward pass is Highway-BP over depth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hbp.backends.torch.operations import TorchBackend
from hbp.backends.torch.training import Scheduled
from hbp.core.adjoint import highway
from hbp.core.backend import check_tolerance
from hbp.core.forward import linearize_layers
from hbp.core.operator import Identity, LinearOperator
from hbp.core.schedule import Schedule

BACKEND = TorchBackend()
OPTIONS = ("iterations", "chunk", "residual", "damping", "tolerance", "training_step")


class Sequential(Scheduled, nn.Sequential):
    """`torch.nn.Sequential` of layers that keep their input's shape, with a backward pass parallel over them.

    Each layer runs once; its own graph stays, and the backward pulls back through all of them at once and scans along
    their residual maps. Randomness and buffers are those of the one forward pass.

    Args:
        *layers: whole layers, skip included; those of `Residual` and `PostNorm` know their residual map, any other
            counts as having the identity.
        iterations: Highway-BP's k, a `Schedule` of it, or None for exact (torch's own graph).
        chunk: layers per chunk.
        residual: an operator that replaces the layers' own maps.
        damping: gamma; all maps are multiplied by 1 - gamma (equation 17 of the paper).
        tolerance: stop when the last increment is below this fraction of the gradient; ``iterations`` is the cap.

    Keyword arguments of a call go to every layer; tensors among them may need gradients. Slices keep the options.

    >>> model = Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)), iterations=1)
    >>> model(torch.randn(2, 4)).sum().backward()
    """

    def __init__(
        self,
        *layers: Any,
        iterations: int | Schedule | None = None,
        chunk: int = 1,
        residual: LinearOperator | None = None,
        damping: float = 0,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(*layers)
        if residual is not None and not isinstance(residual, LinearOperator):
            raise TypeError(f"residual is a {type(residual).__name__}; give an operator, as hbp.Identity(), or None")
        self.iterations, self.chunk = iterations, chunk
        self.residual, self.damping, self.tolerance = residual, damping, tolerance
        self.current()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            for name in OPTIONS:
                setattr(found, name, getattr(self, name))
        return found

    def damped(self, residual: LinearOperator) -> LinearOperator:
        """A residual map times 1 - gamma; as it is where nothing is damped, since the identity has a faster scan."""
        return residual.scaled(1 - self.damping) if self.damping else residual

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        k, chunk = self.current()
        shared = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad}
        parameters = tuple(self.parameters())
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *shared.values(), *parameters))
        if not tracked or (k is None and self.tolerance is None) or not len(self):
            for layer in self:
                x = layer(x, **kwargs)
            return x
        options = {"iterations": k, "chunk": chunk, "tolerance": self.tolerance}
        check_tolerance(self.tolerance)
        return _Stack.apply(self, options, kwargs, tuple(shared), x, *shared.values(), *parameters)


class _Stack(torch.autograd.Function):
    """Input, parameters and shared tensors -> the output of all layers, each with a graph of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Sequential,
        options: Any,
        kwargs: dict[str, Any],
        names: tuple[str, ...],
        x: Tensor,
        *given: Tensor,
    ) -> Tensor:
        # Copies as leaves: hooks on the parameters see the final gradient only, once.
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
        kwargs = {**kwargs, **dict(zip(names, leaves, strict=False))}
        copies = dict(zip(map(id, given), leaves, strict=True))
        ends: list[tuple[Tensor, Tensor]] = []

        def run(layer: torch.nn.Module) -> Any:
            own = {name: copies[id(p)] for name, p in layer.named_parameters(remove_duplicate=False)}

            def linearized(state: Tensor) -> tuple[Tensor, Any]:
                with torch.enable_grad():
                    start = state.detach().requires_grad_()
                    end = torch.func.functional_call(layer, own, (start,), kwargs)
                ends.append((start, end))
                return end.detach(), partial(_pull, start, end)

            return linearized

        def maps(i: int, state: Tensor, y: Tensor) -> LinearOperator:
            layer = stack[i]
            return stack.damped(layer.residual_map(state, y) if hasattr(layer, "residual_map") else Identity())

        residual = maps if stack.residual is None else stack.damped(stack.residual)
        y, chain = linearize_layers([run(layer) for layer in stack], x.detach(), residual, backend=BACKEND)
        ctx.options, ctx.chain, ctx.ends, ctx.leaves = options, chain, ends, leaves
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        g = highway(ctx.chain, dy, backend=BACKEND, **ctx.options)
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        ends = [end for _, end in ctx.ends]
        found = iter(
            torch.autograd.grad(ends, wanted, list(g[1:]), retain_graph=True, allow_unused=True) if wanted else ()
        )
        return (None, None, None, None, g[0], *(next(found) if leaf.requires_grad else None for leaf in ctx.leaves))


def _pull(start: Tensor, end: Tensor, g: Tensor) -> Tensor:
    """The pullback of one layer through its own graph."""
    return torch.autograd.grad(end, start, g, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
