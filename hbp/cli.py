"""The command line: ``hbp compare`` (the main job), ``hbp plan``, ``hbp tune`` and ``hbp info``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hbp
from hbp.availability import availability
from hbp.backends._kernels import CPU, level
from hbp.backends._tuning import VARIABLE, cache_file, timings
from hbp.core.registry import LIBRARIES, load
from hbp.tuning import LIBRARIES as TUNED

if TYPE_CHECKING:
    from hbp.demo.compare import Run, Settings

DEMO = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "threadpoolctl": "threadpoolctl"}
OUTPUTS = ("compare.json", "compare.png")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        _check_environment(options.run is not _tune)  # which mends the times
        return int(options.run(options))
    except _InputError as error:
        print(f"hbp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hbp: interrupted", file=sys.stderr)
        return INTERRUPTED


class _InputError(Exception):
    """Bad input, found before any work is done."""


def _check_environment(with_times: bool) -> None:
    try:
        level()
        if with_times:
            timings()
    except (ValueError, OSError) as error:
        raise _InputError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbp", description="Highway backpropagation: a parallel backward pass.")
    parser.add_argument("--version", action="version", version=f"hbp {hbp.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="backends, their versions, devices and kernels, and why one is unusable")
    info.set_defaults(run=_info)
    compare = commands.add_parser(
        "compare",
        help="train on digits with exact backprop, the fixed-point baseline and Highway-BP",
        description="Train a recurrent net that reads scikit-learn's digits pixel by pixel (64 steps), from the same "
        "start and batches, with exact backprop, the fixed-point baseline and Highway-BP; print a table, and write "
        "compare.json and compare.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("--backend", choices=list(LIBRARIES), default="numpy", help="array library")
    compare.add_argument("--cell", choices=["gru", "lstm"], default="gru", help="recurrent cell")
    compare.add_argument("--steps", type=_at_least(1), default=600, help="training steps")
    compare.add_argument("--seed", type=_at_least(0), default=0, help="start and batches")
    compare.add_argument(
        "--iterations", type=_at_least(0), nargs="+", default=[0, 1, 3], metavar="K", help="iterations to compare"
    )
    compare.add_argument(
        "--chunks", type=_at_least(1), nargs="+", default=[1, 8], metavar="S", help="steps per chunk to compare"
    )
    compare.add_argument(
        "--threads",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="CPU threads of NumPy's BLAS, the compiled kernels, PyTorch and XLA (JAX), whatever OMP_NUM_THREADS says; "
        "with arrays this small more of them mostly wait for each other",
    )
    compare.add_argument("--output", type=Path, default=Path("hbp-compare"), metavar="FOLDER", help="made if missing")
    _add_plan(commands)
    _add_tune(commands)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict whether Highway-BP over devices pays: step times beside those of pipelines",
        description="Predict a training step's time on P devices, each with a stage of the model, with M microbatches: "
        "by GPipe, 1F1B, put-off weight gradients, zero bubble and Highway-BP. hb.plan measures a model for it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=_plan)
    times = {"forward": "F, its forward", "pull": "Bi, pulling a cotangent through", "weights": "Bw, weight gradients"}
    for name, what in times.items():
        plan.add_argument(f"--{name}", type=float, default=1.0, metavar="T", help=f"time of a stage, all of M: {what}")
    plan.add_argument("--state-bytes", type=float, default=0.0, metavar="N", help="between two stages, for all of M")
    plan.add_argument("--bandwidth", type=float, default=1e10, metavar="N", help="bytes per unit of time")
    plan.add_argument("--latency", type=float, default=0.0, metavar="T", help="of a message")
    for name, letter, default in (("stages", "P", [2, 4, 8, 16]), ("microbatches", "M", [1, 2, 4, 8])):
        plan.add_argument(f"--{name}", type=_at_least(1), nargs="+", default=default, metavar=letter, help="to compare")
    plan.add_argument("--iterations", type=_at_least(0), nargs="+", default=[1, 2, 3], metavar="K", help="to compare")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="a picture of time against P")


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure on this CPU which way is the fastest at which size, and keep that",
        description="Time forward, backward and training steps of recurrent layers and stacks at a few sizes on this "
        "machine's CPU, in about a minute, and keep the times in the user's cache folder, where the "
        "library looks from then on. Let the machine be idle meanwhile.",
    )
    tune.set_defaults(run=_tune)
    tune.add_argument("--backend", choices=TUNED, help="one library only (default: all that are installed)")
    tune.add_argument("--output", type=Path, metavar="FILE", help=f"elsewhere, for the variable {VARIABLE}")
    tune.add_argument("--forget", action="store_true", help="delete the times kept, and go back to those shipped")


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return value

    return integer


def _info(_: argparse.Namespace) -> int:
    print(f"hbp {hbp.__version__}, Python {sys.version.split()[0]}")
    for name, state in hbp.available().items():
        print(f"  {name:<6} {state}")
        if state.device is not None:
            print(f"         kernels: {load(name).backend.kernel_state()}")
    print(f"  times  {timings().source}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    from hbp.tuning import tune

    if options.forget:
        return _forget()
    compiled = CPU.load() is not None
    installed = [name for name in TUNED if find_spec(name) is not None and (compiled or name != "numpy")]
    if not installed:
        raise _InputError(f"nothing to tune: no PyTorch is installed, and no compiled loops: {CPU.state()}")
    try:
        path = tune([options.backend] if options.backend else installed, path=options.output)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise _InputError(str(error)) from error
    print(f"wrote {path}")
    if options.output is None and os.environ.get(VARIABLE):
        print(f"{VARIABLE}={os.environ[VARIABLE]} is read instead, until it is unset")
    return 0


def _forget() -> int:
    try:
        path = cache_file()
        path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise _InputError(str(error)) from error
    print(f"deleted {path}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from hbp.planning import Costs, Plan, Settings

    try:
        costs = Costs(options.forward, options.pull, options.weights, options.state_bytes)
        names = ("stages", "microbatches", "iterations", "bandwidth", "latency", "plot")
        settings = Settings(**{name: getattr(options, name) for name in names})
    except (ValueError, ImportError, OSError) as error:
        raise _InputError(str(error)) from error
    plan = Plan(settings, dict.fromkeys(settings.stages, costs))
    if options.plot is not None:
        plan.plot(options.plot)
        print(f"wrote {options.plot}")
    print(plan)
    return 0


def _compare(options: argparse.Namespace) -> int:
    missing = [package for module, package in DEMO.items() if find_spec(module) is None]
    if missing:
        raise _InputError(f"compare needs {', '.join(missing)}; install them: pip install 'hbp[demo]'")
    for name in ("iterations", "chunks"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise _InputError(f"--{name} names a value twice: {' '.join(map(str, values))}")
    if options.threads > (cores := os.cpu_count() or 1):
        raise _InputError(f"--threads {options.threads} is more than the {cores} CPU cores here; give at most {cores}")
    try:
        load(options.backend)
    except (ImportError, RuntimeError) as error:
        raise _InputError(str(error)) from error
    _check_writable(options.output)
    from hbp.demo.compare import Settings

    names = ("backend", "cell", "steps", "seed", "threads")
    settings = Settings(
        **{name: getattr(options, name) for name in names},
        iterations=tuple(options.iterations),
        chunks=tuple(options.chunks),
    )
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
        raise _InputError(
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
