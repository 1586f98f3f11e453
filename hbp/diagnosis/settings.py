"""What a diagnosis tries, and how it runs in every front end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from hbp.core.backend import Array, check_count
from hbp.core.increments import Report
from hbp.core.solver import Solver
from hbp.diagnosis import picture
from hbp.diagnosis.agreement import Agreement
from hbp.diagnosis.rows import HEADER, Diagnosis, Row
from hbp.diagnosis.spectrum import Spectrum
from hbp.directions import Directions, Rank, check_rank

PASSES = 3
"""Over all settings in turn, after the one that measures their errors; times are the medians."""

Gradient: TypeAlias = Mapping[str, Sequence[Array]]
"""A model's gradient: each layer's arrays, by the layer's name."""
Gradients: TypeAlias = Callable[[Solver, Rank], tuple[Gradient, Mapping[str, Report]]]
"""The gradient by a solver and a rank, and the reports of its passes."""


@dataclass(frozen=True)
class Settings:
    """What a diagnosis tries and is asked for, checked before any work.

    Raises:
        TypeError, ValueError: there are no settings, they are no counts, no ranks, or the target is no number.
        ImportError, OSError, ValueError: the picture could not be drawn or written.
    """

    iterations: Sequence[int]
    chunks: Sequence[int]
    target: float
    plot: str | Path | None
    ranks: Sequence[Rank] = (0,)

    def __post_init__(self) -> None:
        for name, check in (
            ("iterations", partial(check_count, "iterations", minimum=0)),
            ("chunks", partial(check_count, "chunk", minimum=1)),
            ("ranks", _checked_rank),
        ):
            object.__setattr__(self, name, _checked(name, getattr(self, name), check))
        _check_target(self.target)
        if self.plot is not None:
            picture.check(self.plot)

    @property
    def each(self) -> list[tuple[int | None, int, Rank]]:
        """Each setting's k, chunk and rank; exact backprop is the first."""
        tried = ((k, chunk, rank) for chunk in self.chunks for rank in self.ranks for k in self.iterations)
        return [(None, 1, 0), *tried]


def compared(settings: Settings, backend: Any, gradient: Gradients) -> list[Row]:
    """The rows of all settings without their times, exact backprop first, printed as they come."""
    print(HEADER)
    rows: list[Row] = []
    wanted: Gradient = {}
    for k, chunk, rank in settings.each:
        found, reports = gradient(Solver(k, chunk), rank)
        wanted = wanted or found
        layers = {name: Agreement.of(list(found[name]), list(arrays), backend) for name, arrays in wanted.items()}
        rows.append(Row(k, chunk, sum(layers.values(), Agreement()), layers, reports, rank=rank))
        print(rows[-1])
    return rows


def diagnosed(
    settings: Settings,
    backend: Any,
    gradient: Gradients,
    seconds: Callable[[Solver, Rank], float],
    spectra: Mapping[str, Spectrum] | None = None,
) -> Diagnosis:
    """Run all settings, print rows as they come, then the table with times and the advice, and draw the picture.

    Args:
        settings: what to try.
        backend: of the gradients.
        gradient: what is compared.
        seconds: the duration of one forward and backward by a solver and a rank that `gradient` has seen.
        spectra: of the weights whose directions a rank takes, by name.
    """
    exact, *others = _timed(compared(settings, backend, gradient), seconds)
    diagnosis = Diagnosis(exact, tuple(others), settings.target, spectra or {})
    print(diagnosis)
    if settings.plot is not None:
        diagnosis.plot(settings.plot)
    return diagnosis


def _checked(name: str, values: Any, check: Callable[[Any], Any]) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}; give several to compare, as ({values!r},)")
    found = tuple(map(check, values))
    if not found:
        raise ValueError("give at least one number of iterations, one chunk and one rank")
    return found


def _checked_rank(rank: Any) -> Rank:
    check_rank(rank)
    if isinstance(rank, Directions):
        raise TypeError("ranks holds a Directions; give numbers, or 'auto'")
    return rank if rank == "auto" else check_count("rank", rank, 0)


def _check_target(target: Any) -> None:
    if isinstance(target, bool) or not isinstance(target, Real) or not float(target) >= 0:
        raise ValueError(f"target={target!r}; give a relative error that is good enough, as 0.05")


def _timed(rows: Sequence[Row], seconds: Callable[[Solver, Rank], float]) -> list[Row]:
    """The rows with their times, measured in turns, so that what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in rows]
    print("timing all settings in turn, pass", end="", flush=True)
    for i in range(PASSES):
        print(f" {i + 1}", end="", flush=True)
        for own, row in zip(times, rows, strict=True):
            own.append(seconds(row.solver, row.rank))
    print(f" of {PASSES}")
    return [replace(row, seconds=median(own)) for row, own in zip(rows, times, strict=True)]
