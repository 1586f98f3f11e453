"""A character model of the standard library's sources: the loss against wall-clock, by the backward pass."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import hbp
from benchmarks.gpu.correctness import passed
from benchmarks.gpu.machine import libraries
from benchmarks.gpu.steps import Part, There
from hbp.backends._kernels import VARIABLE

VOCABULARY = 128
"""ASCII; what is not is left out."""
SIZES = {"hidden": 512, "length": 1024, "batch": 8, "text": 8_000_000, "seconds": 25.0, "steps": 100_000, "every": 2.0}
TINY = {"hidden": 8, "length": 20, "batch": 2, "text": 20_000, "seconds": 2.0, "steps": 6, "every": 0.1}
EXACT_FROM = 0.75
"""The share of the time after which the schedule is exact."""


def parts(there: There) -> Iterator[Part]:
    """One run for each backward pass, of the same number of seconds."""
    sizes = TINY if there.rehearse else SIZES
    libraries(there)
    kernels = ",".join(name for name in passed(there) if name.startswith("torch.")) or "off"
    runs: dict[str, dict[str, Any]] = {
        "torch.nn.GRU": {},
        "exact": {"iterations": None},
        "k = 3": {"iterations": 3},
        "k = 3, chunk 8": {"iterations": 3, "chunk": 8},
        "k = 1, then 3, then exact": {"iterations": 1},
    }
    for name, options in runs.items():
        yield Part(name, partial(_train, name, options, sizes, kernels))


def sources(size: int) -> bytes:
    """The ASCII of the standard library's modules, in the order of their names."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if len(text) >= size:
            break
        data = path.read_bytes()
        text += data if data.isascii() else b""
    return text[:size]


def _model(options: dict[str, Any], hidden: int) -> Any:
    import torch

    hb = hbp.use("torch")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(VOCABULARY, 64)
            self.gru = (hb.GRU if options else torch.nn.GRU)(64, hidden, **options)
            self.head = torch.nn.Linear(hidden, VOCABULARY)

        def forward(self, text: Any) -> Any:
            logits = self.head(self.gru(self.embed(text[:-1]))[0])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten())

    torch.manual_seed(0)
    return Model()


def _train(name: str, options: dict[str, Any], sizes: dict[str, Any], kernels: str) -> dict[str, Any]:
    """Seconds of training, steps, and the loss on held-out text then, which is not timed."""
    import torch

    os.environ[VARIABLE] = kernels if options else "off"
    hb, device = hbp.use("torch"), "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.frombuffer(bytearray(sources(sizes["text"])), dtype=torch.uint8).long().to(device)
    held_out, text = text[-(len(text) // 20) :], text[: -(len(text) // 20)]
    draw = torch.Generator().manual_seed(0)

    def batch(of: Any, generator: Any) -> Any:
        starts = torch.randint(len(of) - sizes["length"] - 1, (sizes["batch"],), generator=generator).to(device)
        return of[starts[None] + torch.arange(sizes["length"] + 1, device=device)[:, None]]

    model = _model(options, sizes["hidden"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(model(batch(held_out, torch.Generator().manual_seed(1))))

    def step() -> None:
        optimizer.zero_grad()
        loss = model(batch(text, draw))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    spent, steps, since = 0.0, 0, 0.0
    curve = [(0.0, 0, held_out_loss())]
    while spent < sizes["seconds"] and steps < sizes["steps"]:
        if "then" in name:
            share = max(spent / sizes["seconds"], steps / sizes["steps"])
            hb.set_iterations(model, 1 if share < 0.4 else 3 if share < EXACT_FROM else None)
        start = perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        took = perf_counter() - start
        if steps:  # the first compiles
            spent += took
        steps += 1
        if spent - since >= sizes["every"] or steps == 1:
            curve.append((spent, steps, held_out_loss()))
            since = spent
    curve.append((spent, steps, held_out_loss()))
    return {"curve": curve, "ms_per_step": 1e3 * spent / max(steps - 1, 1), **sizes}
