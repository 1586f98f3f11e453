"""How an adjoint equation is solved, as a value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from hbp.core.backend import check_count, check_kind
from hbp.core.increments import ADVICE, DivergenceWarning, Report
from hbp.core.schedule import Schedule

NOISE = 16
"""Relative errors of one number at which differences of solutions were seen to stall, where gates forget little."""


@dataclass(frozen=True)
class Solver:
    """How the adjoint equation is solved; checked when it is made.

    Args:
        iterations: Highway-BP's k; None for exact backprop, a `Schedule` for a number that changes from step to step
            (`at`). With a tolerance it is the cap (None: as many as are exact).
        chunk: layers per stage; blocks are then stages, inside which backprop is exact.
        tolerance: stop when the last increment is at most this fraction of the solution, from 0 to 1, or is not finite,
            which no further round mends; a `DivergenceWarning` says once where it is not met and the increments grow,
            or grew so far that what rounding leaves of them is more. Compiled code that measures differences of
            solutions stops at their rounding, too (`above`).
        watch: called with the report on the increments, where there are any.

    Raises:
        TypeError, ValueError: a field is not what its name says.

    >>> Solver(iterations=3, chunk=8)
    Solver(iterations=3, chunk=8, tolerance=None)
    >>> Solver(Schedule({0: 1, 500: None})).at(500).exact
    True
    """

    iterations: int | Schedule | None = None
    chunk: int = 1
    tolerance: float | None = None
    watch: Callable[[Report], Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.iterations is not None and not isinstance(self.iterations, Schedule):
            object.__setattr__(self, "iterations", check_count("iterations", self.iterations, 0))
        object.__setattr__(self, "chunk", check_count("chunk", self.chunk, 1))
        if self.tolerance is not None:
            real = isinstance(self.tolerance, Real) and not isinstance(self.tolerance, bool)  # type: ignore[unreachable]
            if not real or not 0 <= float(self.tolerance) <= 1:
                raise ValueError(f"tolerance={self.tolerance!r}; give a non-negative number, at most 1")
            object.__setattr__(self, "tolerance", float(self.tolerance))
        check_kind("watch", self.watch, Callable | None, "a function that takes a Report, or None")

    @classmethod
    def of(cls, solver: Solver | None, **keywords: Any) -> Solver:
        """The solver that a function's ``solver=`` and its other keywords ask for.

        Raises:
            TypeError: both are given, or the solver is none.
        """
        given = cls(**keywords)
        if solver is None:
            return given
        check_kind("solver", solver, Solver, "an hbp.Solver")
        if others := [name for name in keywords if getattr(given, name) != getattr(cls(), name)]:
            raise TypeError(f"solver={solver} is given beside {', '.join(others)}; give one or the other")
        return solver

    @property
    def exact(self) -> bool:
        """Whether this is plain exact backprop, layer after layer."""
        return self.iterations is None and self.tolerance is None

    def at(self, step: int) -> Solver:
        """The solver of one training step: a schedule's number in its place."""
        return replace(self, iterations=self.iterations(step)) if isinstance(self.iterations, Schedule) else self

    def watched(self, watch: Callable[[Report], Any]) -> Solver:
        """This solver, of whose increments another is told too."""
        return replace(self, watch=lambda report: [told(report) for told in (self.watch, watch) if told is not None])

    def most(self, length: int) -> int:
        """The number of rounds at most on a chain of this length, beyond which nothing is left."""
        return length if self.iterations is None else min(self.iterations, length)  # type: ignore[type-var,return-value]

    @property
    def measures(self) -> bool:
        """Whether anybody asks how large the increments are."""
        return self.tolerance is not None or self.watch is not None

    def above(self, rounding: float) -> Solver:
        """This solver for increments that are differences of solutions, given the relative error of one number.

        A tolerance is at least some of these, as such differences get no smaller; 0 stays, and asks for all rounds.
        """
        return replace(self, tolerance=max(self.tolerance, NOISE * rounding)) if self.tolerance else self

    def settled(self, sizes: tuple[float, float]) -> bool:
        """Whether a last increment and a solution of these norms meet the tolerance, or are not finite."""
        # No comparison with NaN is true, and infinity is not more than a part of infinity.
        return self.tolerance is not None and (sizes[0] > self.tolerance * sizes[1]) == 0

    def tell(self, sizes: Sequence[tuple[float, float]], length: int, rounding: float = 0.0) -> None:
        """Report on all rounds on a chain of this length, from their norms.

        A warning's words hold nothing that was measured, so that Python says it once.

        Args:
            sizes: the norms of the increment and of the solution, of each round.
            length: the chain's.
            rounding: the relative error of one number, where the solution is the sum of the increments.
        """
        report = Report.of(sizes, length)
        if trouble := self._trouble(report, rounding):
            warnings.warn(f"{trouble}{ADVICE}; this is said once", DivergenceWarning, stacklevel=6)
        if self.watch is not None:
            self.watch(report)

    def _trouble(self, report: Report, rounding: float) -> str | None:
        """Why a tolerance is not met, where there is one and the split is to blame."""
        if self.tolerance is None:
            return None
        if not report.finite:
            return "an increment is not finite after finite ones: " if math.isfinite(report.increments[0]) else None
        last, asked = report.increments[-1], self.tolerance * report.sizes[-1]
        if not report.diverges and last <= min(report.increments[-2:]):
            return None
        if last > asked and (asked or not report.exact):  # a tolerance of 0 asks for all rounds, and these are they
            rounds = len(report.increments) - 1
            return f"the increments grow, and {rounds} rounds have not met tolerance={self.tolerance}: allow more, "
        if rounding * max(report.increments) > asked > 0:
            return f"the increments grew so far that rounding leaves more than tolerance={self.tolerance}: "
        return None

    def fixed(self) -> Solver:
        """This solver, after checking that it holds no schedule (TypeError)."""
        if isinstance(self.iterations, Schedule):
            raise TypeError("iterations is a Schedule; call it with the training step, or use solver.at(step)")
        return self
