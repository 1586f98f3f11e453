"""The picture of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbp.diagnosis.picture import new_figure


def draw(rows: Sequence[Any], path: str | Path) -> None:
    """Write a picture of a plan's rows: the time of a step against P, a panel for each M, Highway-BP dashed."""
    panels = list(dict.fromkeys(row.microbatches for row in rows))
    figure = new_figure(4 * len(panels) + 1, 4)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, microbatches in zip(grid[0], panels, strict=True):
        own = [row for row in rows if row.microbatches == microbatches]
        stages = [row.stages for row in own]
        for name in own[0].exact:
            axes.plot(stages, [row.exact[name] for row in own], "o-", label=name)
        for k in own[0].highway:
            axes.plot(stages, [row.highway[k] for row in own], "s--", label=f"Highway-BP, k = {k}")
        axes.set(xlabel="stages P", title=f"M = {microbatches}", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(stages, labels=list(map(str, stages)))
    grid[0][0].set_ylabel("time of a step")
    figure.legend(*grid[0][-1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
