"""What a diagnosis of k says, for every front end: a row per setting, a recommendation, a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from hbp.core.backend import Array, check_count
from hbp.core.increments import ADVICE, Report
from hbp.core.solver import Solver
from hbp.diagnosis import picture
from hbp.diagnosis.agreement import Agreement

HEADER = f"{'k':>5} {'chunk':>6} {'error':>9} {'cosine':>8} {'worst layer':>24} {'increment':>10} {'ms':>9}"
PASSES = 3
"""Over all settings in turn, after the one that measures their errors; times are the medians."""

Gradient: TypeAlias = Mapping[str, Sequence[Array]]
"""A model's gradient: each layer's arrays, by the layer's name."""


@dataclass(frozen=True)
class Row:
    """One setting beside exact backprop.

    Attributes:
        iterations, chunk: the setting; None for exact backprop.
        overall: agreement of all parameters' gradients.
        layers: agreement layer by layer, by name.
        reports: the increments of each backward pass, by the name of the layers it went through.
        seconds: the duration of forward and backward, the median of the passes; NaN before it is measured.
    """

    iterations: int | None
    chunk: int
    overall: Agreement
    layers: Mapping[str, Agreement]
    reports: Mapping[str, Report]
    seconds: float = math.nan

    @property
    def solver(self) -> Solver:
        """The setting as a value, to hand on."""
        return Solver(self.iterations, self.chunk)

    @property
    def diverges(self) -> bool:
        """Whether some split's increments grow past the solution."""
        return any(report.diverges for report in self.reports.values())

    @property
    def increment(self) -> float:
        """The last increment as a fraction of the solution, the largest of all passes; NaN where there were none."""
        return max((report.shares[-1] for report in self.reports.values()), default=math.nan)

    def __str__(self) -> str:
        k = "exact" if self.iterations is None else self.iterations
        name, worst = max(self.layers.items(), key=lambda item: item[1].error, default=("", Agreement()))
        layer = f"{name[-15:]} {worst.error:.2g}" if worst.error else ""
        increment = f"{self.increment:.2g}" if self.reports else ""
        ms = "" if math.isnan(self.seconds) else f"{1e3 * self.seconds:.2f}"
        columns = f"{k:>5} {self.chunk:>6} {self.overall.error:>9.2g} {self.overall.cosine:>8.4f} {layer:>24}"
        return f"{columns} {increment:>10} {ms:>9}{' diverges' if self.diverges else ''}".rstrip()


