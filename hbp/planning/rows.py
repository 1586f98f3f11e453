"""What a plan says: a row for each number of stages and of microbatches, a table, a picture and a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp.core.backend import check_count
from hbp.diagnosis.picture import check
from hbp.planning import picture
from hbp.planning.costs import Costs, Link, Step, check_number

EXACT: Mapping[str, Callable[[Step], float]] = {
    "GPipe": Step.gpipe,
    "1F1B": Step.one_f_one_b,
    "put off": Step.put_off,
    "zero bubble": Step.zero_bubble,
}
LEGEND = (
    "P stages, M microbatches; put off: GPipe with its weight gradients at the end; k: Highway-BP's rounds; *: the "
    "fastest of the row"
)
WORTH = 1.05
"""How much faster an approximate gradient must be than the best exact schedule to be advised."""


@dataclass(frozen=True)
class Settings:
    """What a plan compares, checked before any work.

    Attributes:
        stages, microbatches, iterations: the numbers P, M and k to try.
        bandwidth, latency: of the link between two devices, in bytes per second and seconds.
        target: the relative error of the gradient that is good enough.
        plot: a file for a picture, or None.

    Raises:
        TypeError, ValueError: there are none of them, or they are no such numbers.
        ImportError, OSError, ValueError: the picture could not be drawn or written.
    """

    stages: Iterable[int]
    microbatches: Iterable[int]
    iterations: Iterable[int]
    bandwidth: float
    latency: float
    target: float = 0.05
    plot: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("stages", 1), ("microbatches", 1), ("iterations", 0)):
            object.__setattr__(self, name, _counts(name, getattr(self, name), least))
        Link(self.bandwidth, self.latency)
        check_number("target", self.target)
        if self.plot is not None:
            check(self.plot)

    @property
    def link(self) -> Link:
        """What joins the devices."""
        return Link(self.bandwidth, self.latency)


@dataclass(frozen=True)
class Row:
    """The step times at P stages and M microbatches.

    Attributes:
        stages, microbatches: P and M.
        exact: times by schedule; infinite where it cannot run.
        highway: Highway-BP's times by k.
        within: the k whose gradients are good enough.
    """

    stages: int
    microbatches: int
    exact: Mapping[str, float]
    highway: Mapping[int, float]
    within: tuple[int, ...]

    @property
    def best_exact(self) -> str:
        """The fastest exact schedule; of equally fast ones the simplest."""
        return min(self.exact, key=lambda name: self.exact[name])

    @property
    def best_k(self) -> int | None:
        """The k of the fastest Highway-BP that is good enough, None where none is."""
        return min(self.within, key=lambda k: self.highway[k], default=None)

    @property
    def gain(self) -> float:
        """How many times faster than the best exact schedule Highway-BP is; 0 where no k is good enough."""
        return 0.0 if self.best_k is None else self.exact[self.best_exact] / self.highway[self.best_k]

    def __str__(self) -> str:
        fastest = self.best_k if self.gain > 1 else self.best_exact
        times: list[tuple[str | int, float]] = [*self.exact.items(), *self.highway.items()]
        shown = (_column(f"{time:.4g}{'*' if name == fastest else ' '}", time) for name, time in times)
        return f"{self.stages:>4} {self.microbatches:>5}" + "".join(shown)


@dataclass(frozen=True)
class Plan:
    """Predicted times of a training step by exact pipelines and by Highway-BP.

    Attributes:
        settings: what is compared.
        costs: of one stage, by the number of stages.
        errors: the relative error of Highway-BP's gradient by stages and k, None where it was not measured.
        within: the stages and k whose gradients are good enough; not asked where errors are None.

    >>> settings = Settings((8, 64), (1, 8), (1, 3), bandwidth=1, latency=0)
    >>> print(Plan(settings, dict.fromkeys(settings.stages, Costs(1, 1, 1))).advice)
    P = 8: use Highway-BP with k = 1 where M = 1 (1.5 times as fast as the best exact schedule), \
