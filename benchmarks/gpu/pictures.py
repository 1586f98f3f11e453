"""The plots of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import plots, tables

PANELS = 6
"""Cases that one picture of errors shows at most."""


def draw(folder: Path, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Those whose step has results; returns the files."""
    made = []
    figures = {
        "scan": _scan(_rows(results, "scan")),
        "rnn": _errors(_rows(results, "rnn")),
        "stack": _errors(_rows(results, "stack")),
        "blocks": _errors(_rows(results, "blocks")),
        "memory": plots.memory(rows) if (rows := _rows(results, "memory")) else None,
        "training": _training(results.get("training", {})),
    }
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plots.plt.close(figure)
            made.append(path)
    return made


def _rows(results: dict[str, dict[str, Any]], step: str) -> tables.Rows:
    return [row for rows in results.get(step, {}).values() for row in rows if row["failed"] is None]


def _scan(rows: tables.Rows) -> Any:
    own = [row for row in rows if row["case"].get("maps") is None and row["case"].get("dtype", "float32") == "float32"]
    return plots.scan_speed(own) if own else None


def _errors(rows: tables.Rows) -> Any:
    """Of the first cases, which decide most."""
    keep = [case for case, _ in tables.cases_of(rows)][:PANELS]
    return plots.error_against_time([row for row in rows if row["case"] in keep])


def _training(runs: dict[str, Any]) -> Any:
    if not runs:
        return None
    figure, axis = plots.plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, run in runs.items():
        seconds, _, losses = zip(*run["curve"], strict=True)
        axis.plot(seconds, losses, marker="o", markersize=2, label=f"{name} ({run['ms_per_step']:.3g} ms a step)")
    axis.set(xlabel="seconds of training", ylabel="loss on held-out text, nats", title="Character GRU")
    axis.legend(fontsize=8)
    return figure
