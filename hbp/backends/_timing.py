"""How ways to do one thing are timed, and at which sizes: for ``hbp tune``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from hbp.backends._tuning import pinned

SIZES = [(B, H) for H in (32, 64, 128, 256, 512, 1024, 2048) for B in (1, 4, 16, 64) if B * H * H <= 1 << 23]
"""Batch and hidden sizes, but those where a product is so large that the library's is the fastest everywhere."""
STACKS = [(B, d) for d in (32, 128, 256, 512) for B in (4, 32, 256)]
"""Batch sizes and widths."""
WORK = 2e7
"""Multiplications of a timed run's products, about: enough that a clock sees them."""
REPEATS = 4


def steps_of(batch: int, hidden: int) -> int:
    """How many steps are timed."""
    return int(max(32, min(512, WORK / (batch * hidden * hidden))))


def apart(
    runs: dict[str, Callable[[], Any]], shorter: dict[str, Callable[[], Any]], steps: int, fewer: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds of each step, and of each call beside its steps, from runs of so many steps and of fewer."""
    times = shortest({**runs, **{f"{name}, shorter": run for name, run in shorter.items()}}, 1)
    each = {}
    for name in runs:
        slope = (times[name] - times[f"{name}, shorter"]) / (steps - fewer)
        each[name] = max(slope, times[name] / steps / 8)  # no less, whatever disturbed a run
    return each, {name: max(times[name] - steps * each[name], 0.0) for name in runs}


def shortest(runs: dict[str, Callable[[], Any]], steps: int) -> dict[str, float]:
    """The seconds of a step of each run: the shortest of interleaved repeats, as whatever disturbs a run lengthens it.

    One more comes first, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            start = perf_counter()
            run()
            if turn:
                times[name].append((perf_counter() - start) / steps)
    return {name: min(found) for name, found in times.items()}


def in_ways(task: str, ways: tuple[str, ...], run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """A run by each of some ways to do a task."""

    def by(way: str) -> None:
        with pinned({task: way}):
            run()

    return {way: partial(by, way) for way in ways}