@dataclass(frozen=True)
class Diagnosis:
    """Highway-BP's gradients of one batch beside exact backprop's, for several k and chunks.

    Attributes:
        exact: exact backprop.
        rows: the other settings.
        target: the error wished for.
    """

    exact: Row
    rows: tuple[Row, ...]
    target: float

    @property
    def within(self) -> tuple[Row, ...]:
        """The rows from which on every larger k tried with the chunk is within the target, by k, then chunk.

        The error does not fall monotonically with k: a k that hits the target by luck does not count.
        """
        if not self._seen:
            return ()
        good = [row for row in self.rows if all(r.overall.error <= self.target for r in self._from(row))]
        return tuple(sorted(good, key=lambda row: (row.iterations or 0, row.chunk)))

    @property
    def recommended(self) -> Row:
        """The fastest of exact backprop and the rows `within` the target; exact where none is faster."""
        return min((self.exact, *self.within), key=lambda row: row.seconds)

    @property
    def advice(self) -> str:
        """A sentence or two for people."""
        if not self._seen:
            return "no backward pass by Highway-BP was seen: does the loss hand iterations and chunk on?"
        bad = any(row.diverges for row in self.rows)
        return self._advised() + (f"\nthe split diverges at some settings: {ADVICE}" if bad else "")

    def _advised(self) -> str:
        exact = f"{1e3 * self.exact.seconds:.3g} ms"
        fastest = min(self.within, key=lambda row: row.seconds, default=None)
        if fastest is None:
            return (
                f"recommended: exact backprop, {exact}; no setting tried is within the target error of "
                f"{self.target:.2g}, more iterations or larger chunks may be"
            )
        setting = f"iterations={fastest.iterations}, chunk={fastest.chunk}"
        figures = f"error {fastest.overall.error:.2g}, {1e3 * fastest.seconds:.3g} ms"
        found = f"recommended for an error of {self.target:.2g}:"
        if self.recommended is fastest:
            return f"{found} {setting} ({figures}; exact backprop takes {exact})"
        return (
            f"{found} exact backprop, which is the fastest here, {exact}; of Highway-BP's settings within it "
            f"{setting} is the fastest ({figures}), and on other hardware it may pay"
        )

    def _from(self, row: Row) -> list[Row]:
        """The row and those of its chunk with larger k."""
        return [r for r in self.rows if r.chunk == row.chunk and (r.iterations or 0) >= (row.iterations or 0)]

    @property
    def _seen(self) -> bool:
        """Whether some setting was heeded: its increments were reported, or its gradient differs."""
        return any(row.reports or row.overall.difference for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([HEADER, *map(str, (self.exact, *self.rows)), self.advice])

    def plot(self, path: str | Path) -> None:
        """Write a picture: error against k, error by layer, and the increments of the largest k."""
        picture.draw(self.rows, self.target, path)


@dataclass(frozen=True)
class Settings:
    """What a diagnosis tries and is asked for, checked before any work.

    Raises:
        TypeError, ValueError: there are no settings, they are no counts, or the target is no number.
        ImportError, OSError, ValueError: the picture could not be drawn or written.
    """

    iterations: Sequence[int]
    chunks: Sequence[int]
    target: float
    plot: str | Path | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", tuple(check_count("iterations", k, 0) for k in self.iterations))
        object.__setattr__(self, "chunks", tuple(check_count("chunk", chunk, 1) for chunk in self.chunks))
        if not self.iterations or not self.chunks:
            raise ValueError("give at least one number of iterations and one chunk")
        _check_target(self.target)
        if self.plot is not None:
            picture.check(self.plot)

    @property
    def pairs(self) -> list[tuple[int | None, int]]:
        """Each setting's k and chunk; exact backprop is the first."""
        return [(None, 1), *((k, chunk) for chunk in self.chunks for k in self.iterations)]


def compared(
    settings: Settings, backend: Any, gradient: Callable[[Solver], tuple[Gradient, Mapping[str, Report]]]
) -> list[Row]:
    """The rows of all settings without their times, exact backprop first, printed as they come."""
    print(HEADER)
    rows: list[Row] = []
    wanted: Gradient = {}
    for k, chunk in settings.pairs:
        found, reports = gradient(Solver(k, chunk))
        wanted = wanted or found
        layers = {name: Agreement.of(list(found[name]), list(arrays), backend) for name, arrays in wanted.items()}
        rows.append(Row(k, chunk, sum(layers.values(), Agreement()), layers, reports))
        print(rows[-1])
    return rows


def diagnosed(
    settings: Settings,
    backend: Any,
    gradient: Callable[[Solver], tuple[Gradient, Mapping[str, Report]]],
    seconds: Callable[[Solver], float],
) -> Diagnosis:
    """Run all settings, print rows as they come, then the table with times and the advice, and draw the picture.

    Args:
        settings: what to try.
        backend: of the gradients.
        gradient: the gradient by a solver and the reports of its passes.
        seconds: the duration of one forward and backward by a solver that `gradient` has seen.
    """
    exact, *others = _timed(compared(settings, backend, gradient), seconds)
    diagnosis = Diagnosis(exact, tuple(others), settings.target)
    print(diagnosis)
    if settings.plot is not None:
        diagnosis.plot(settings.plot)
    return diagnosis


def _check_target(target: Any) -> None:
    if isinstance(target, bool) or not isinstance(target, Real) or not float(target) >= 0:
        raise ValueError(f"target={target!r}; give a relative error that is good enough, as 0.05")


def _timed(rows: Sequence[Row], seconds: Callable[[Solver], float]) -> list[Row]:
    """The rows with their times, measured in turns, so that what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in rows]
    print("timing all settings in turn, pass", end="", flush=True)
    for i in range(PASSES):
        print(f" {i + 1}", end="", flush=True)
        for own, row in zip(times, rows, strict=True):
            own.append(seconds(row.solver))
    print(f" of {PASSES}")
    return [replace(row, seconds=median(own)) for row, own in zip(rows, times, strict=True)]