else 1F1B or, faster, zero bubble (with M = 8 the fastest of all); P = 64: use Highway-BP with k = 1 (up to 1.9 times \
as fast as the best exact schedule), if its gradient is good enough, which hb.plan measures on a model.
    """

    settings: Settings
    costs: Mapping[int, Costs]
    errors: Mapping[tuple[int, int], float] | None = None
    within: frozenset[tuple[int, int]] = frozenset()

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row for each number of stages and of microbatches."""
        return tuple(self._row(P, M) for P in self.costs for M in self.settings.microbatches)

    @property
    def advice(self) -> str:
        """What to use at which number of stages, in a sentence."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for P in self.costs:
            rows = [row for row in self.rows if row.stages == P]
            groups.setdefault(_advised(rows), []).extend(rows)
        parts = [_places(rows) + start + _gain(rows, start) + end for (start, end), rows in groups.items()]
        measured = self.errors is not None or not any("Highway-BP" in part for part in parts)
        return "; ".join(parts) + (
            "." if measured else ", if its gradient is good enough, which hb.plan measures on a model."
        )

    def __str__(self) -> str:
        names = [*EXACT, *(f"k = {k} " for k in self.settings.iterations)]
        lines = [f"{'P':>4} {'M':>5}" + "".join(map(_column, names))]
        for P in self.costs:
            lines += [str(row) for row in self.rows if row.stages == P]
            if self.errors is not None:
                errors = (_column(f"{self.errors[P, k]:.2g} ") for k in self.settings.iterations)
                lines.append(f"{P:>4} error" + _column("") * len(EXACT) + "".join(errors))
        return "\n".join([*lines, LEGEND, self.advice])

    def plot(self, path: str | Path) -> None:
        """Write a picture: the time of a step against the number of stages, for each number of microbatches."""
        picture.draw(self.rows, path)

    def _row(self, stages: int, microbatches: int) -> Row:
        step = Step(self.costs[stages], self.settings.link, stages, microbatches)
        ks: Any = self.settings.iterations
        good = tuple(k for k in ks if self.errors is None or (stages, k) in self.within)
        exact = {name: time(step) for name, time in EXACT.items()}
        return Row(stages, microbatches, exact, {k: step.highway(k) for k in ks}, good)


def _counts(name: str, values: Any, least: int) -> tuple[int, ...]:
    """The different counts among some, in order."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name}={values!r}; give several integers of at least {least}, as (2, 4, 8)")
    found = tuple(sorted({check_count(name, value, least) for value in values}))
    if not found:
        raise ValueError(f"{name} is empty; give at least one integer of at least {least}")
    return found


def _advised(rows: list[Row]) -> tuple[str, str]:
    """What to use at one number of stages: the words before and after how much faster it is."""
    if rows[0].stages == 1:
        return "one device holds all layers, and backprop as ever is the fastest", ""
    pays = [row for row in rows if row.gain > WORTH]
    best = min(rows, key=lambda row: row.exact[row.best_exact])
    exact = "1F1B or, faster, zero bubble" if best.exact["1F1B"] < math.inf else "zero bubble"
    if not any(row.within for row in rows):
        return f"use {exact}: no k tried is within the target error", ""
    if not pays:
        return f"use {exact}: no k is worth its error", ""
    use = f"use Highway-BP with k = {pays[0].best_k}"
    if len(pays) == len(rows):
        return use, ""
    fastest = best.exact[best.best_exact] <= min(row.highway[k] for row in rows for k in row.within)
    also = f" (with M = {best.microbatches} the fastest of all)" if fastest else ""
    return f"{use} where M = {', '.join(str(row.microbatches) for row in pays)}", f", else {exact}{also}"


def _places(rows: list[Row]) -> str:
    return f"P = {', '.join(map(str, dict.fromkeys(row.stages for row in rows)))}: "


def _gain(rows: list[Row], start: str) -> str:
    """How much faster Highway-BP is where it is advised."""
    gains = [row.gain for row in rows if row.gain > WORTH]
    if "Highway-BP" not in start:
        return ""
    return f" ({'up to ' * (len(gains) > 1)}{max(gains):.2g} times as fast as the best exact schedule)"


def _column(text: str, value: float = 0.0) -> str:
    return f"{'- ' if math.isinf(value) else text:>13}"
