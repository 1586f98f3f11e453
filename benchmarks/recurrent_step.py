"""Whole training steps of recurrent layers: torch.nn's, the exact backward chosen here, and Highway-BP.

Run ``python benchmarks/recurrent_step.py GRU`` (or LSTM). Milliseconds of forward and backward together, medians of
interleaved runs after a warm-up, and how many times faster than torch.nn's that is; with Highway-BP's relative error
and cosine of the gradient of all parameters (random weights and inputs).
"""

from __future__ import annotations

import argparse
import platform
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import torch

import hbp.backends.torch as hb

GRID = [(steps, batch, hidden) for steps in (256, 1024, 4096) for batch in (1, 4, 8) for hidden in (64, 128, 256)]


def step(layer: Any, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = perf_counter()
    y, _ = layer(x)
    gradients = torch.autograd.grad(y.square().mean(), list(layer.parameters()))
    return 1e3 * (perf_counter() - start), torch.cat([gradient.reshape(-1) for gradient in gradients])


def compare(kind: str, size: tuple[int, int, int], runs: int) -> tuple[float, float]:
    steps, batch, hidden = size
    torch.manual_seed(0)
    vendor = getattr(torch.nn, kind)(hidden, hidden)
    ours = getattr(hb, kind)
    layers = {"torch": vendor, "exact": ours(hidden, hidden), "k = 3": ours(hidden, hidden, iterations=3)}
    for layer in layers.values():
        layer.load_state_dict(vendor.state_dict())
    x = torch.randn(steps, batch, hidden)
    exact, found = step(vendor, x)[1].double(), step(layers["k = 3"], x)[1].double()
    error, cosine = (found - exact).norm() / exact.norm(), torch.cosine_similarity(found, exact, 0)
    step(layers["exact"], x)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(runs):
        for name, layer in layers.items():
            times[name].append(step(layer, x)[0])
    ms = {name: median(found) for name, found in times.items()}
    ratios = ms["torch"] / ms["exact"], ms["torch"] / ms["k = 3"]
    path = layers["exact"].exact_path(x)
    cells = [
        f"{ms['torch']:.1f}",
        f"{ms['exact']:.1f} ({ratios[0]:.1f}x, {path})",
        f"{ms['k = 3']:.1f} ({ratios[1]:.1f}x)",
    ]
    print(f"| {steps}, {batch}, {hidden} | {' | '.join(cells)} | {error:.1e} | {cosine:.4f} |", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["GRU", "LSTM"])
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, ms per training step")
    print("| T, B, H | torch.nn | exact | k = 3 | error | cosine |\n|---|---:|---:|---:|---:|---:|")
    ratios = list(zip(*(compare(given.kind, size, given.runs) for size in GRID), strict=True))
    for name, column in zip(("exact", "k = 3"), ratios, strict=True):
        print(f"{name}: geometric mean {geometric_mean(column):.2f}, smallest {min(column):.2f}")


if __name__ == "__main__":
    main()
