"""Figures of training runs, with error bars over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Record
from experiments.methods import EXACT, LIBRARY, Backward
from experiments.results import Results

STYLES = {"highway": ("o-", "C1"), "fixed-point": ("s--", "C0")}
CLOCKS = {"step": "training step", "seconds": "seconds", "block_steps": "sequential block steps"}


def panels(count: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Any]]:
    """A figure of so many axes, three in a row at most."""
    across = min(count, 2 if count == 4 else 3)
    down = -(-count // across)
    figure = Figure(figsize=(width * across, height * down + 0.5), layout="constrained")
    flat = list(figure.subplots(down, across, squeeze=False).ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat[:count]


def against_k(results: Results, tasks: Sequence[str] | None = None) -> Figure:
    """The task's metric at the end against k, of Highway-BP and the fixed point, exact backprop as a line."""
    names = [task for task in results.tasks if tasks is None or task in tasks]
    figure, axes = panels(len(names))
    for axis, task in zip(axes, names, strict=True):
        metric = results.metric(task)
        exact = results.final(task, EXACT)
        if exact is not None and math.isfinite(exact.mean):
            axis.axhline(exact.mean, color="black", label="exact backprop")
            axis.axhspan(exact.mean - exact.deviation, exact.mean + exact.deviation, color="black", alpha=0.15)
        for method in dict.fromkeys(Backward(m.kind, 0, m.chunk) for m in results.methods(task) if m.kind in STYLES):
            _line(axis, results, task, method)
        axis.set(xlabel="iterations k", ylabel=metric, title=results.title(task))
        if metric == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    return figure


def _line(axis: Any, results: Results, task: str, family: Backward) -> None:
    """Of the methods that differ from one another in k alone."""
    points = []
    for method in results.methods(task, family.kind):
        k = method.iterations
        found = results.final(task, method)
        if isinstance(k, int) and method == Backward(family.kind, k, family.chunk) and found is not None:
            points.append((k, found.mean, found.deviation))
    kept = sorted(point for point in points if math.isfinite(point[1]))
    if kept:
        style, color = STYLES[family.kind]
        label = Backward(family.kind, None, family.chunk).label
        color = color if family.chunk == 1 else f"C{int(math.log2(family.chunk)) + 2}"
        k, mean, deviation = zip(*kept, strict=True)
        axis.errorbar(k, mean, deviation, fmt=style, color=color, capsize=3, markersize=4, label=label)


def curves(
    axis: Any, results: Results, task: str, clock: str, methods: Sequence[Backward] | None = None, name: str = "loss"
) -> None:
    """Validation curves against a clock: means over seeds, with their standard deviation as a band.

    A method has the same colour in all panels.
    """
    known = list(dict.fromkeys(method for task in results.tasks for method in results.methods(task)))
    for method in results.methods(task) if methods is None else methods:
        records = [record for record in results.records(task, method) if record["finished"]]
        if not records:
            continue
        x, y = (over_seeds(records, which) for which in (clock, name))
        color = {EXACT: "black", LIBRARY: "gray"}.get(method, f"C{known.index(method) % 10}")
        axis.plot(x[0], y[0], color=color, label=method.label, linewidth=1.5)
        axis.fill_between(x[0], y[0] - y[1], y[0] + y[1], color=color, alpha=0.15)
    axis.set(xlabel=CLOCKS[clock], ylabel=f"validation {name}", title=results.title(task))


def over_seeds(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A validation curve's mean and standard deviation over the seeds."""
    columns = zip(*(record["validation"][name] for record in records), strict=False)
    rows = [[math.nan if value is None else value for value in row] for row in columns]
    spread = [stdev(row) if len(row) > 1 and all(map(math.isfinite, row)) else 0.0 for row in rows]
    return np.array([fmean(row) for row in rows]), np.array(spread)


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(2 * len(axes) - 1, 3), fontsize=8)


def grid(results: Results, draw: Callable[[Any, str], None]) -> Figure:
    """A panel for each task."""
    figure, axes = panels(len(results.tasks))
    for axis, task in zip(axes, results.tasks, strict=True):
        draw(axis, task)
    legend(figure, axes)
    return figure
