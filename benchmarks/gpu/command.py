"""``python -m benchmarks gpu``: the command line, and how its minutes are spent."""

from __future__ import annotations

import argparse
import fcntl
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from benchmarks.gpu import page, process
from benchmarks.gpu.device import NONE, origin
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import STEPS, Step

WORTH = 20.0
"""Seconds below which a step that ran out of time is not gone on with."""


def main(arguments: list[str], steps: Sequence[Step] = STEPS) -> int:
    """Run the command line; returns 0, 1 where a part failed, 2 for bad input."""
    options = _parser(steps).parse_args(arguments)
    chosen = [step for step in steps if step.name in (options.steps or [step.name])]
    try:
        _check(options, chosen)
        options.out.mkdir(parents=True, exist_ok=True)
        with _alone(options.out):
            failed = _run(options, chosen)
            for made in page.write(options.out, steps):
                print(f"wrote {made}")
    except (ValueError, RuntimeError, OSError) as error:  # also later: the code was changed, or the disk is full
        print(f"benchmarks gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks gpu: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return int(failed)


def _run(options: argparse.Namespace, chosen: Sequence[Step]) -> bool:
    """Spend the minutes on these steps; returns whether a part has failed, now or before."""
    here = origin(options.rehearse)
    for step, record in [(step, Record.of(options.out, step.name, here)) for step in chosen]:
        record.retry(step.limit(options.rehearse) / 2)
        if record.path.exists():
            record.write()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step at work ends too
    _spend(options, chosen, monotonic() + 60 * options.minutes)
    return any(Record.of(options.out, step.name, here).failed for step in chosen)


def _parser(steps: Sequence[Step]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Measure everything on a CUDA device, in order of worth: "
        + "; ".join(f"{step.name} ({step.what})" for step in steps)
        + ". Each step runs in a process of its own with a time limit and writes STEP.json after every part; a later "
        "call with the same folder goes on. Ends with a page, gpu.md, and plots where matplotlib is installed.",
    )
    parser.add_argument(
        "--minutes", type=float, help="to spend in all (default: 25; in a rehearsal what the steps may take)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="(default: benchmarks/results/gpu; in a rehearsal hbp-rehearsal)"
    )
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in steps], metavar="STEP", help="only these")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the same steps without a GPU: kernels in interpreters, tiny sizes; what needs a device is listed",
    )
    return parser


def _check(options: argparse.Namespace, chosen: Sequence[Step]) -> None:
    """Fill in the defaults, and refuse what cannot work.

    Raises:
        ValueError: minutes that are none, or too few.
        RuntimeError: no device.
    """
    if options.minutes is None:
        options.minutes = sum(step.rehearsed for step in chosen) / 60 if options.rehearse else 25.0
    if options.out is None:
        options.out = Path("hbp-rehearsal" if options.rehearse else "benchmarks/results/gpu")
    first, needed = chosen[0], chosen[0].limit(options.rehearse) / 60
    if not math.isfinite(options.minutes) or options.minutes < needed:
        raise ValueError(
            f"--minutes {options.minutes:g} is less than the first step, {first.name}, may take; "
            f"give {needed:.2g} or more"
        )
    if not options.rehearse and origin(False).device == NONE:
        raise RuntimeError("there is no CUDA device (nvidia-smi shows those that the driver knows); or give --rehearse")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else runs steps in the folder.

    Raises:
        RuntimeError: somebody does.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another command is at work in {folder}; wait, or give another --out") from None
        yield


def _spend(options: argparse.Namespace, chosen: Sequence[Step], end: float) -> None:
    """Each step within its limit, of all calls together; then those that ran out of time with what is left."""
    over = set()
    for again in (False, True):
        for number, step in enumerate(chosen, 1):
            record, left = Record.of(options.out, step.name, origin(options.rehearse)), end - monotonic()
            limit = left if again else min(step.limit(options.rehearse) - record.seconds, left)
            if record.complete or step.name in over or (limit < WORTH and record.seconds):
                continue
            if limit < 1:
                print(f"{step.name}: not begun, {max(left, 0):.0f} s are left", flush=True)
                continue
            print(f"step {number}/{len(chosen)}, {step.name}: {step.what}; at most {limit:.0f} s", flush=True)
            ended = _work(step, options, monotonic() + limit, end)
            print(f"{step.name}: {ended}", flush=True)
            if ended != process.OUT_OF_TIME:
                over.add(step.name)


def _work(step: Step, options: argparse.Namespace, limit: float, end: float) -> str:
    """Run a step until it is complete or its limit is there; a process that dies is followed by another."""
    known = -1
    while True:
        ended = process.run(step, options.out, limit - monotonic(), end, options.rehearse)
        parts = len(Record.of(options.out, step.name, origin(options.rehearse)).parts)
        if ended in (process.COMPLETE, process.OUT_OF_TIME) or parts == known or limit - monotonic() < 1:
            return ended
        known = parts
