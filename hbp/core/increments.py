"""What the increments of a stationary iteration tell: how far it has come, and whether its split suits the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hbp.core.backend import Array

ADVICE = "damp the split (Scalar(1 - gamma)), use chunks, or exact backprop"


class DivergenceWarning(UserWarning):
    """The increments of an iteration grow past its solution: the split suits these layers badly."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """Iterate k of Highway-BP.

    Attributes:
        iteration: k, the number of blocks a counted path may cross.
        cotangents: g, shape (L+1, ...).
        increment: the norm of the last increment ``d[k]`` (with chunks, at the stage boundaries).
        size: the norm of the solution so far, likewise.
    """

    iteration: int
    cotangents: Array
    increment: float
    size: float

    @property
    def relative(self) -> float:
        """The increment as a fraction of the solution; 0 where both are zero."""
        return self.increment / self.size if self.size else self.increment


@dataclass(frozen=True)
class Report:
    """What the increments of an iteration say about its split.

    Attributes:
        increments: the norm of each increment ``d[0], d[1], ...``.
        sizes: the norm of the solution after each.
        exact: whether the last iterate counts every path.
    """

    increments: tuple[float, ...]
    sizes: tuple[float, ...]
    exact: bool

    @classmethod
    def of(cls, seen: Sequence[Iterate], length: int) -> Report:
        """The report on the iterates seen so far, on a chain (of stages) of this length."""
        return cls(tuple(it.increment for it in seen), tuple(it.size for it in seen), seen[-1].iteration == length)

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
            worst = max(a / b if b else math.inf for a, b in zip(self.increments, self.sizes, strict=True))
            return f"diverges: the increments grow to {worst:.2g} times the solution; {ADVICE}"
        last = self.increments[-1] / self.sizes[-1] if self.sizes[-1] else 0.0
        return f"{'exact' if self.exact else 'converging'}: the last increment is {last:.2g} of the solution"
