"""Train a GRU by hand on the adding problem, in NumPy or CuPy, with exact backprop and with Highway-BP.

Each step of a sequence holds a random number and a mark; the target is the sum of the two marked numbers, which may
be far apart. Without automatic differentiation the GRU's gradient is the pullback of `hbp.cells.gru`, the head's is
written down. Needs: pip install hbp, or "hbp[cupy-cuda12]" for --library cupy

    python examples/adding_arrays.py --length 60 --iterations 1 3 --chunk 8
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

import hbp

BATCH = 64


def draw(xp: Any, rng: Any, length: int) -> tuple[Any, Any]:
    """Sequences (T, B, 2), and the sums of their marked numbers (B,): one of each half."""
    values, batch = rng.random((length, BATCH), dtype=xp.float32), xp.arange(BATCH)
    first, second = ((rng.random(BATCH) * (length // 2)).astype(int) + half for half in (0, length // 2))
    marks = xp.zeros_like(values)
    marks[first, batch] = marks[second, batch] = 1
    return xp.stack([values, marks], -1), (values * marks).sum(0)


def start(xp: Any, rng: Any, hidden: int) -> list[Any]:
    """The GRU's weights and biases, and the head's weights and bias."""
    shapes = (3 * hidden, 2), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,), (hidden,)
    drawn = [(2 * rng.random(shape, dtype=xp.float32) - 1) / hidden**0.5 for shape in shapes]
    return [*drawn, xp.zeros(1, xp.float32)]


def gradients(xp: Any, weights: list[Any], x: Any, target: Any, solver: hbp.Solver) -> tuple[float, list[Any]]:
    """The mean squared error and its gradients."""
    *cell, head, bias = weights
    h, pullback = hbp.cells.gru(hbp.cells.GRUParameters(*cell), x, xp.zeros((BATCH, len(head)), xp.float32))
    error = h[-1] @ head + bias - target
    d = 2 * error / BATCH
    dh = xp.zeros_like(h)  # only the last state counts
    dh[-1] = d[:, None] * head
    dparams, _, _ = pullback(dh, solver=solver, with_inputs=False)
    return float((error * error).mean()), [*dparams, d @ h[-1], d.sum(keepdims=True)]


def train(xp: Any, steps: int, length: int, hidden: int, solver: hbp.Solver) -> float:
    """The mean loss of the last 20 steps of Adam."""
    rng = xp.random.default_rng(0)
    weights = start(xp, rng, hidden)
    first, second = ([xp.zeros_like(w) for w in weights] for _ in range(2))
    losses = []
    for step in range(1, steps + 1):
        loss, found = gradients(xp, weights, *draw(xp, rng, length), solver)
        losses.append(loss)
        for w, m, v, g in zip(weights, first, second, found, strict=True):
            m += 0.1 * (g - m)
            v += 0.01 * (g * g - v)
            w -= 0.01 * (m / (1 - 0.9**step)) / (xp.sqrt(v / (1 - 0.99**step)) + 1e-8)
    return sum(losses[-20:]) / len(losses[-20:])


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", choices=["numpy", "cupy"], default="numpy")
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 3], help="Highway-BP's k")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args(arguments)
    xp, rows = import_module(given.library), []
    for k in (None, *given.iterations):
        solver = hbp.Solver(k, 1 if k is None else given.chunk)
        loss = train(xp, given.steps, given.length, given.hidden, solver)
        rows.append({"k": k, "chunk": solver.chunk, "loss": loss})
        print(json.dumps(rows[-1]))
    return rows


if __name__ == "__main__":
    main()
