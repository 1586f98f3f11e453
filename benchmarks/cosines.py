"""How near each residual path comes to the exact gradient, early and late in training: cosine against k.

    python -m benchmarks.cosines benchmarks/results/cpu/cosines.json docs/ranks.png
    python -m benchmarks.cosines benchmarks/results/cpu/cosines.json docs/ranks.png --draw

A GRU and an LSTM read scikit-learn's digits pixel by pixel and are trained by exact backprop; the second command draws
what the first has measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import hbp
from benchmarks.environment import environment
from benchmarks.measure import library
from hbp.backends.numpy import backend
from hbp.core.solver import Solver
from hbp.demo.model import Adam, Classifier, Model, digits, initial
from hbp.diagnosis import Agreement

CHUNK, BATCH, RATE, MEASURED = 8, 64, 5e-3, 4
Path_ = tuple[int, int | Literal["auto"]]
"""A chunk, and a rank."""
PATHS: dict[str, Path_] = {
    "gate alone": (1, 0),
    f"gate, chunk {CHUNK}": (CHUNK, 0),
    "rank 8": (1, 8),
    "rank 16": (1, 16),
    "rank auto": (1, "auto"),
}
STYLES = ("#777777 o :", "#E69F00 s --", "#56B4E9 ^ -", "#0072B2 v -", "#D55E00 D -.")
"""Of the paths, in their order: a colour that the colour-blind tell apart (Okabe and Ito, 2008), marker and dashes."""


def measured(
    cell: str, steps: Sequence[int], ks: Sequence[int], hidden: int = 64, paths: dict[str, Path_] = PATHS
) -> list[dict[str, Any]]:
    """A row for each path after each of these numbers of steps: the mean cosine of a few batches' gradients by k."""
    data, model, rng = digits(np), Model(cell, backend), np.random.default_rng(0)
    state = Adam.start(_remembering(cell, initial(cell, hidden, 0, np)), backend)

    def batch() -> tuple[Any, Any]:
        chosen = rng.integers(0, len(data.train_y), BATCH)
        return data.train_x[:, chosen], data.train_y[chosen]

    rows: list[dict[str, Any]] = []
    for step in range(max(steps) + 1):
        if step in steps:
            batches = [batch() for _ in range(MEASURED)]
            right = float(model.correct(state.model, data.test_x, data.test_y)) / len(data.test_y)
            taken = hbp.directions(state.model.cell.weight_hh, "auto").rank
            at = {"cell": cell, "step": step, "accuracy": right, "auto": taken}
            rows += [{**at, "path": name, "k": list(ks), "cosine": _cosines(model, state.model, batches, path, ks)}
                     for name, path in paths.items()]  # fmt: skip
        x, y = batch()
        _, dlogits, states = model.forward(state.model, x, y)
        gradient = model.backward(state.model, x, dlogits, states, solver=Solver())
        state = state.step(gradient, RATE * (1 + math.cos(math.pi * step / (max(steps) + 1))) / 2)
    return rows


def _remembering(cell: str, model: Classifier) -> Classifier:
    """The classifier with a bias of 1 on an LSTM's forget gates."""
    if cell != "lstm":
        return model
    bias, size = model.cell.bias_ih.copy(), model.cell.weight_hh.shape[1]
    bias[size : 2 * size] += 1
    return model._replace(cell=model.cell._replace(bias_ih=bias))


def _cosines(
    model: Model, at: Classifier, batches: Sequence[tuple[Any, Any]], path: Path_, ks: Sequence[int]
) -> list[float]:
    """With the exact gradient of the cell's weights, for each k."""
    (chunk, rank), total = path, np.zeros(len(ks))
    for x, y in batches:
        _, dlogits, states = model.forward(at, x, y)
        exact = model.backward(at, x, dlogits, states, solver=Solver()).cell
        for i, k in enumerate(ks):
            found = model.backward(at, x, dlogits, states, solver=Solver(k, chunk), rank=rank).cell
            total[i] += Agreement.of(found, exact, backend).cosine
    return [float(value) for value in total / len(batches)]


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """A panel for each cell, early and late, with a line for each path."""
    from matplotlib.figure import Figure

    cells, steps = (list(dict.fromkeys(row[name] for row in rows)) for name in ("cell", "step"))
    figure = Figure(figsize=(4.2 * len(steps), 2.9 * len(cells) + 0.6), layout="constrained")
    grid = figure.subplots(len(cells), len(steps), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axes = grid[cells.index(row["cell"])][steps.index(row["step"])]
        color, marker, dashes = STYLES[list(PATHS).index(row["path"])].split()
        label = row["path"].replace("rank auto", 'rank "auto"')
        axes.plot(row["k"], row["cosine"], color=color, marker=marker, linestyle=dashes, markersize=5, label=label)
        title = f"{row['cell'].upper()} after {row['step']} steps, {row['accuracy']:.0%} right"
        axes.set_title(f'{title}; "auto" takes {row["auto"]}', fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("iterations k")
        axes.set_xticks(rows[0]["k"])
    for line in grid:
        line[0].set(
            ylabel="cosine with the exact gradient", ylim=(min(0.0, *(min(row["cosine"]) for row in rows)), 1.03)
        )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PATHS), fontsize=9)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="the result")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--draw", action="store_true", help="only draw the picture of a result that is there")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 1200], help="of training, after which to measure")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6], metavar="K")
    options = parser.parse_args()
    if not options.draw:
        rows = [row for cell in ("gru", "lstm") for row in measured(cell, options.steps, options.iterations)]
        where = environment([library("numpy")], with_limits=False)
        settings = {"hidden": 64, "batch": BATCH, "rate": RATE, "batches measured": MEASURED}
        options.json.write_text(json.dumps({"environment": where, **settings, "rows": rows}, indent=1) + "\n")
    draw(json.loads(options.json.read_text())["rows"], options.picture)


if __name__ == "__main__":
    main()
