"""What a training step takes by each way, of recurrent layers and of stacks: for ``hbp tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hbp.backends._timing import SIZES, STACKS, apart, in_ways, shortest, steps_of
from hbp.backends._tuned import Timing
from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.backends.torch.recurrent.choice import WAYS
from hbp.backends.torch.recurrent.modules import GRU, LSTM
from hbp.backends.torch.stack.residual import Residual
from hbp.backends.torch.stack.sequential import Sequential

LAYERS = 16
"""Of the stacks."""


def steps() -> Iterator[Timing]:
    """The times of a training step of recurrent layers, with the inputs' gradients, size by size."""
    for kind in (GRU, LSTM):
        for batch, hidden in SIZES:
            x = torch.randn(steps_of(batch, hidden), batch, hidden, requires_grad=True)
            layer = kind(hidden, hidden)
            ways = list(WAYS) if BACKEND.compiled(layer.mode, (x, *layer.parameters())) else ["library", "adjoint"]
            library = "torch" if "compiled" in ways else "torch, plain"
            half = x[: len(x) // 2].detach().requires_grad_()
            runs, shorter = ({way: _step(kind, way, layer, data) for way in ways} for data in (x, half))
            yield Timing(f"{layer.mode.lower()} step", library, batch, hidden, *apart(runs, shorter, len(x), len(half)))


def _step(kind: Any, way: str, like: Any, x: torch.Tensor) -> Callable[[], Any]:
    options: dict[str, Any] = {"exact": "library" if way == "library" else "adjoint"}
    layer = kind(like.input_size, like.hidden_size, compiled=way == "compiled", **options)
    layer.load_state_dict(like.state_dict())
    return lambda: torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])


def stacks() -> Iterator[Timing]:
    """The times of a step through residual layers, per layer, size by size."""
    for batch, width in STACKS:
        blocks = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(LAYERS)]
        model = Sequential(*map(Residual, blocks), iterations=3)
        x = torch.randn(batch, width, requires_grad=True)

        def run(model: Any = model, x: torch.Tensor = x) -> None:
            torch.autograd.grad(model(x).sum(), [x, *model.parameters()])

        found = shortest(in_ways("stack", ("loop", "stacked"), run), LAYERS)
        yield Timing("stack", "torch", x.numel(), width * (width + 1), found)
