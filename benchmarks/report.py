"""Tables and plots, from a JSON alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.crossover import kind

Rows = list[dict[str, Any]]
EXACT = 1e-7
"""The error at which the logarithmic axis of errors ends."""

COLORS = {"library": "tab:gray", "exact": "tab:blue", "highway": "tab:orange"}
LABELS = {"library": "the library's own", "exact": "hbp, exact", "highway": "Highway-BP, k = 1 or 3"}


def write(path: Path) -> list[Path]:
    """Write the Markdown table and the plots of a JSON beside it; returns all files, the JSON first."""
    document = json.loads(path.read_text())
    table, rows = document["table"], [row for row in document["rows"] if row["failed"] is None]
    markdown = path.with_suffix(".md")
    markdown.write_text(f"{_where(document)}\n\n{''.join(_tables(table, rows))}")
    pictures = {
        "scan": [("", _scan_speed)],
        "rnn": [("-error", _error_against_time), ("-speed", _speed)],
        "crossover": [("", _crossover), ("-speed", _speed)],
        "stack": [("-error", _error_against_time)],
        "memory": [("", _memory)],
    }[table]
    made = [path, markdown]
    for suffix, draw in pictures:
        figure = draw(rows)
        if figure is not None:
            target = path.with_name(f"{path.stem}{suffix}.png")
            figure.suptitle(_where(document), fontsize=8)
            figure.savefig(target, dpi=120, bbox_inches="tight")
            plt.close(figure)
            made.append(target)
    return made


def _where(document: dict[str, Any]) -> str:
    there = document["environment"]
    devices = ", ".join(f"{name} {there['versions'].get(name, '')} on {at}" for name, at in there["devices"].items())
    return (
        f"{there['processor']}, {there['cores']} cores; {devices}; commit {there['commit']}, {there['date'][:10]}, "
        f"medians of {document['rounds']} interleaved rounds"
    )


def _cases(rows: Rows) -> Iterator[tuple[dict[str, Any], Rows]]:
    for _, group in groupby(rows, key=lambda row: row["case"]):
        members = list(group)
        yield members[0]["case"], members


def _title(case: dict[str, Any]) -> str:
    shown = {name: value for name, value in case.items() if name not in ("cell", "weights", "setting")}
    extra = f", weights x {case['weights']:g}" if case.get("weights", 1) != 1 else ""
    sizes = ", ".join(f"{name} = {value}" for name, value in shown.items())
    return f"{case.get('cell', '').upper()} {sizes}{extra}".strip()


def _name(row: dict[str, Any]) -> str:
    k = "" if row["k"] is None else f", k = {row['k']}"
    chunk = f", chunk {row['chunk']}" if (row["chunk"] or 1) > 1 else ""
    return f"{row['method']}{k}{chunk}"


def _tables(table: str, rows: Rows) -> Iterator[str]:
    """One Markdown table for each case, ours in bold."""
    for case, members in _cases(rows):
        columns = _MEMORY if table == "memory" else _SCAN if table == "scan" else _TIMES
        lines = [["library", "method", *columns]]
        for row in members:
            name = f"**{_name(row)}**" if row["ours"] else _name(row)
            lines.append([row["library"], name, *(show(row) for show in columns.values())])
        rule = ["---", "---", *["---:"] * len(columns)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        yield f"### {_title(case)}\n\n{body}\n\n"


def _ms(name: str) -> Any:
    def show(row: dict[str, Any]) -> str:
        found = row[name]
        return "" if found is None else f"{found[0]:.3g} ({found[1]:.3g} to {found[2]:.3g})"

    return show


def _number(name: str, style: str) -> Any:
    return lambda row: "" if row[name] is None else format(row[name], style)


def _megabytes(name: str) -> Any:
    return lambda row: "" if row[name] is None else f"{row[name] / 1e6:.1f}"


_ERROR = {"error": _number("error", ".1e"), "cosine": _number("cosine", ".4f")}
_FIRST = {"first call, ms": _number("first_ms", ".0f")}
_SCAN = {"ms": _ms("whole_ms"), "of copy bandwidth": _number("copy_fraction", ".0%"), **_ERROR, **_FIRST}
_TIMES = {
    "forward, ms": _ms("forward_ms"),
    "backward, ms": _ms("backward_ms"),
    "whole, ms": _ms("whole_ms"),
    **_ERROR,
    "of product rate": _number("product_fraction", ".0%"),
    **_FIRST,
}
_MEMORY = {"saved, MB": _megabytes("saved_bytes"), "peak, MB": _megabytes("peak_bytes")}


def _panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    across = min(count, 3)
    down = -(-count // across)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across, height * down + 1), squeeze=False, layout="constrained"
    )
    flat = list(axes.ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat


def _scan_speed(rows: Rows) -> Any:
    """Milliseconds against T, a panel for each width."""
    widths = sorted({(row["case"]["B"], row["case"]["D"]) for row in rows})
    figure, axes = _panels(len(widths), 6.5, 4.5)
    for axis, width in zip(axes, widths, strict=False):
        own = [row for row in rows if (row["case"]["B"], row["case"]["D"]) == width]
        for name in dict.fromkeys((row["library"], row["method"]) for row in own):
            points = sorted((r["case"]["T"], r["whole_ms"][0]) for r in own if (r["library"], r["method"]) == name)
            style = {"linewidth": 2.5} if name[1] == "hbp" else {"linewidth": 1, "linestyle": "--"}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name[0]}: {name[1]}", **style)
        _logarithmic(axis, "T", f"diagonal scan, B = {width[0]}, D = {width[1]}")
        axis.set(yscale="log", ylabel="ms")
    _legend(figure, axes)
    return figure


def _error_against_time(rows: Rows) -> Any:
    """The gradient's error against the backward's milliseconds, a panel for each case."""
    rows = [row for row in rows if row["error"] is not None]
    cases = [pair for pair in _cases(rows) if any(not row["exact"] for row in pair[1])][:12]
    figure, axes = _panels(len(cases))
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    for axis, (case, members) in zip(axes, cases, strict=False):
        for row in (row for row in members if row["exact"]):
            style = {"marker": "*" if row["ours"] else "s", "color": f"C{libraries.index(row['library'])}"}
            name = f"{row['library']}: {row['method'].split(' (')[0]}"
            axis.plot(row["backward_ms"][0], max(row["error"], EXACT), linestyle="", label=name, **style)
        for lib, (method, chunk, line) in product(libraries, _LINES):
            part = [r for r in members if (r["library"], r["method"], r["chunk"]) == (lib, method, chunk)]
            if part:
                points = [(r["backward_ms"][0], max(r["error"], EXACT)) for r in part]
                name = f"{lib}: {_name(part[0] | {'k': None})}"
                axis.plot(*zip(*points, strict=True), line, marker=".", color=f"C{libraries.index(lib)}", label=name)
        _logarithmic(axis, "backward, ms", _title(case))
        axis.set(yscale="log", ylabel="relative error")
    _legend(figure, axes)
    return figure


_LINES = (("Highway-BP", 1, "-"), ("Highway-BP", 8, "--"), ("fixed point", 1, ":"))


def _logarithmic(axis: Any, label: str, title: str) -> None:
    axis.set(xscale="log", xlabel=label)
    axis.set_title(title, fontsize=9)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend for all panels, below them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, fontsize=7)


def _speed(rows: Rows) -> Any:
    """The whole step's milliseconds against T, B and H, where a table has several of them."""
    axes_of = [name for name in "TBH" if len({row["case"][name] for row in rows}) > 2]
    cells = sorted({row["case"]["cell"] for row in rows})
    if not axes_of:
        return None
    figure, axes = _panels(len(axes_of) * len(cells))
    panels = [(cell, name) for cell in cells for name in axes_of]
    for axis, (cell, name) in zip(axes, panels, strict=False):
        own = [r for r in rows if r["case"]["cell"] == cell and _kind(r) and "setting" not in r["case"]]
        others = [key for key in "TBH" if key != name]
        fixed = {key: sorted({r["case"][key] for r in own})[len({r["case"][key] for r in own}) // 2] for key in others}
        part = [r for r in own if all(r["case"][key] == value for key, value in fixed.items())]
        for label in dict.fromkeys((r["library"], _name(r)) for r in part):
            points = sorted((r["case"][name], r["whole_ms"][0]) for r in part if (r["library"], _name(r)) == label)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{label[0]}: {label[1]}")
        title = f"{cell.upper()}, {', '.join(f'{key} = {value}' for key, value in fixed.items())}"
        _logarithmic(axis, name, title)
        axis.set(yscale="log", ylabel="whole step, ms")
    _legend(figure, axes)
    return figure


def _kind(row: dict[str, Any]) -> str | None:
    return kind(row["method"], row["k"], row["chunk"])


def _crossover(rows: Rows) -> Any:
    """Who has the fastest whole step over T and B, a panel for each cell and H, in PyTorch; by what factor."""
    panels = sorted({(r["case"]["cell"], r["case"]["H"]) for r in rows})
    figure, axes = _panels(len(panels), 5, 4)
    for axis, (cell, size) in zip(axes, panels, strict=False):
        part = [r for r in rows if (r["case"]["cell"], r["case"]["H"]) == (cell, size)]
        steps, batches = (sorted({r["case"][name] for r in part}) for name in "TB")
        for (i, T), (j, B) in ((t, b) for t in enumerate(steps) for b in enumerate(batches)):
            here = [r for r in part if (r["case"]["T"], r["case"]["B"]) == (T, B)]
            times = {one: min(r["whole_ms"][0] for r in here if _kind(r) == one) for one in {_kind(r) for r in here}}
            if not times:
                continue
            ranking = sorted(times, key=times.__getitem__)
            axis.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, color=COLORS[ranking[0]], alpha=0.6))
            factors = [f"{one} {times['library'] / times[one]:.2f}x" for one in ranking if one != "library"]
            axis.text(j, i, "\n".join(factors), ha="center", va="center", fontsize=8)
        axis.set(xticks=range(len(batches)), yticks=range(len(steps)), xlim=(-0.5, len(batches) - 0.5))
        axis.set(ylim=(-0.5, len(steps) - 0.5), xticklabels=batches, yticklabels=steps, xlabel="B", ylabel="T")
        axis.set_title(f"{cell.upper()}, H = {size}: speed of a whole step against torch.nn's", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.6) for color in COLORS.values()]
    figure.legend(
        handles, [f"fastest: {LABELS[one]}" for one in COLORS], loc="outside lower center", ncols=3, fontsize=8
    )
    return figure


def _memory(rows: Rows) -> Any:
    """Bars of the bytes saved and of the peak."""
    cases = list(_cases(rows))
    figure, axes = _panels(len(cases), 6, 4)
    for axis, (case, members) in zip(axes, cases, strict=False):
        at = np.arange(len(members))
        for shift, (name, label) in enumerate(
            (("saved_bytes", "saved for backward"), ("peak_bytes", "peak of a step"))
        ):
            axis.barh(at + 0.4 * shift, [(row[name] or 0) / 1e6 for row in members], 0.4, label=label)
        axis.set_yticks(at + 0.2, [f"{row['library']}: {_name(row)}" for row in members], fontsize=6)
        axis.set_title(_title(case), fontsize=9)
        axis.set(xlabel="MB")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    return figure
