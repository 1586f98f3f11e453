"""A recurrent layer in PyTorch that is a loop over steps: the paper's setting, written fairly."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Loop(nn.Module):
    """A layer that runs PyTorch's cell one step after another; returns all states h, (T, B, H), and all c or None."""

    def __init__(self, cell: type[nn.RNNCellBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = cell(inputs, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """From states of zeros."""
        zero = x.new_zeros((x.shape[1], self.cell.hidden_size))
        pair = isinstance(self.cell, nn.LSTMCell)
        state, states = (zero, zero) if pair else zero, []
        for row in x.unbind(0):  # indexing would cost the backward pass a whole array of zeros at each step
            state = self.cell(row, state)
            states.append(state)
        if not pair:
            return torch.stack(states), None
        h, c = (torch.stack(entries) for entries in zip(*states, strict=True))
        return h, c
