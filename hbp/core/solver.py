"""How an adjoint equation is solved, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hbp.core.backend import check_count, check_tolerance
from hbp.core.schedule import Schedule

if TYPE_CHECKING:
    from hbp.core.increments import Report


@dataclass(frozen=True)
class Solver:
    """How the adjoint equation is solved; checked when it is made.

    Args:
        iterations: Highway-BP's k; None for exact backprop, a `Schedule` for a value that changes from step to step
            (`at`). With a tolerance it is the cap (None: as many as are exact).
        chunk: layers per stage; blocks are then stages, inside which backprop is exact.
        tolerance: stop when the last increment is below this fraction of the solution.
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
    watch: Callable[[Report], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.iterations is not None and not isinstance(self.iterations, Schedule):
            object.__setattr__(self, "iterations", check_count("iterations", self.iterations, 0))
        object.__setattr__(self, "chunk", check_count("chunk", self.chunk, 1))
        object.__setattr__(self, "tolerance", check_tolerance(self.tolerance))
        if self.watch is not None and not callable(self.watch):
            raise TypeError(f"watch is a {type(self.watch).__name__}; give a function that takes a Report, or None")

    @classmethod
    def of(cls, solver: Solver | None, **keywords: Any) -> Solver:
        """The solver that a function's ``solver=`` and its other keywords ask for.

        Raises:
            TypeError: both are given, or the solver is none.
        """
        given = cls(**keywords)
        if solver is None:
            return given
        if not isinstance(solver, Solver):
            raise TypeError(f"solver is a {type(solver).__name__}; give an hbp.Solver")
        if given != cls() or given.watch is not None:
            raise TypeError(f"both solver={solver} and {', '.join(keywords)} are given; give one or the other")
        return solver

    @property
    def exact(self) -> bool:
        """Whether this is plain exact backprop, layer after layer."""
        return self.iterations is None and self.tolerance is None

    @property
    def plain(self) -> bool:
        """Whether this is a fixed number of rounds on single layers, with nobody watching."""
        return self.iterations is not None and self.chunk == 1 and self.tolerance is None and self.watch is None

    def fixed(self) -> Solver:
        """This solver, after checking that it has no schedule (TypeError)."""
        if isinstance(self.iterations, Schedule):
            raise TypeError("iterations is a Schedule; call it with the training step, or solver.at(step)")
        return self

    def at(self, step: int) -> Solver:
        """The solver of one training step: a schedule's value in its place."""
        return replace(self, iterations=self.iterations(step)) if isinstance(self.iterations, Schedule) else self
