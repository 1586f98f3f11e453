"""What a comparison leaves behind: a table, a JSON file with every figure, and a plot."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.table import Table

import hbp
from hbp.availability import Availability
from hbp.demo.compare import Run, Settings
from hbp.demo.model import LENGTH

mpl.use("Agg")  # a file is written, no window is opened

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

LAST = 20
COLUMNS = ("method", "k", "chunk", "rank", "accu-\nracy", "loss", "cosine", "ms/step", "back-\nward", "block\nsteps")
CAPTION = (
    "k: rounds of Highway-BP, in the mean where the tolerance ends them (with a rank, unless it is none); accuracy on "
    "the test images, as last measured (every 50 steps and at the end); loss: mean of the last 20 steps; cosine: mean "
    "over training, with the exact gradient of the cell's weights; ms/step: median, and how much of it is the "
    "backward; block steps: those of a backward that follow one another on any machine, beside scans of the residual "
    "path"
)


def summary(run: Run) -> dict[str, Any]:
    """The row of one run: final accuracy, mean loss of the last 20 steps, mean cosine, median times, block steps."""
    return {
        "method": run.method,
        "iterations": run.iterations,
        "chunk": run.chunk,
        "rank": run.rank,
        "tolerance": run.tolerance,
        "mean_rounds": run.k,
        "steps": len(run.losses),
        "test_accuracy": run.accuracies[-1][1] if run.accuracies else None,
        "final_loss": fmean(run.losses[-LAST:]),
        "mean_cosine": fmean(run.cosines),
        "ms_per_step": run.ms_per_step,
        "backward_share": median(run.backward_ms) / run.ms_per_step,
        "block_steps": run.block_steps(LENGTH),
    }


def table(runs: list[Run], title: str) -> Table:
    """The runs, a row each."""
    rendered = Table(title=title, caption=CAPTION, collapse_padding=True)
    for column in COLUMNS:
        rendered.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in map(summary, runs):
        accuracy = row["test_accuracy"]
        rendered.add_row(
            row["method"],
            "-" if row["mean_rounds"] is None else f"{row['mean_rounds']:.3g}",
            str(row["chunk"]),
            str(row["rank"]),
            "-" if accuracy is None else f"{accuracy:.1%}",
            f"{row['final_loss']:.3f}",
            f"{row['mean_cosine']:.3f}",
            f"{row['ms_per_step']:.1f}",
            f"{row['backward_share']:.0%}",
            f"{row['block_steps']:.3g}",
        )
    return rendered


def write_json(runs: list[Run], settings: Settings, backend: Availability, path: Path) -> None:
    """Every figure, with the settings, versions and machine they belong to."""
    document = {
        "settings": asdict(settings),
        "complete": all(len(run.losses) == settings.steps for run in runs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "hbp": hbp.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            settings.backend: backend.version,
        },
        "machine": {"processor": platform.machine(), "system": platform.system(), "device": backend.device},
        "runs": [
            summary(run)
            | {name: getattr(run, name) for name in ("losses", "rounds", "cosines", "accuracies")}
            | {name: getattr(run, name) for name in ("forward_ms", "backward_ms", "update_ms")}
            for run in runs
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(runs: list[Run], settings: Settings, path: Path) -> None:
    """Loss against steps, loss against time, and accuracy against k."""
    figure, (by_step, by_time, by_k) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for run, style in zip(runs, _styles(runs), strict=True):
        smooth = _smoothed(run.losses)
        by_step.plot(range(1, len(smooth) + 1), smooth, label=run.label, **style)
        by_time.plot(np.arange(1, len(smooth) + 1) * (run.ms_per_step / 1e3), smooth, **style)
    by_step.set(xlabel="training step", ylabel="loss (running mean)", title="Loss against steps")
    by_time.set(xlabel="steps x median time per step (s)", title="Loss against time")
    _accuracy_against_k(runs, by_k)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 5))
    figure.suptitle(f"{settings.cell.upper()} on digits pixel by pixel ({LENGTH} steps), {settings.backend}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _accuracy_against_k(runs: list[Run], axes: Axes) -> None:
    measured = [run for run in runs if run.accuracies]
    families: dict[str, list[Run]] = {}
    for run in measured:
        if run.k is None:
            axes.axhline(run.accuracies[-1][1], color="black", linewidth=2, label="exact")
        else:
            families.setdefault(run.family, []).append(run)
    for family, members in families.items():
        points = sorted((run.k or 0, run.accuracies[-1][1]) for run in members)
        axes.plot(*zip(*points, strict=True), marker="o", label=family)
    axes.set(xlabel="iterations k", ylabel="test accuracy", title="Accuracy against k")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measured:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves


def _styles(runs: list[Run]) -> list[dict[str, Any]]:
    """Black for exact; one dash pattern per method, chunk and rank, one colour per k."""
    others = [run for run in runs if not run.solver.exact]
    ks = sorted({-1 if run.iterations is None else run.iterations for run in others})
    families = list(dict.fromkeys(run.family for run in others))
    dashes = ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))]
    return [
        {"color": "black", "linewidth": 2.5}
        if run.solver.exact
        else {
            "color": f"C{ks.index(-1 if run.iterations is None else run.iterations) % 10}",
            "linestyle": dashes[families.index(run.family) % len(dashes)],
            "linewidth": 1.3,
        }
        for run in runs
    ]


def _smoothed(values: list[float], window: int = LAST) -> list[float]:
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
