"""The plots, from a document's rows."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import product
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.crossover import kind
from benchmarks.precision import LOWER
from benchmarks.tables import Rows, cases_of, method_of, title

EXACT = 1e-7
"""The error at which the logarithmic axis of errors ends."""
COLORS = {"library": "tab:gray", "scan": "tab:green", "exact": "tab:blue", "highway": "tab:orange"}
LABELS = {
    "library": "torch.nn's own",
    "scan": "jitted lax.scan",
    "exact": "hbp, exact",
    "highway": "Highway-BP, k = 1 or 3",
}


def _panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    across = min(count, 2 if count == 4 else 3)
    down = -(-count // across)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across, height * down + 1), squeeze=False, layout="constrained"
    )
    flat = list(axes.ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat


def scan_speed(rows: Rows) -> Any:
    """Milliseconds against T, a panel for each width."""
    widths = sorted({(row["case"]["B"], row["case"]["D"]) for row in rows})
    figure, axes = _panels(len(widths), 6.5, 4.5)
    for axis, width in zip(axes, widths, strict=False):
        own = [row for row in rows if (row["case"]["B"], row["case"]["D"]) == width]
        for name in dict.fromkeys((row["library"], row["method"]) for row in own):
            points = sorted((r["case"]["T"], r["whole_ms"][0]) for r in own if (r["library"], r["method"]) == name)
            style = {"linewidth": 2.5} if name[1].startswith("hbp") else {"linewidth": 1, "linestyle": "--"}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name[0]}: {name[1]}", **style)
        _logarithmic(axis, "T", f"diagonal scan, B = {width[0]}, D = {width[1]}")
        axis.set(yscale="log", ylabel="ms")
    _legend(figure, axes)
    return figure


def error_against_time(rows: Rows) -> Any:
    """The gradient's error against the backward's milliseconds, a panel for each case."""
    rows = [row for row in rows if row["error"] is not None]
    cases = [pair for pair in cases_of(rows) if any(not row["exact"] for row in pair[1])]
    if not cases:
        return None
    figure, axes = _panels(len(cases))
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    for axis, (case, members) in zip(axes, cases, strict=False):
        for row in (row for row in members if row["exact"]):
            style = {"marker": "*" if row["ours"] else "s", "color": f"C{libraries.index(row['library'])}"}
            style |= {"markerfacecolor": "none"} if row["method"].endswith(LOWER) else {}
            name = f"{row['library']}: {re.sub(r' [(].*[)]', '', row['method'])}"
            axis.plot(row["backward_ms"][0], max(row["error"], EXACT), linestyle="", label=name, **style)
        for lib, (method, chunk, line) in product(libraries, _LINES):
            part = [r for r in members if (r["library"], r["method"], r["chunk"]) == (lib, method, chunk)]
            if part:
                points = [(r["backward_ms"][0], max(r["error"], EXACT)) for r in part]
                name = f"{lib}: {method_of(part[0] | {'k': None})}"
                axis.plot(*zip(*points, strict=True), line, marker=".", color=f"C{libraries.index(lib)}", label=name)
        _logarithmic(axis, "backward, ms", title(case))
        axis.set(yscale="log", ylabel="relative error")
    _legend(figure, axes)
    return figure


_LINES = (
    ("Highway-BP", 1, "-"),
    ("Highway-BP (kernels)", 1, "-."),
    ("Highway-BP", 8, "--"),
    ("fixed point", 1, ":"),
    (f"Highway-BP{LOWER}", 1, "--"),
    ("Highway-BP, rank 16", 1, "--"),
    ("Highway-BP, rank 16 (kernels)", 1, "-."),
)


def _logarithmic(axis: Any, label: str, heading: str) -> None:
    axis.set(xscale="log", xlabel=label)
    axis.set_title(heading, fontsize=9)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend for all panels, below them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, fontsize=7)


def speed(rows: Rows) -> Any:
    """The whole step's milliseconds against T, B and H, where a table has several of them."""
    axes_of = [name for name in "TBH" if len({row["case"][name] for row in rows}) > 1]
    cells = sorted({row["case"]["cell"] for row in rows})
    if not axes_of:
        return None
    figure, axes = _panels(len(axes_of) * len(cells))
    panels = [(cell, name) for cell in cells for name in axes_of]
    for axis, (cell, name) in zip(axes, panels, strict=False):
        own = [r for r in rows if r["case"]["cell"] == cell and _kind(r) and "setting" not in r["case"]]
        fixed = _widest([r["case"] for r in own], name)
        part = [r for r in own if all(r["case"][key] == value for key, value in fixed.items())]
        for label in dict.fromkeys((r["library"], method_of(r)) for r in part):
            points = sorted((r["case"][name], r["whole_ms"][0]) for r in part if (r["library"], method_of(r)) == label)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{label[0]}: {label[1]}")
        heading = f"{cell.upper()}, {', '.join(f'{key} = {value}' for key, value in fixed.items())}"
        _logarithmic(axis, name, heading)
        axis.set(yscale="log", ylabel="whole step, ms")
    _legend(figure, axes)
    return figure


