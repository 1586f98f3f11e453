"""Chunks of several steps: stages that go back through their steps at once, as the batch of a shorter sequence.

A round solves the iteration of `hbp.core.equation` on stages for what it changes. An exact pass F through all stages
takes the last round's cotangents ``g`` at their ends to their starts; what it and the sources give there and ``g`` does
not have yet is the defect, and goes on along the residual path R alone::

    change[s] = R[s]^T change[s+1] + (F(g[s+1]) + source[s] - g[s]),    g[s] += change[s]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hbp.backends._numba.arrays import empty
from hbp.backends._numba.compile import as_numpy
from hbp.backends._numba.scan import suffix_scan
from hbp.backends._numba.way import WayBack
from hbp.backends.numpy import backend
from hbp.core.backend import Array
from hbp.core.operator import Diagonal
from hbp.core.solver import Solver


@dataclass(frozen=True)
class Stages:
    """Stages of ``size`` consecutive steps, the last perhaps of fewer, of so many steps and batch entries.

    >>> Stages(5, 2, 1).apart(np.arange(5.0).reshape(5, 1, 1)).squeeze(2).tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 0.0]]
    """

    length: int
    size: int
    batch: int

    @classmethod
    def of(cls, solver: Solver, states: Array) -> Stages:
        """Those of a solver's chunks, of states (T, B, H)."""
        return cls(len(states), min(solver.chunk, len(states)), states.shape[1])

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.length // self.size)

    @property
    def last(self) -> list[int]:
        """The last step of each."""
        return [min(start + self.size, self.length) - 1 for start in range(0, self.length, self.size)]

    def apart(self, x: Array) -> Array:
        """The numbers of all steps, (T, B, N), as (size, stages * B, N); zeros where the last has no more steps."""
        whole, shape = self.length // self.size, (self.size, self.count, self.batch, x.shape[-1])
        found, more = empty(x, shape), self.length - whole * self.size
        found[:, :whole] = self._whole(x)
        if more:
            found[:more, whole], found[more:, whole] = x[-more:], 0
        return found.reshape((self.size, self.count * self.batch, x.shape[-1]))

    def together(self, apart: Array) -> Array:
        """`apart`'s inverse."""
        whole, width = self.length // self.size, apart.shape[-1]
        x, by_step = empty(apart, (self.length, self.batch, width)), self.by_step(apart)
        self._whole(x)[...] = by_step[:, :whole]
        if more := self.length - whole * self.size:
            x[-more:] = by_step[:more, whole]
        return x

    def _whole(self, x: Array) -> Array:
        """The stages that have all their steps, as a view (size, stages, B, N) of (T, B, N)."""
        whole = self.length // self.size
        return x[: whole * self.size].reshape((whole, self.size, self.batch, x.shape[-1])).swapaxes(0, 1)

    def by_step(self, apart: Array) -> Array:
        """What `apart` returned as (size, stages, B, N)."""
        return apart.reshape((self.size, self.count, self.batch, apart.shape[-1]))

    def before(self, initial: Array, states: Array) -> Array:
        """The states before the stages, (stages * B, H), of the initial ones and those of all steps."""
        found = empty(initial, (self.count, *initial.shape))
        found[0], found[1:] = initial, states[self.last[:-1]]
        return found.reshape((self.count * self.batch, initial.shape[-1]))


@dataclass(frozen=True, eq=False)
class Path:
    """The residual path through each stage: of a GRU, or of an LSTM, from c alone to h and c."""

    kept: np.ndarray
    """What the gates of all its steps keep, (stages, B, H)."""
    exposed: np.ndarray | None = None
    """The derivative of its last state h by c, where there are both."""

    @classmethod
    def of(cls, stages: Stages, gate: Array, exposed: np.ndarray | None = None) -> Path:
        """Of the gate that keeps, (T, B, H)."""
        values = as_numpy(gate)
        kept = values[:: stages.size].copy()
        for step in range(1, stages.size):
            own = values[step :: stages.size]
            kept[: len(own)] *= own
        return cls(kept, exposed)

    def along(self, sources: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The cotangents at the stages' boundaries of what enters there, (stages + 1, B, H): of h, or of h and c."""
        *others, last = sources
        if self.exposed is not None:
            last = last.copy()
            last[:-1] += self.kept * self.exposed * others[0][1:]
        return [*others, suffix_scan(Diagonal(self.kept), last)]


def solve(
    stages: Stages,
    solver: Solver,
    path: Path,
    cotangents: Sequence[Array],
    way: Callable[[list[Array], list[Array]], WayBack],
) -> tuple[WayBack, list[Array]]:
    """The way back from where the solver's rounds lead, not gone yet, and the first states' cotangents, (B, H) each.

    Args:
        stages, solver: with chunks of several steps.
        path: along which a change goes on.
        cotangents: from outside, of all states h, or h and c, (T, B, H) each.
        way: through all stages, given what enters inside and the cotangents at their ends, (stages * B, H) each.
    """
    inside, sources = map(list, zip(*(_cut(stages, own) for own in cotangents), strict=True))
    g, sizes = [np.zeros_like(own) for own in sources], list[tuple[float, float]]()
    for _ in range(solver.most(stages.count) + 1):
        carries = [_as_carry(own, cotangents[0]) for own in g]
        way(inside, carries).through()
        with np.errstate(all="ignore"):  # compiled loops are silent on infinities, too
            changes = path.along([_defect(*own) for own in zip(carries, sources, g, strict=True)])
            g = [own + change for own, change in zip(g, changes, strict=True)]
        for own, source in zip(inside, sources, strict=True):  # known from now on, so it takes no part in changes
            as_numpy(stages.by_step(own))[stages.last[-1] % stages.size, -1] = source[-1]
        if solver.tolerance is not None or solver.watch is not None:
            sizes.append((_norm(changes), _norm(g)))
            if solver.settled(sizes[-1]):
                break
    if sizes:
        solver.tell(sizes, stages.count)
    ends, first = [_as_carry(own, cotangents[0]) for own in g], [empty(cotangents[0], own[0].shape) for own in g]
    for array, own in zip(first, g, strict=True):
        as_numpy(array)[...] = own[0]
    return way(inside, ends), first


def _cut(stages: Stages, cotangents: Array) -> tuple[Array, np.ndarray]:
    """What enters inside the stages, as `Stages.apart`, and at their boundaries, (stages + 1, B, H)."""
    inside, x = stages.apart(cotangents), as_numpy(cotangents)
    stages.by_step(inside)[[step % stages.size for step in stages.last], range(stages.count)] = 0
    return inside, np.concatenate([np.zeros_like(x[:1]), x[stages.last]])


def _as_carry(g: np.ndarray, like: Array) -> Array:
    """The cotangents at the stages' ends, (stages * B, H); the last one's enter inside, where it may be shorter."""
    carry = empty(like, ((len(g) - 1) * g.shape[1], g.shape[2]))
    rows = as_numpy(carry).reshape(g[1:].shape)
    rows[:-1], rows[-1] = g[1:-1], 0
    return carry


def _defect(carry: Array, source: np.ndarray, g: np.ndarray) -> np.ndarray:
    """What sources and stages give at the boundaries, and g does not have."""
    found: np.ndarray = source - g
    found[:-1] += as_numpy(carry).reshape(g[1:].shape)
    return found


def _norm(parts: Sequence[np.ndarray]) -> float:
    return backend.norm(np.concatenate([part.reshape(-1) for part in parts]))
