"""The times that are shipped with the library, from those of several machines:

    python -m benchmarks.shipped benchmarks/times/64-*.json hbp/backends/tuned-64.json

Ratios are what decides between ways, so a row holds the geometric means of a step's seconds: what one machine takes
twice as long for and another half is a draw. What a call costs beside its steps is the plain mean.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean

from hbp.backends._timing import WORK
from hbp.backends._tuned import Timing, Timings, read, write


def main(arguments: Sequence[str]) -> int:
    """Write the last file from the others."""
    *given, made = map(Path, arguments)
    if not given:
        print("benchmarks.shipped: give files of hbp tune, and the file to write", file=sys.stderr)
        return 2
    machines = [read(path) for path in given]
    if others := [str(path) for path, machine in zip(given, machines, strict=True) if len(machine.sources) > 1]:
        print(f"benchmarks.shipped: {', '.join(others)}: not all rows are of one machine; measure all", file=sys.stderr)
        return 2
    try:
        write(made, mean(machines))
    except ValueError as error:
        print(f"benchmarks.shipped: {error}", file=sys.stderr)
        return 2
    return 0


def mean(machines: Sequence[Timings]) -> Timings:
    """The geometric means of all machines' times, in the order of the first one's rows."""
    rows: dict[tuple[str, str, int, int], list[Timing]] = {}
    for machine in machines:
        for row in machine.rows:
            rows.setdefault((row.task, row.library, row.rows, row.width), []).append(row)
    source = f"shipped with hbp, measured on {' and '.join(machine.source for machine in machines)}"
    return Timings(source, tuple(Timing(*size, *_means(found)) for size, found in rows.items()))


def _means(rows: Sequence[Timing]) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """By the way: the seconds of a step, and those of a call beside its steps where a machine knows them apart.

    Where one does not, a call takes it as long as the others, but at most half of its time. A way that not all machines
    have stands beside the fastest of the others as it does on those that have it.
    """
    ways = dict.fromkeys(way for row in rows for way in row.seconds)
    known = {way: [row.once[way] for row in rows if way in row.once] for way in ways}
    once = {way: fmean(found) for way, found in known.items() if found}
    steps = [_steps(row, once) for row in rows]
    common = [way for way in ways if all(way in found for found in steps)]
    if not common:
        raise ValueError(f"{rows[0].task} has no way that all machines have; measure them with one version")
    fastest = [min(found[way] for way in common) for found in steps]
    seconds = {}
    for way in ways:
        ratios = [found[way] / best for found, best in zip(steps, fastest, strict=True) if way in found]
        seconds[way] = geometric_mean(fastest) * geometric_mean(ratios)
    return seconds, once


def _steps(row: Timing, once: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each step alone; files that do not know those of a call are of runs of 16 steps at least."""
    count = int(max(16, min(512, WORK / (row.rows * row.width**2))))
    return {
        way: time if way in row.once else max(time - once.get(way, 0.0) / count, time / 2)
        for way, time in row.seconds.items()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