def _widest(cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The other sizes at which most values of this one were measured; of several such the middle ones."""
    others, spans = [key for key in "TBH" if key != name], defaultdict[Any, set[int]](set)
    for case in cases:
        spans[tuple(case[key] for key in others)].add(case[name])
    most = max(map(len, spans.values()))
    widest = sorted(sizes for sizes, found in spans.items() if len(found) == most)
    return dict(zip(others, widest[len(widest) // 2], strict=True))


def _kind(row: dict[str, Any]) -> str | None:
    return kind(row["method"], row["k"], row["chunk"])


def crossover(rows: Rows) -> Any:
    """Who has the fastest whole step over T and B, a panel for each cell and H, and by what factor."""
    panels = sorted({(r["case"]["cell"], r["case"]["H"]) for r in rows})
    figure, axes = _panels(len(panels), 5, 4)
    for axis, (cell, size) in zip(axes, panels, strict=False):
        part = [r for r in rows if (r["case"]["cell"], r["case"]["H"]) == (cell, size)]
        steps, batches = (sorted({r["case"][name] for r in part}) for name in "TB")
        for (i, T), (j, B) in ((t, b) for t in enumerate(steps) for b in enumerate(batches)):
            here = [r for r in part if (r["case"]["T"], r["case"]["B"]) == (T, B)]
            if not here:
                continue
            fastest, text = _ranking(here)
            axis.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, color=COLORS[fastest], alpha=0.6))
            axis.text(j, i, text, ha="center", va="center", fontsize=8)
        axis.set(xticks=range(len(batches)), yticks=range(len(steps)), xlim=(-0.5, len(batches) - 0.5))
        axis.set(ylim=(-0.5, len(steps) - 0.5), xticklabels=batches, yticklabels=steps, xlabel="B", ylabel="T")
        axis.set_title(f"{cell.upper()}, H = {size}: speed of a whole step against torch.nn's", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.6) for color in COLORS.values()]
    figure.legend(
        handles, [f"fastest: {LABELS[one]}" for one in COLORS], loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def _ranking(rows: Rows) -> tuple[str, str]:
    """The fastest kind, and the others' speed against the library's own, with what an approximation is off by."""
    ranking = sorted(rows, key=lambda row: row["whole_ms"][0])
    best = {str(_kind(row)): row for row in reversed(ranking)}
    lines = []
    for name, row in sorted(best.items(), key=lambda item: item[1]["whole_ms"][0]):
        if name != "library" and "library" in best:
            factor = best["library"]["whole_ms"][0] / row["whole_ms"][0]
            error, own = row["error"], LABELS[name] if row["exact"] else f"k = {row['k']}"
            lines.append(f"{own}: {factor:.2f}x{'' if row['exact'] else f', {error:.1%} off'}")
    return str(_kind(ranking[0])), "\n".join(lines)


def memory(rows: Rows) -> Any:
    """Bars of the bytes saved and of the peak."""
    cases = list(cases_of(rows))
    figure, axes = _panels(len(cases), 6, 4)
    for axis, (case, members) in zip(axes, cases, strict=False):
        at = np.arange(len(members))
        for shift, (name, label) in enumerate(
            (("saved_bytes", "saved for backward"), ("peak_bytes", "peak of a step"))
        ):
            axis.barh(at + 0.4 * shift, [(row[name] or 0) / 1e6 for row in members], 0.4, label=label)
        axis.set_yticks(at + 0.2, [f"{row['library']}: {method_of(row)}" for row in members], fontsize=6)
        axis.set_title(title(case), fontsize=9)
        axis.set(xlabel="MB")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    return figure
