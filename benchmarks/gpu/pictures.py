"""The plots of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import plots, tables
from benchmarks.crossover import kind

PANELS = 6
"""Cases that one picture of errors shows at most."""


def draw(folder: Path, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Those whose step has results; returns the files."""
    made = []
    figures = {
        "scan": _scan(tables.of_parts(results.get("scan", {}))),
        "rnn": _errors(tables.of_parts(results.get("rnn", {}))),
        "rank": _errors(tables.of_parts(results.get("rank", {}))),
        "rnn-crossover": _crossover(tables.of_parts(results.get("rnn", {}))),
        "stack": _errors(tables.of_parts(results.get("stack", {}))),
        "blocks": _errors(tables.of_parts(results.get("blocks", {}))),
        "memory": plots.memory(rows) if (rows := tables.of_parts(results.get("memory", {}))) else None,
        "training": _training(results.get("training", {})),
    }
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plots.plt.close(figure)
            made.append(path)
    return made


def _scan(rows: tables.Rows) -> Any:
    own = [row for row in rows if row["case"].get("maps") is None and row["case"].get("dtype", "float32") == "float32"]
    return plots.scan_speed(own) if own else None


def _errors(rows: tables.Rows) -> Any:
    """Of a few cases, from small to large."""
    cases = [case for case, _ in tables.cases_of(rows)]
    keep = cases[:: -(-len(cases) // PANELS) or 1]
    return plots.error_against_time([row for row in rows if row["case"] in keep])


def _crossover(rows: tables.Rows) -> Any:
    """Who is fastest where, in PyTorch."""
    own = [r for r in rows if r["library"] == "torch" and kind(r["method"], r["k"], r["chunk"])]
    return plots.crossover(own) if own else None


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
