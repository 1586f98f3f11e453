"""The picture of a diagnosis."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check(path: str | Path) -> None:
    """Check that a picture can be drawn and written to this file.

    Raises:
        ImportError: there is no matplotlib.
        ValueError, OSError: its ending is unknown, its folder does not exist, or it cannot be written there.
    """
    path, kinds = Path(path), new_figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(f"plot={str(path)!r} ends in {path.suffix}; give one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"plot={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"plot={str(path)!r} cannot be written there; give another file")


def draw(rows: Sequence[Any], spectra: Mapping[str, Any], target: float, path: str | Path) -> None:
    """Write a picture of a diagnosis: error against k, error by layer, the increments of the largest k, and spectra."""
    figure = new_figure(17 if spectra else 13)
    overall, by_layer, increments, *others = figure.subplots(1, 4 if spectra else 3)
    for kind in dict.fromkeys((row.chunk, row.rank) for row in rows):
        own = sorted((row for row in rows if (row.chunk, row.rank) == kind), key=lambda row: row.iterations or 0)
        label = _kind(own[0])
        overall.plot([row.iterations for row in own], [row.overall.error for row in own], "o-", label=label)
        for name, report in own[-1].reports.items():
            increments.plot(report.shares, "o-", label=f"{name or 'all'}, {label}")
    overall.axhline(target, color="gray", linestyle=":", label="target")
    _logarithmic(overall, "k", "relative error of the gradient")
    _logarithmic(increments, "round", "increment / solution")
    for row in rows:
        if (row.chunk, row.rank) == (rows[0].chunk, rows[0].rank):
            by_layer.plot([part.error for part in row.layers.values()], ".-", label=f"k = {row.iterations}")
    _logarithmic(by_layer, "layer, in the model's order", f"relative error, {_kind(rows[0])}")
    for axes in others:
        for i, (name, spectrum) in enumerate(spectra.items()):
            axes.plot(range(1, len(spectrum.values) + 1), spectrum.values, f".-C{i}", label=name)
            axes.axhline(spectrum.edge, color=f"C{i}", linestyle=":")
        _logarithmic(axes, "direction", "singular value (dotted: the flat edge)")
    figure.savefig(path, dpi=120)


def _kind(row: Any) -> str:
    return f"chunk {row.chunk}" + (f", rank {row.rank}" if row.rank else "")


def new_figure(width: float = 13, height: float = 4) -> Any:
    """An empty figure of some inches, in no window; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "hbp[demo]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
