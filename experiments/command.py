"""``python -m experiments NAME...``: run experiments on this machine, going on where a run was stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import catalog, page
from experiments.checkpoints import CheckpointError
from experiments.experiment import Request, Work
from experiments.folder import Folder
from experiments.performing import perform_all
from hbp.core.registry import load
from hbp.demo.threads import limited


def main(arguments: list[str]) -> int:
    """Run the command line; returns 0, 1 where work failed, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        request = _request(options)
        works = _works(options.names, request)
        if options.dry_run:
            _dry_run(works, request, console)
            return 0
        with limited(request.threads):
            needed = max((work.check() for work in works), default=0)
        folder = Folder(options.out)
        folder.open(request, 2 * options.jobs * needed)  # a new checkpoint is written beside the old one
        left = [work for work in works if not folder.has(work)]
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    if len(left) < len(works):
        console.print(f"{len(works) - len(left)} of {len(works)} pieces of work are done already", soft_wrap=True)
    try:
        _perform(left, folder, request, options.jobs, console)
    except KeyboardInterrupt:
        print("experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except CheckpointError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"experiments: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    for made in page.write(folder):
        console.print(f"wrote {made}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Run the experiments of the paper and what goes beyond them. Every piece of work leaves a record "
        "in the folder as it ends; a command that was stopped goes on from where it was. `report FOLDER` makes the "
        "page and its figures from the records alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kinds = get_type_hints(Request)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"of {', '.join(catalog.MODULES)}, or all")
    parser.add_argument("--preset", choices=get_args(kinds["preset"]), default="laptop", help="sizes and data")
    parser.add_argument("--backend", choices=get_args(kinds["backend"]), default="torch", help="what trains")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting")
    parser.add_argument("--out", type=Path, default=Path("hbp-experiments"), metavar="FOLDER", help="made if missing")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each piece of work")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="side by side, of those that measure no time")
    parser.add_argument("--steps", type=int, metavar="N", help="end every training after so many steps")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data sets of the paper, for --preset paper")
    parser.add_argument("--dry-run", action="store_true", help="tell sizes and an estimate of the time, and end")
    return parser


def _request(options: argparse.Namespace) -> Request:
    """What is asked, checked."""
    for name in ("seeds", "threads", "jobs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; give 1 or more")
    load(options.backend)
    if options.data is not None and not options.data.is_dir():
        raise ValueError(f"--data {options.data} is no folder; give the one with the data sets")
    return Request(options.preset, options.backend, options.seeds, options.threads, options.steps, options.data)


def _works(names: Sequence[str], request: Request) -> list[Work]:
    """All pieces of work, each once, by their keys, so that what shares data is done together; what is timed last."""
    chosen = catalog.MODULES if "all" in names else dict.fromkeys(names)
    found: dict[str, Work] = {}
    for work in [work for name in chosen for work in catalog.experiment(name).work(request)]:
        if work.key not in found or work.alone:
            found[work.key] = work
    if not found:
        raise ValueError(f"there is nothing to do for {', '.join(chosen)} with --backend {request.backend}")
    return sorted(found.values(), key=lambda work: (work.alone, work.key))


def _dry_run(works: Sequence[Work], request: Request, console: Console) -> None:
    """Print what would be done, and about how long it takes on one job."""
    table, total, known = Table(), 0.0, {}
    for column in ("what", "runs", "parameters", "steps", "checkpoint, MB", "s a run"):
        table.add_column(column, justify="left" if column == "what" else "right")
    with limited(request.threads):
        for work in works:
            what = work.what
            found = known[what] = known.get(what) or {**work.estimate(), "runs": 0}
            found["runs"] += 1
    for what, found in known.items():
        total += found["runs"] * found["seconds"]
        size = f"{found.get('bytes', 0) / 1e6:.2f}"
        cells = (found["runs"], found.get("parameters", ""), found.get("steps", ""), size, f"{found['seconds']:.3g}")
        table.add_row(what, *map(str, cells))
    Console(width=max(console.width, 110)).print(table)
    print(f"{len(works)} pieces of work, about {_time(total)}, one after another")
    for how in dict.fromkeys(found["how"] for found in known.values()):
        print(f"seconds are estimated by {how}")


def _time(seconds: float) -> str:
    """For people."""
    for unit, length in (("days", 86_400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


def _perform(left: Sequence[Work], folder: Folder, request: Request, jobs: int, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all", total=len(left))

        def show(key: str, done: int, total: int, text: str) -> None:
            if key not in tasks:
                tasks[key] = progress.add_task(key)
            progress.update(tasks[key], completed=done, total=total, description=f"{key} {text}")

        def finished(key: str) -> None:
            if key in tasks:
                progress.remove_task(tasks.pop(key))
            progress.advance(whole)

        perform_all(left, folder, request.threads, jobs, show, finished)
