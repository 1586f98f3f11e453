"""How a training's backward passes are solved, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import hbp

LABELS = {"library": "the library's layer", "exact": "exact", "highway": "Highway-BP", "fixed-point": "fixed point"}


@dataclass(frozen=True)
class Phases:
    """Iterations that change at shares of the training: ``starts[i]`` is the share at which ``rounds[i]`` begin.

    >>> Phases((1, 2, None)).schedule(9)
    Schedule(phases={0: 1, 3: 2, 6: None})
    """

    rounds: tuple[int | None, ...]
    starts: tuple[float, ...] | None = None
    """None: at equal parts."""

    def schedule(self, steps: int) -> hbp.Schedule:
        """For a training of so many steps; of phases that begin together the last one counts."""
        starts = self.starts or [i / len(self.rounds) for i in range(len(self.rounds))]
        return hbp.Schedule({int(share * steps): k for share, k in zip(starts, self.rounds, strict=True)})

    def __str__(self) -> str:
        rounds = ["exact" if k is None else str(k) for k in self.rounds]
        if self.starts is None:
            return "-".join(rounds)
        return "-".join(f"{k}at{100 * share:g}" for k, share in zip(rounds, self.starts, strict=True))

    @property
    def label(self) -> str:
        """For people."""
        if self.starts is None:
            return f"k = {', '.join('exact' if k is None else str(k) for k in self.rounds)} in equal parts"
        rounds = ["exact" if k is None else f"k = {k}" for k in self.rounds]
        return ", ".join(f"{k} from {share:.0%}" for k, share in zip(rounds, self.starts, strict=True))


@dataclass(frozen=True)
class Diagnosed:
    """The fewest sequential block steps whose gradient is within ``target`` of the exact one, measured now and then."""

    target: float
    iterations: tuple[int, ...] = (0, 1, 2, 3, 5)
    times: int = 8
    """How often in a training."""

    def __str__(self) -> str:
        return f"diagnosed{self.target:g}"

    @property
    def label(self) -> str:
        """For people."""
        return f"k by diagnose within {self.target:.0%}"


@dataclass(frozen=True)
class Estimated:
    """A damping estimated from the layers now and then, one for all of them or one each."""

    per_layer: bool = False
    times: int = 8

    def __str__(self) -> str:
        return "per-layer" if self.per_layer else "estimated"

    @property
    def label(self) -> str:
        """For people."""
        return f"gamma estimated{' per layer' if self.per_layer else ''}"


Kind: TypeAlias = Literal["library", "exact", "highway", "fixed-point"]


@dataclass(frozen=True)
class Backward:
    """One way to solve the adjoint equation of every training step.

    Args:
        kind: the library's own layer, this library's exact adjoint, Highway-BP, or the fixed point (R = 0).
        iterations: k, or how it changes; the cap with a tolerance.
        chunk, tolerance, rank: as in hbp.
        damping: gamma, instead of the task's own.
    """

    kind: Kind = "exact"
    iterations: int | Phases | Diagnosed | None = None
    chunk: int = 1
    tolerance: float | None = None
    rank: int | Literal["auto"] = 0
    damping: float | Estimated | None = None

    @property
    def key(self) -> str:
        """A name of letters, digits and ``. = + -``."""
        return ".".join([self.kind, *(f"{short}={value}" for short, _, value in self._options())])

    @property
    def label(self) -> str:
        """A name for people."""
        return ", ".join([LABELS[self.kind], *(getattr(v, "label", f"{long} {v}") for _, long, v in self._options())])

    def _options(self) -> list[tuple[str, str, Any]]:
        """What differs from the defaults: in a key, for people, the value."""
        found: list[tuple[str, str, Any]] = [] if self.iterations is None else [("k", "k =", self.iterations)]
        found += [("chunk", "chunk", self.chunk)] if self.chunk > 1 else []
        found += [] if self.tolerance is None else [("tol", "tolerance", f"{self.tolerance:g}")]
        found += [("rank", "rank", self.rank)] if self.rank else []
        return found + ([] if self.damping is None else [("gamma", "gamma", self.damping)])

    def solver(self, step: int, steps: int) -> hbp.Solver:
        """The solver of a training step; of `Diagnosed` before the first measurement, exact backprop."""
        k = self.iterations
        if isinstance(k, Phases):
            k = k.schedule(steps)(step)
        if isinstance(k, Diagnosed):
            k = None
        return hbp.Solver(k, self.chunk, None if k is None and self.phased else self.tolerance)

    @property
    def phased(self) -> bool:
        """Whether the iterations change by phases."""
        return isinstance(self.iterations, Phases)


EXACT = Backward()
LIBRARY = Backward("library")


def highway(*iterations: int, chunk: int = 1) -> list[Backward]:
    """Highway-BP for each k."""
    return [Backward("highway", k, chunk) for k in iterations]


def fixed_point(*iterations: int) -> list[Backward]:
    """The fixed-point baseline for each k."""
    return [Backward("fixed-point", k) for k in iterations]


def block_steps(length: int, rounds: int | None, chunk: int, sources: bool) -> int:
    """How many pullbacks through one layer's block a backward pass does one after another, on any machine.

    Exact: one a layer. Highway-BP: one a chunk's layer in each round (at most as many rounds as there are chunks), and
    as many again from the chunks' ends to the parameters, S (k + 1); where losses enter inside a chunk, they are first
    gathered at its start, in S more. Scans along the residual path are not counted.

    >>> block_steps(64, None, 1, False), block_steps(64, 3, 1, True), block_steps(64, 3, 8, True)
    (64, 4, 40)
    """
    if rounds is None:
        return length
    size = min(chunk, length)
    return size * (min(rounds, -(-length // size)) + 1 + (sources and size > 1))
