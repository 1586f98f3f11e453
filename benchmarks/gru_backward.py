"""The README's table: backward of torch.nn.GRU, the exact adjoint and Highway-BP on this machine.

Run ``python benchmarks/gru_backward.py``. Milliseconds, medians of interleaved runs after a warm-up; each with the
relative error of the gradient of all parameters (random weights, a random cotangent at every step).
"""

from __future__ import annotations

import platform
from statistics import median
from time import perf_counter
from typing import Any

import torch

import hbp.backends.torch as hb

SIZES = ((1024, 1, 64), (1024, 8, 64), (256, 16, 64), (256, 1, 512), (256, 16, 256), (128, 64, 256))
RUNS = 5


def backward(layer: Any, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    y, _ = layer(x)
    torch.manual_seed(1)
    dy = torch.randn_like(y)
    start = perf_counter()
    gradients = torch.autograd.grad(y, list(layer.parameters()), dy)
    return 1e3 * (perf_counter() - start), torch.cat([gradient.reshape(-1) for gradient in gradients])


def compare(steps: int, batch: int, hidden: int) -> str:
    torch.manual_seed(0)
    vendor = torch.nn.GRU(hidden, hidden)
    options = {"exact adjoint": {"exact": "adjoint"}, "k = 1": {"iterations": 1}, "k = 3": {"iterations": 3}}
    layers = {"torch.nn.GRU": vendor, **{name: hb.GRU(hidden, hidden, **own) for name, own in options.items()}}
    for layer in layers.values():
        layer.load_state_dict(vendor.state_dict())
    x = torch.randn(steps, batch, hidden)
    exact = backward(vendor, x)[1]
    errors = {name: (backward(layer, x)[1] - exact).norm() / exact.norm() for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(RUNS):
        for name, layer in layers.items():
            times[name].append(backward(layer, x)[0])
    cells = [f"{median(times[name]):.0f} ({errors[name]:.1e})" for name in layers]
    return f"| {steps}, {batch}, {hidden} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, ms (relative error)")
    print("| T, B, H | torch.nn.GRU | exact adjoint | k = 1 | k = 3 |\n|---|---:|---:|---:|---:|")
    for size in SIZES:
        print(compare(*size), flush=True)
