"""Recurrent models on hbp's GRU and LSTM, in parallel over time, layer after layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hbp.backends.torch as hb
from experiments.models import sizes as s

CELLS: dict[str, Any] = {"gru": hb.GRU, "lstm": hb.LSTM}


class Layers(nn.ModuleList):
    """Recurrent layers (B, T, H) -> (B, T, H), each after the first beside a residual connection.

    The paper's parameter counts (29.8k of the pixel GRU) say one bias per gate where PyTorch has two: the recurrent
    ones are zero and stay so, counted nowhere. In the GRU that leaves out the bias that the reset gate scales.
    """

    def __init__(self, cell: str, hidden: int, layers: int, remembers: int | None = None) -> None:
        super().__init__(CELLS[cell](hidden, hidden, batch_first=True) for _ in range(layers))
        for layer in self:
            nn.init.zeros_(layer.bias_hh_l0).requires_grad_(False)
            if remembers is not None:
                forget = torch.empty(hidden).uniform_(1, remembers - 1).log()
                with torch.no_grad():
                    layer.bias_ih_l0[: 2 * hidden] = torch.cat([-forget, forget])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self):
            h = layer(x)[0]
            x = x + h if i else h
        return x


class RecurrentLM(nn.Module):
    """Symbols (B, T) to logits (B, T, V)."""

    def __init__(self, sizes: s.RecurrentLM) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = Layers(sizes.cell, sizes.hidden, sizes.layers)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(symbols)))


class RecurrentClassifier(nn.Module):
    """Sequences (B, T, I) to logits (B, classes), or numbers."""

    def __init__(self, sizes: s.RecurrentClassifier) -> None:
        super().__init__()
        self.embed = nn.Linear(sizes.inputs, sizes.hidden)
        self.layers = Layers(sizes.cell, sizes.hidden, sizes.layers, sizes.remembers)
        self.head = nn.Sequential(
            nn.Linear(sizes.hidden, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, sizes.outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x))[:, -1])
