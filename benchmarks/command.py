"""``python -m benchmarks TABLE...``: measure tables on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.cases import TABLES, Limits, module_of, rows_of
from benchmarks.environment import environment
from benchmarks.measure import Library, Row, library
from hbp.availability import available
from hbp.backends._kernels import level
from hbp.core.registry import LIBRARIES

ROUNDS = {"quick": 5, "full": 7}


def main(arguments: list[str]) -> int:
    """Run the command line; returns 0, 1 where a method failed its test, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        level()
        given = [name for part in options.backends or () for name in part.split(",")]
        names = list(dict.fromkeys(given)) or [name for name, state in available().items() if state]
        libraries = [library(name) for name in names]
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console, failed = Console(stderr=True), False
    where = environment(libraries)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for table in dict.fromkeys(options.tables):
        with Progress(*columns, console=console, transient=True) as progress:
            rows = _run(table, options.preset, libraries, where["limits"], progress)
        document = {"table": table, "preset": options.preset, "rounds": ROUNDS[options.preset], "environment": where}
        path = options.out / f"{table}.json"
        path.write_text(json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        for row in rows:
            if row.failed:
                failed = True
                console.print(f"[red]{table} {row.case} {row.library} {row.method}: {row.failed}", soft_wrap=True)
        if not rows:
            console.print(f"{table} has no methods for {', '.join(names)}", soft_wrap=True)
        for made in report.write(path):
            console.print(f"wrote {made}", soft_wrap=True)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare the frameworks: every method passes a test before it is timed; times are medians of "
        "interleaved rounds. Writes TABLE.json, and from it TABLE.md and TABLE*.png. Two further commands: "
        "`gpu` measures everything on a CUDA device in given minutes, `report` makes tables and plots from JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="|".join(TABLES))
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"array libraries, of {', '.join(LIBRARIES)}; all usable ones if not given",
    )
    parser.add_argument("--preset", choices=list(ROUNDS), default="quick", help="sizes, and the number of rounds")
    parser.add_argument("--out", type=Path, default=Path("hbp-benchmarks"), metavar="FOLDER", help="made if missing")
    return parser


def _run(table: str, preset: str, libraries: list[Library], limits: Limits, progress: Progress) -> list[Row]:
    module = module_of(table)
    on_gpu = [lib for lib in libraries if lib.on_gpu]
    cases = module.CASES[preset]
    if preset == "full" and on_gpu:
        cases, libraries = module.GPU_CASES, on_gpu
    over_cases = progress.add_task(table, total=len(cases))
    rows = []
    for case in cases:
        task = progress.add_task(" ".join(f"{name}={value}" for name, value in case.items()), total=None)
        rows += rows_of(table, case, libraries, limits, ROUNDS[preset], partial(progress.advance, task))
        progress.remove_task(task)
        progress.advance(over_cases)
    return rows
