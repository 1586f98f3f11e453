"""The steps of a user's own gated cell, all at once, as autograd knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hbp.core.backend import Backend
from hbp.core.pullbacks import Pullbacks

Cell: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def checked(pair: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and update as a cell returned them; TypeError or ValueError where they are no tensors like its state."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(f"the cell returned a {type(pair).__name__}; expected two tensors, (gate, update)")
    for name, part in zip(("gate", "update"), pair, strict=True):
        if part.shape != h.shape or part.dtype != h.dtype:
            raise ValueError(
                f"the cell's {name} is {part.dtype} of shape {tuple(part.shape)}; "
                f"the state is {h.dtype} of shape {tuple(h.shape)}"
            )
    return pair


@dataclass(frozen=True, eq=False)
class CellBlocks(Pullbacks):
    """The blocks of a gated cell's steps, by one graph through all of them, built when it is first needed."""

    cell: Cell
    h: Tensor
    """The states before the steps, (T, B, H)."""
    x: Tensor
    cut: dict[tuple[Any, ...], CellBlocks] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.h)

    def __getitem__(self, index: slice) -> CellBlocks:
        key = (index.start, index.stop, index.step)
        if key not in self.cut:  # every iteration cuts alike, and a graph is worth keeping
            self.cut[key] = CellBlocks(self.cell, self.h[index], self.x[index])
        return self.cut[key]

    @cached_property
    def graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """The states as leaves of the graph, and gate and update as its ends."""
        with torch.enable_grad():
            h = self.h.detach().requires_grad_()
            gate, update = checked(self.cell(h, self.x), h)
        return h, gate, update

    def pull(self, cotangents: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        """The cotangents of some leaves of the graph, the states' own path apart; zeros where one is not read."""
        h, gate, update = self.graph
        ends = [(end, g) for end, g in ((gate, cotangents * h.detach()), (update, cotangents)) if end.requires_grad]
        if not ends or not leaves:
            return [torch.zeros_like(leaf) for leaf in leaves]
        outputs, gradients = zip(*ends, strict=True)
        kept = {"retain_graph": True, "create_graph": cotangents.requires_grad, "allow_unused": True}
        found = torch.autograd.grad(outputs, leaves, gradients, **kept)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    def __call__(self, cotangents: Tensor, backend: Backend) -> Tensor:
        return self.pull(cotangents, (self.graph[0],))[0]

    def along(self, rows: Tensor) -> Tensor:
        """The blocks' Jacobians times some directions, (r, H): (T, B, H, r), by the pullback of their pullback."""
        h = self.graph[0]
        with torch.enable_grad():
            cotangents = torch.zeros_like(h).requires_grad_()
            (pulled,) = self.pull(cotangents, (h,))
        if not pulled.requires_grad:  # neither gate nor update reads h
            return torch.zeros_like(h)[..., None] * rows.T
        columns = [torch.autograd.grad(pulled, cotangents, row.expand_as(h), retain_graph=True)[0] for row in rows]
        return torch.stack(columns, -1)
