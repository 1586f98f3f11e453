"""The number of iterations as a function of the training step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from hbp.core.backend import check_count, check_kind


@dataclass(frozen=True)
class Schedule:
    """Iterations as a step function of the training step: the paper's first piece of future work.

    Args:
        phases: first step of each phase -> its iterations, None for exact backprop. One phase starts at step 0.

    Raises:
        TypeError, ValueError: a step or a number of iterations is no non-negative integer; no phase starts at 0.

    >>> schedule = Schedule({0: 1, 500: 2, 1000: 5, 2000: None})
    >>> schedule(0), schedule(499), schedule(500), schedule(10**6)
    (1, 1, 2, None)
    """

    phases: Mapping[int, int | None]

    def __post_init__(self) -> None:
        check_kind("phases", self.phases, Mapping, "a mapping of steps to iterations")
        phases = {
            check_count("step", step, 0): None if k is None else check_count("iterations", k, 0)
            for step, k in self.phases.items()
        }
        if 0 not in phases:
            raise ValueError(f"no phase starts at step 0, the first starts at {min(phases, default=None)}; add 0: k")
        object.__setattr__(self, "phases", dict(sorted(phases.items())))

    def __call__(self, step: int) -> int | None:
        """The iterations at this training step, counted from 0."""
        starts = list(self.phases)
        return self.phases[starts[bisect_right(starts, check_count("step", step, 0)) - 1]]

    def __hash__(self) -> int:
        return hash(tuple(self.phases.items()))
