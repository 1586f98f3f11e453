"""The backward passes of trained models as chains, to be solved under any split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vjp, vmap

import hbp
from experiments.data import Batch, Task
from experiments.models.torch import loss, tensors
from hbp.backends.torch import backend
from hbp.core.backend import Array, Backend
from hbp.core.pullbacks import Pullbacks
from hbp.directions import directions

Loss = Callable[[Tensor], Tensor]
"""Of a model's outputs."""


@dataclass(frozen=True, eq=False)
class Point:
    """A model's backward pass for one batch.

    Args:
        chain: its layers, or the steps of its layer, under the paper's split.
        cotangent: the loss's, of the last state.
        gradient: the layers' parameters' as one vector, from all of g.
        following: the chain with so many strong directions of its weight in the residual path, where it has one weight.
    """

    chain: hbp.LinearizedChain
    cotangent: Tensor
    gradient: Callable[[Tensor], Tensor]
    following: Callable[[int], hbp.LinearizedChain] | None = None

    def jacobians(self) -> Tensor:
        """Of all layers, (L, B, d, d), in forward orientation: one pullback of all layers for each unit vector."""
        units, shape = torch.eye(self.cotangent.shape[-1]).to(self.cotangent), self.cotangent.shape
        pulled = [self.chain(unit.expand(len(self.chain), *shape), backend) for unit in units]
        return torch.stack(pulled, -2)

    def diagonal(self, rank: int) -> hbp.LinearOperator:
        """The Jacobians' diagonals, and the best so many directions of what these leave."""
        whole = self.jacobians()
        values = whole.diagonal(dim1=-2, dim2=-1)
        if not rank:
            return hbp.Diagonal(values)
        u, s, v = torch.linalg.svd(whole - values.diag_embed())
        return hbp.Diagonal(values) + hbp.LowRank(u[..., :rank] * s[..., None, :rank], v[..., :rank, :])


def points(model: nn.Module, task: Task, batch: Batch) -> tuple[Point, Tensor]:
    """Of a pixel GRU or a residual MLP as it stands, and the exact gradient, found in float64."""
    (inputs,), targets = tensors(batch)
    found = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            own: Any = copy.deepcopy(model).to(dtype).requires_grad_(False)
            make = _residual if hasattr(own, "stack") else _recurrent
            found.append(make(own, inputs.to(dtype), lambda outputs: loss(task, outputs, targets)))
        here, wide = found
        return here, wide.gradient(hbp.backprop(wide.chain, wide.cotangent))


def _recurrent(model: Any, inputs: Tensor, loss_of: Loss) -> Point:
    """Time steps of the recurrent layer, on the projected inputs; the loss reads the last state."""
    x = model.embed(inputs).transpose(0, 1).contiguous()
    params = hbp.cells.GRUParameters(*model.layers[0].parameters())
    h, pullback = hbp.cells.gru(params, x, torch.zeros_like(x[0]))

    def gradient(g: Tensor) -> Tensor:
        return _vector(pullback.parameters(*pullback.preactivations(g)))

    def following(rank: int) -> hbp.LinearizedChain:
        return pullback.split(directions(params.weight_hh, rank))

    return Point(pullback.chain, _cotangent(model.head, h[-1], loss_of), gradient, following)


def _residual(model: Any, inputs: Tensor, loss_of: Loss) -> Point:
    """Layers of the stack."""
    states = [model.stem(inputs)]
    for layer in model.stack:
        states.append(layer(states[-1]))
    blocks = Blocks.of([layer.block for layer in model.stack], torch.stack(states[:-1]))
    cotangent = _cotangent(model.head, states[-1], loss_of)
    return Point(hbp.LinearizedChain(blocks, hbp.Identity()), cotangent, lambda g: _vector(blocks.parameters(g[1:])))


def _cotangent(head: nn.Module, state: Tensor, loss_of: Loss) -> Tensor:
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        return torch.autograd.grad(loss_of(head(state)), state)[0]


def _vector(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True, eq=False)
class Blocks(Pullbacks):
    """Equal blocks with parameters of their own, stacked, so that they are pulled back all at once."""

    function: nn.Module
    weights: dict[str, Tensor]
    """(L, ...) each."""
    states: Tensor
    """The blocks' inputs, (L, B, d)."""

    @classmethod
    def of(cls, blocks: list[nn.Module], states: Tensor) -> Blocks:
        """Of modules."""
        return cls(copy.deepcopy(blocks[0]).to("meta"), stack_module_state(blocks)[0], states)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: slice) -> Blocks:
        key = index.indices(len(self))
        if key not in self._parts:
            weights = {name: weight[index] for name, weight in self.weights.items()}
            self._parts[key] = Blocks(self.function, weights, self.states[index])
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[Any, Blocks]:
        """What was cut from these stays linearised."""
        return {}

    @cached_property
    def _pullback(self) -> Any:
        return vjp(vmap(self._call), self.weights, self.states)[1]

    def _call(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.function, weights, x)

    @cached_property
    def _pullback_of_states(self) -> Any:
        return vjp(lambda states: vmap(self._call)(self.weights, states), self.states)[1]

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        return self._pullback_of_states(cotangents)[0]

    def parameters(self, cotangents: Tensor) -> list[Tensor]:
        """The gradients of all weights, from the cotangents of all outputs."""
        return list(self._pullback(cotangents)[0].values())
