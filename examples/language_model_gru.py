"""Train a GRU on source code, character by character, with exact backprop and with Highway-BP on a schedule of k.

Needs: pip install "hbp[torch,demo]"

    python examples/language_model_gru.py --length 256 --chunk 8
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from rich.progress import track
from text import VOCABULARY, batch_of, source_text
from torch import nn

import hbp
import hbp.backends.torch as hb


class LanguageModel(nn.Module):
    def __init__(self, hidden: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.gru = hb.GRU(32, hidden, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, ids: Any) -> Any:
        return self.head(self.gru(self.embed(ids))[0])


def loss_of(model: nn.Module, ids: Any) -> Any:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, data: list[Any], title: str) -> tuple[float, float]:
    """The mean loss of the last 20 steps, and the seconds per step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    hb.follow(optimizer, model)  # the schedule of k advances with the optimiser
    losses, start = [], time.perf_counter()
    for ids in track(data, title):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:]), (time.perf_counter() - start) / len(data)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8)
    given = parser.parse_args(arguments)
    text, generator = source_text(), torch.Generator().manual_seed(0)
    data = [batch_of(text, given.length + 1, 8, generator) for _ in range(given.steps)]
    schedule = hbp.Schedule({0: 1, given.steps // 2: 3})
    methods: dict[str, dict[str, Any]] = {
        "torch.nn.GRU's backward": {"iterations": None, "exact": "library"},
        "exact adjoint": {"iterations": None, "exact": "adjoint"},
        "Highway-BP, k = 1 then 3": {"iterations": schedule, "chunk": given.chunk},
    }
    rows = []
    for title, options in methods.items():
        torch.manual_seed(0)
        model = LanguageModel(given.hidden, **options)
        if isinstance(options["iterations"], hbp.Schedule):
            hb.diagnose(model, loss_of, data[0], iterations=(0, 1, 3), chunks=(1, given.chunk))
        loss, seconds = train(model, data, title)
        rows.append({"method": title, "loss": loss, "ms_per_step": round(1e3 * seconds, 1)})
    for row in rows:
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    main()
