"""Ways to do a training step of recurrent layers in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hbp
from benchmarks.loops import Loop
from benchmarks.measure import Library, Method
from experiments.layers import (
    HIGHWAY,
    ITERATIONS,
    LAYER,
    LOOP,
    LOOP_EXACT,
    LOOP_FIXED,
    LOOP_HIGHWAY,
    OURS,
    Case,
    pulled,
    stacked,
)


class Stack(nn.ModuleList):
    """Layers one upon another."""

    def forward(self, x: Tensor) -> Tensor:
        """Of all states (T, B, H)."""
        for layer in self:
            x = stacked(layer(x)[0], x, len(self))
        return x


def methods(case: Case, lib: Library) -> Iterator[Method]:
    """A step loop, with autograd and with each other backward pass; PyTorch's layer; hbp's layers."""
    weights, x, dy = case.problem()
    x, dy = lib.array(x), lib.array(dy)
    kind = case.cell.upper()

    def stack(make: Callable[[int, int], nn.Module]) -> Stack:
        layers = Stack(make(case.H, case.H) for _ in weights)
        with torch.no_grad():
            for layer, own in zip(layers, weights, strict=True):
                for parameter, given in zip(layer.parameters(), own, strict=True):
                    parameter.copy_(torch.from_numpy(given))
        return layers.to(x.device)

    def method(name: str, make: Callable[[int, int], nn.Module], **what: Any) -> Method:
        layers = stack(make)
        own = list(layers.parameters())
        return Method(name, lib, lambda: layers(x), lambda y: torch.autograd.grad(y, own, dy), **what)

    loop = partial(Loop, getattr(nn, f"{kind}Cell"))
    yield method(LOOP, loop)
    forward = partial(_unrecorded, stack(loop), x, type(weights[0]), lib.front_end.backend)
    for name, k, how in _variants():
        yield Method(name, lib, forward, partial(pulled, dy=dy, iterations=k, **how), k=k, exact=k is None)
    yield method(LAYER, getattr(nn, kind))
    ours = getattr(lib.front_end, kind)
    yield method(OURS, ours)
    for k in ITERATIONS:
        yield method(HIGHWAY, partial(ours, iterations=k), k=k, exact=False)


def _variants() -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """The backward passes after a step loop."""
    yield LOOP_EXACT, None, {}
    for k in ITERATIONS:
        yield LOOP_HIGHWAY, k, {}
        yield LOOP_FIXED, k, {"residual": hbp.Zero()}


@torch.no_grad()
def _unrecorded(layers: Stack, x: Tensor, kind: type, backend: Any) -> list[Any]:
    """The pullbacks of step loops that autograd does not record: they need nothing but the states."""
    pullbacks: list[Any] = []
    for layer in layers:
        h, c = layer(x)
        params, zero = kind(*(p.detach() for p in layer.parameters())), x.new_zeros(x.shape[1:])
        if c is None:
            pullbacks.append(hbp.cells.GRUPullback(params, x, zero, h, backend))
        else:
            pullbacks.append(hbp.cells.LSTMPullback(params, x, (zero, zero), (h, c), backend))
        x = stacked(h, x, len(layers))
    return pullbacks
