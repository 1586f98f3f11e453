"""What a diagnosis of k says, for every front end: a row per setting, a recommendation, a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp.core.backend import check_count
from hbp.core.increments import ADVICE, Report

HEADER = f"{'k':>4} {'chunk':>6} {'error':>9} {'cosine':>8} {'worst layer':>24} {'increment':>10} {'ms':>9}"


@dataclass(frozen=True)
class Agreement:
    """How far a gradient is from the exact one: |a - b| / |b|, and the cosine of the angle between them."""

    error: float
    cosine: float

    @classmethod
    def of(cls, squares: Sequence[float]) -> Agreement:
        """From |a - b|^2, |b|^2, |a|^2 and a.b."""
        difference, exact, found, product = squares
        error = math.sqrt(difference / exact) if exact else math.inf if difference else 0.0
        cosine = product / math.sqrt(exact * found) if exact and found else 1.0 if exact == found else 0.0
        return cls(error, cosine)

    @classmethod
    def summed(cls, squares: Iterable[Sequence[float]]) -> Agreement:
        """From those of several parts."""
        return cls.of([sum(column) for column in zip(*squares, strict=True)])


@dataclass(frozen=True)
class Row:
    """One setting beside exact backprop.

    Attributes:
        iterations, chunk: the setting.
        overall: agreement of all parameters' gradients.
        layers: agreement layer by layer, by name.
        reports: the increments of each backward pass, by the name of the layers it went through.
        seconds: the duration of forward and backward, the best of the repetitions.
    """

    iterations: int
    chunk: int
    overall: Agreement
    layers: Mapping[str, Agreement]
    reports: Mapping[str, Report]
    seconds: float

    @property
    def diverges(self) -> bool:
        """Whether some split's increments grow past the solution."""
        return any(report.diverges for report in self.reports.values())

    @property
    def increment(self) -> float:
        """The last increment as a fraction of the solution, the largest of all passes."""
        shares = [(r.increments[-1], r.sizes[-1]) for r in self.reports.values()]
        return max((new / size if size else math.inf if new else 0.0 for new, size in shares), default=math.nan)

    def __str__(self) -> str:
        name, worst = max(self.layers.items(), key=lambda item: item[1].error, default=("", self.overall))
        layer = f"{name[-15:]} {worst.error:.2g}"
        return (
            f"{self.iterations:>4} {self.chunk:>6} {self.overall.error:>9.2g} {self.overall.cosine:>8.4f} {layer:>24} "
            f"{self.increment:>10.2g} {1e3 * self.seconds:>9.1f}" + (" diverges" if self.diverges else "")
        )


@dataclass(frozen=True)
class Diagnosis:
    """Highway-BP's gradients of one batch beside exact backprop's, for several k and chunks.

    Attributes:
        rows: the settings.
        exact_seconds: the duration of exact backprop.
        target: the error wished for.
    """

    rows: tuple[Row, ...]
    exact_seconds: float
    target: float

    @property
    def recommended(self) -> Row | None:
        """The setting of the smallest k, then chunk, from which on every larger k tried is within the target."""
        good = [
            row
            for row in self.rows
            if all(
                other.overall.error <= self.target
                for other in self.rows
                if other.chunk == row.chunk and other.iterations >= row.iterations
            )
        ]
        return min(good, key=lambda row: (row.iterations, row.chunk), default=None)

    @property
    def advice(self) -> str:
        """A sentence or two for people."""
        row = self.recommended
        found = (
            f"no setting tried is within the target error of {self.target:.2g}; exact backprop, or more iterations"
            if row is None
            else f"recommended for an error of {self.target:.2g}: iterations={row.iterations}, chunk={row.chunk}"
        )
        if not any(row.reports for row in self.rows):
            return "no backward pass by Highway-BP was seen: does the loss hand iterations and chunk on?"
        bad = next((r for row in self.rows for r in row.reports.values() if r.diverges), None)
        return found + ("" if bad is None else f"\nthe split diverges at some settings: {ADVICE}")

    def __str__(self) -> str:
        exact = f"exact {'':>66} {1e3 * self.exact_seconds:>9.1f}"
        return "\n".join([HEADER, *map(str, self.rows), exact, self.advice])

    def plot(self, path: str | Path) -> None:
        """Write a picture: error against k, error by layer, and the increments of the largest k."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plots need matplotlib: pip install "hbp[demo]"') from error
        figure = Figure(figsize=(13, 4), layout="constrained")
        overall, by_layer, increments = figure.subplots(1, 3)
        for chunk in dict.fromkeys(row.chunk for row in self.rows):
            rows = sorted((row for row in self.rows if row.chunk == chunk), key=lambda row: row.iterations)
            steps = [row.iterations for row in rows]
            overall.plot(steps, [row.overall.error for row in rows], "o-", label=f"chunk {chunk}")
            for name, report in rows[-1].reports.items():
                shares = [a / b if b else math.nan for a, b in zip(report.increments, report.sizes, strict=True)]
                increments.plot(shares, "o-", label=f"{name or 'all'}, chunk {chunk}")
        overall.axhline(self.target, color="gray", linestyle=":", label="target")
        _logarithmic(overall, "k", "relative error of the gradient")
        _logarithmic(increments, "round", "increment / solution")
        first = [row for row in self.rows if row.chunk == self.rows[0].chunk]
        for row in first:
            errors = [agreement.error for agreement in row.layers.values()]
            by_layer.plot(errors, ".-", label=f"k = {row.iterations}")
        _logarithmic(by_layer, "layer, in the model's order", f"relative error, chunk {first[0].chunk}")
        figure.savefig(path, dpi=120)


def diagnosed(
    run: Callable[[int, int], Row],
    settings: tuple[list[int], list[int]],
    exact_seconds: float,
    target: float,
    plot: str | Path | None,
) -> Diagnosis:
    """Run all settings, print each row as it comes and the advice at the end, and draw the picture where wanted."""
    counts, sizes = settings
    print(HEADER)
    rows = []
    for chunk in sizes:
        for k in counts:
            rows.append(run(k, chunk))
            print(rows[-1])
    diagnosis = Diagnosis(tuple(rows), exact_seconds, target)
    print(diagnosis.advice)
    if plot is not None:
        diagnosis.plot(plot)
    return diagnosis


def check_settings(iterations: Sequence[int], chunks: Sequence[int]) -> tuple[list[int], list[int]]:
    """The settings to try, checked.

    Raises:
        TypeError, ValueError: there are none, or they are no counts.
    """
    counts = [check_count("iterations", k, 0) for k in iterations]
    sizes = [check_count("chunk", chunk, 1) for chunk in chunks]
    if not counts or not sizes:
        raise ValueError("give at least one number of iterations and one chunk")
    return counts, sizes


def _logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
