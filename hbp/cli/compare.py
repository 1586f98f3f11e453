"""``hbp compare``, the main job: train with every method and compare."""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hbp.availability import availability
from hbp.cli.common import INTERRUPTED, InputError, at_least
from hbp.core.registry import LIBRARIES, load
from hbp.core.solver import Solver

if TYPE_CHECKING:
    from hbp.demo.compare import Run, Settings

DEMO = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "threadpoolctl": "threadpoolctl"}
OUTPUTS = ("compare.json", "compare.png")
THREADS = (
    "CPU threads of NumPy's BLAS, the compiled kernels, PyTorch and XLA (JAX), whatever OMP_NUM_THREADS says; with "
    "arrays this small more of them mostly wait for each other"
)


TOLERANCE = (
    "with a rank, rounds go on until the last increment is at most this fraction of the gradient; none: each of the "
    "iterations instead"
)


def add(commands: Any) -> None:
    """Add the command to the command line."""
    compare = commands.add_parser(
        "compare",
        help="train on digits with exact backprop, the fixed-point baseline and Highway-BP",
        description="Train a recurrent net that reads scikit-learn's digits pixel by pixel (64 steps), from the same "
        "start and batches, with exact backprop, the fixed-point baseline and Highway-BP; print a table, and write "
        "compare.json and compare.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.set_defaults(run=run)
    compare.add_argument("--backend", choices=list(LIBRARIES), default="numpy", help="array library")
    compare.add_argument("--cell", choices=["gru", "lstm"], default="gru", help="recurrent cell")
    compare.add_argument("--steps", type=at_least(1), default=600, help="training steps")
    compare.add_argument("--seed", type=at_least(0), default=0, help="start and batches")
    compare.add_argument(
        "--iterations", type=at_least(0), nargs="+", default=[1, 3], metavar="K", help="iterations to compare"
    )
    compare.add_argument(
        "--chunks", type=at_least(1), nargs="+", default=[1, 8], metavar="S", help="steps per chunk to compare"
    )
    compare.add_argument(
        "--ranks",
        type=_rank,
        nargs="+",
        default=[0, 8],
        metavar="R",
        help="strong directions of the recurrent weights to take into the residual path, or auto; 0: none, at each of "
        "the iterations and chunks",
    )
    compare.add_argument("--tolerance", type=_tolerance, default=0.1, metavar="F", help=TOLERANCE)
    compare.add_argument("--threads", type=at_least(1), default=1, metavar="N", help=THREADS)
    compare.add_argument("--output", type=Path, default=Path("hbp-compare"), metavar="FOLDER", help="made if missing")


def _rank(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else at_least(0)(text)


def _tolerance(text: str) -> float | None:
    try:
        return None if text == "none" else Solver(tolerance=float(text)).tolerance
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction of the gradient from 0 to 1, nor none") from None


def run(options: argparse.Namespace) -> int:
    """Check the input, train, and show what came of it."""
    missing = [package for module, package in DEMO.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"compare needs {', '.join(missing)}; install them: pip install 'hbp[demo]'")
    for name in ("iterations", "chunks", "ranks"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise InputError(f"--{name} names a value twice: {' '.join(map(str, values))}")
    if options.threads > (cores := os.cpu_count() or 1):
        raise InputError(f"--threads {options.threads} is more than the {cores} CPU cores here; give at most {cores}")
    if "auto" in options.ranks and options.backend == "jax":
        raise InputError("--ranks auto needs the weights' numbers, which a compiled JAX program has not; give numbers")
    try:
        load(options.backend)
    except (ImportError, RuntimeError) as error:
        raise InputError(str(error)) from error
    _check_writable(options.output)
    from hbp.demo.compare import Settings

    names = ("backend", "cell", "steps", "seed", "threads", "tolerance")
    several = ("iterations", "chunks", "ranks")
    given = {name: getattr(options, name) for name in names} | {name: tuple(getattr(options, name)) for name in several}
    settings = Settings(**given)
    if (most := max((rank for rank in settings.ranks if rank != "auto"), default=0)) > settings.hidden:
        raise InputError(f"--ranks {most} is more than the {settings.hidden} units; give at most that")
    return _train_and_show(settings, options.output)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in OUTPUTS:
            if (folder / name).exists():
                (folder / name).open("ab").close()
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder {str(folder)!r}: {error.strerror}; give another with --output"
        ) from error


def _train_and_show(settings: Settings, output: Path) -> int:
    from rich.console import Console

    from hbp.demo import results
    from hbp.demo.threads import limited

    console = Console()
    with limited(settings.threads):  # the backend is loaded, so that its libraries are told too
        runs, interrupted = _train(settings, console)
    done = min((len(run.losses) for run in runs), default=0)
    if not done:
        console.print("interrupted before the first step was finished; nothing to show")
        return INTERRUPTED
    device = availability(settings.backend)
    threads = f"{settings.threads} thread" + "s" * (settings.threads > 1)
    title = f"{settings.cell.upper()}, {settings.backend} {device}, {threads}, {done} of {settings.steps} steps"
    console.print(results.table(runs, title))
    document, picture = (output / name for name in OUTPUTS)
    results.write_json(runs, settings, device, document)
    results.plot(runs, settings, picture)
    console.print(f"wrote {document} and {picture}", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def _train(settings: Settings, console: object) -> tuple[list[Run], bool]:
    """Train with a progress bar; Ctrl-C ends it after the steps that all methods have finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hbp.demo.compare import train

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: list[Run] = []
    with Progress(*columns, console=console) as progress:  # type: ignore[arg-type]
        warm_up = progress.add_task("warming up", total=None)
        training = progress.add_task("training   ", total=settings.steps)
        try:
            for runs in train(settings, load(settings.backend)):
                progress.update(warm_up, total=len(runs))
                if not runs[-1].losses:
                    progress.advance(warm_up)
                else:
                    progress.update(training, completed=len(runs[0].losses))
        except KeyboardInterrupt:
            return [run.cut(min(len(run.losses) for run in runs)) for run in runs], True
    return runs, False
