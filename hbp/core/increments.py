"""What the increments of a stationary iteration tell: how far it has come, and whether its split suits the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hbp.core.backend import Array

CONVERGING = 0.5  # a larger share of the solution in one increment is no sign of convergence
ADVICE = "damp the split (Scalar(1 - gamma)), use chunks or, in a recurrent layer, a higher rank, or exact backprop"


class DivergenceWarning(UserWarning):
    """The increments of an iteration grow instead of meeting its tolerance, or end in infinity or in each other's
    rounding: the split suits these layers badly.
    """


@dataclass(frozen=True, eq=False)
class Iterate:
    """Iterate k of Highway-BP.

    Attributes:
        iteration: k, the number of blocks a counted path may cross.
        cotangents: g, shape (L+1, ...).
        increment: the norm of the last increment ``d[k]`` (with chunks, at the stage boundaries).
        size: the norm of the solution so far, likewise.

    >>> Iterate(1, None, increment=1.0, size=4.0).relative
    0.25
    """

    iteration: int
    cotangents: Array
    increment: float
    size: float

    @property
    def relative(self) -> float:
        """The increment as a fraction of the solution; 0 where both are zero."""
        return _ratio(self.increment, self.size)


@dataclass(frozen=True)
class Report:
    """What the increments of an iteration say about its split.

    Attributes:
        increments: the norm of each increment ``d[0], d[1], ...``.
        sizes: the norm of the solution after each.
        exact: whether the last iterate counts every path.

    >>> Report((4.0, 1.0), (4.0, 5.0), exact=False).verdict
    'converging: the last increment is 0.2 of the solution'
    """

    increments: tuple[float, ...]
    sizes: tuple[float, ...]
    exact: bool

    def __post_init__(self) -> None:
        if not self.increments or len(self.increments) != len(self.sizes):
            raise ValueError(
                f"{len(self.increments)} increments and {len(self.sizes)} sizes; give one of each per round"
            )

    @classmethod
    def of(cls, sizes: Sequence[tuple[float, float]], length: int) -> Report:
        """The report on iterates 0, 1, ... of a chain (of stages) of this length, from both sizes of each."""
        increments, solutions = zip(*sizes, strict=True)
        return cls(increments, solutions, len(sizes) == length + 1)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each increment as a fraction of the solution after it; 0 where both are zero."""
        return tuple(map(_ratio, self.increments, self.sizes))

    @property
    def finite(self) -> bool:
        """Whether no increment holds NaN or infinity."""
        return all(map(math.isfinite, self.increments))

    @property
    def diverges(self) -> bool:
        """Whether some increment grew, and past the solution."""
        rows = zip(self.increments, self.increments[1:], self.sizes[1:], strict=False)
        return any(last < new > size for last, new, size in rows)

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if not self.finite:
            return "not finite: an increment holds NaN or infinity"
        if self.diverges:
            return f"diverges: the increments grow to {max(self.shares):.2g} times the solution; {ADVICE}"
        state = "exact" if self.exact else "converging" if self.shares[-1] < CONVERGING else "not yet converged"
        return f"{state}: the last increment is {self.shares[-1]:.2g} of the solution"


def _ratio(increment: float, size: float) -> float:
    return increment / size if size else math.inf if increment else 0.0
