"""The Markdown table and the plots of a result, from its JSON alone; ``python -m benchmarks report FOLDER``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plots, tables
from benchmarks.gpu import page

PICTURES: dict[str, list[tuple[str, Callable[[tables.Rows], Any]]]] = {
    "scan": [("", plots.scan_speed)],
    "rnn": [("-error", plots.error_against_time), ("-speed", plots.speed)],
    "crossover": [("", plots.crossover), ("-speed", plots.speed)],
    "rank": [("-error", plots.error_against_time)],
    "precision": [("-error", plots.error_against_time)],
    "stack": [("-error", plots.error_against_time)],
    "blocks": [("-error", plots.error_against_time)],
    "memory": [("", plots.memory)],
}


def main(arguments: list[str]) -> int:
    """Make what can be made from a folder's JSON; returns 2 where there is nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description="Tables and plots from JSON.")
    parser.add_argument("folder", type=Path, help="with the results of tables, or of `python -m benchmarks gpu`")
    folder = parser.parse_args(arguments).folder
    files = [path for path in sorted(folder.glob("*.json")) if path.stem in PICTURES]
    try:
        if (folder / "machine.json").exists():
            made = page.write(folder)
        else:
            made = [one for path in files for one in write(path)]
    except (ValueError, KeyError) as error:
        print(f"benchmarks report: {folder} holds what is no result: {error!r}", file=sys.stderr)
        return 2
    if not made:
        print(f"benchmarks report: {folder} holds no results; give a folder that --out named", file=sys.stderr)
        return 2
    for one in made:
        print(f"wrote {one}")
    return 0


def write(path: Path) -> list[Path]:
    """Write both beside a JSON; returns all files, the JSON first. A table without rows has no plots."""
    document = json.loads(path.read_text())
    table, rows = document["table"], [row for row in document["rows"] if row["failed"] is None]
    markdown = path.with_suffix(".md")
    failed = "".join(
        f"Failed: {tables.title(row['case'])}, {row['library']}, {row['method']}: {row['failed']}\n\n"
        for row in document["rows"]
        if row["failed"] is not None
    )
    markdown.write_text(
        f"{_where(document)}\n\n{tables.in_short(table, rows)}{''.join(tables.by_case(table, rows))}{failed}"
    )
    made = [path, markdown]
    for suffix, draw in PICTURES[table] if rows else ():
        figure = draw(rows)
        if figure is not None:
            target = path.with_name(f"{path.stem}{suffix}.png")
            figure.suptitle(_where(document), fontsize=8)
            figure.savefig(target, dpi=120, bbox_inches="tight")
            plots.plt.close(figure)
            made.append(target)
    return made


def _where(document: dict[str, Any]) -> str:
    there = document["environment"]
    devices = ", ".join(f"{name} {there['versions'].get(name, '')} on {at}" for name, at in there["devices"].items())
    rounds = "" if document["table"] == "memory" else f", medians of {document['rounds']} interleaved rounds"
    when = f"commit {there['commit']}, {there['date'][:10]}"
    return f"{there['processor']}, {there['cores']} cores; {devices}; {when}{rounds}"
