"""Rounds on chunks of several steps: stages that go back at once, side by side, as the batch of a shorter sequence.

It is the iteration of `hbp.core.equation` on stages, solved for what a round changes. An exact pass F through all
stages takes the last round's cotangents ``g`` at their ends to their starts; what it and the sources give there and
``g`` does not have yet goes on along the residual path R alone::

    change[s] = R[s]^T change[s+1] + (F(g[s+1]) + source[s] - g[s])
    g[s] <- F(g[s+1]) + source[s] + R[s]^T change[s+1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from hbp.backends._array import NumpyLike
from hbp.backends._numba.arrays import empty
from hbp.backends._numba.compile import Threads, as_numpy
from hbp.backends._numba.scan import suffix_scan
from hbp.backends._numba.way_back import WayBack
from hbp.core.backend import Array
from hbp.core.operator import Diagonal
from hbp.core.solver import Solver

_NUMPY = NumpyLike("numpy", np)
State: TypeAlias = tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
"""What a round changed, and the cotangents, (stages + 1, B, H), of h, or of h and c."""


@dataclass(frozen=True)
class Layout:
    """Stages of ``size`` consecutive steps, the last perhaps of fewer, of a sequence, and how they lie side by side.

    >>> Layout(5, 2, 1).apart(np.arange(5.0).reshape(5, 1, 1)).squeeze(2).tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 0.0]]
    """

    length: int
    size: int
    batch: int

    @classmethod
    def of(cls, solver: Solver, states: Array) -> Layout:
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

    def cut(self, cotangents: Array) -> tuple[Array, np.ndarray]:
        """What enters inside the stages, as `apart`, and at their boundaries, (stages + 1, B, H), of (T, B, H)."""
        inside, x = self.apart(cotangents), as_numpy(cotangents)
        self.by_step(inside)[[step % self.size for step in self.last], range(self.count)] = 0
        return inside, np.concatenate([np.zeros_like(x[:1]), x[self.last]])

    def before(self, initial: Array, states: Array) -> Array:
        """The states before the stages, (stages * B, H), of the initial ones and those of all steps."""
        found = empty(initial, (self.count, *initial.shape))
        found[0], found[1:] = initial, states[self.last[:-1]]
        return found.reshape((self.count * self.batch, initial.shape[-1]))


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual path through each stage: of a GRU, or of an LSTM, from c alone to h and c."""

    kept: np.ndarray
    """What the gates of all its steps keep, (stages, B, H)."""
    exposed: np.ndarray | None = None
    """The derivative of its last state h by c, where there are both."""

    @classmethod
    def of(cls, layout: Layout, gate: Array, exposed: np.ndarray | None = None) -> Residual:
        """Of the gate that keeps, as `Layout.apart` lays it out."""
        kept, *others = as_numpy(layout.by_step(gate))
        kept = kept.copy()
        for step, own in enumerate(others, 1):
            stages = len(range(step, layout.length, layout.size))  # that have such a step
            kept[:stages] *= own[:stages]
        return cls(kept, exposed)

    def across(self, ends: Sequence[np.ndarray]) -> list[np.ndarray]:
        """From the cotangents at the stages' ends to those at their starts, (stages, B, H): of h, or of h and c."""
        if self.exposed is None:
            return [self.kept * ends[0]]
        return [np.zeros_like(ends[0]), self.kept * (ends[1] + self.exposed * ends[0])]

    def along(self, sources: Sequence[np.ndarray], threads: Threads) -> list[np.ndarray]:
        """The cotangents at the stages' boundaries of what enters there, (stages + 1, B, H): of h, or of h and c."""
        *others, last = sources
        if self.exposed is not None:  # what enters at h goes on in c
            last = last.copy()
            last[:-1] += self.kept * self.exposed * others[0][1:]
        return [*others, suffix_scan(Diagonal(self.kept), last, threads)]


@dataclass(frozen=True, eq=False)
class Rounds:
    """The rounds of a solver; their state are the changes of the last one and the cotangents at the boundaries."""

    layout: Layout
    solver: Solver
    residual: Residual
    sources: Sequence[np.ndarray]
    """What enters at the boundaries from outside, of h, or of h and c, (stages + 1, B, H) each."""
    inside: Sequence[Array]
    """What enters at all other steps, as `Layout.apart`."""
    way: WayBack
    """The exact way through all stages, with ``inside``."""

    @classmethod
    def of(
        cls,
        layout: Layout,
        solver: Solver,
        residual: Residual,
        cotangents: Sequence[Array],
        way: Callable[[Sequence[Array], Sequence[Array]], WayBack],
    ) -> Rounds:
        """With all states' cotangents from outside, (T, B, H) each; ``way`` takes what enters inside, and carries."""
        inside, sources = zip(*map(layout.cut, cotangents), strict=True)
        carries = [empty(own, (layout.count * layout.batch, own.shape[-1])) for own in cotangents]
        return cls(layout, solver, residual, sources, inside, way(inside, carries))

    def solved(self) -> list[Array]:
        """The cotangents of the first states, (B, H) each; the way starts from those at the stages' ends then."""
        nothing = [np.zeros_like(source) for source in self.sources]
        gauge = self if self.solver.measures else None
        first, most = self.advance((nothing, nothing)), self.solver.most(self.layout.count)
        for own, source in zip(self.inside, self.sources, strict=True):  # what the last state has is known from now on
            as_numpy(self.layout.by_step(own))[(self.layout.length - 1) % self.layout.size, -1] = source[-1]
        g: list[np.ndarray] = _NUMPY.repeat(self.advance, first, most, gauge)[1]
        self._start(g)
        firsts = [empty(carry, own[0].shape) for carry, own in zip(self.way.carries, g, strict=True)]
        for first_state, own in zip(firsts, g, strict=True):
            as_numpy(first_state)[...] = own[0]
        return firsts

    def advance(self, state: State) -> State:
        """A round: what F leads to and the sources give, and the last round did not have, goes on along the path."""
        _, g = state
        self._start(g)
        self.way.go()
        with np.errstate(all="ignore"):  # compiled loops are silent on infinities, too
            new = [source.copy() for source in self.sources]
            for own, carry in zip(new, self.way.carries, strict=True):
                own[:-1] += as_numpy(carry).reshape(own[1:].shape)
            defects = [own - old for own, old in zip(new, g, strict=True)]
            changes = self.residual.along(defects, self.way.how.threads)
            led = self.residual.across([change[1:] for change in changes])
            for own, more in zip(new, led, strict=True):  # not added to g, whose rounding would stay
                own[:-1] += more
        return changes, new

    def _start(self, g: Sequence[np.ndarray]) -> None:
        """Put the cotangents at the stages' ends into the carries; the last one's enter inside: it may be shorter."""
        for own, carry in zip(g, self.way.carries, strict=True):
            rows = as_numpy(carry).reshape(own[1:].shape)
            rows[:-1], rows[-1] = own[1:-1], 0

    def measure(self, state: State) -> tuple[float, float]:
        """The sizes of the changes and of the solution."""
        change, size = (_NUMPY.norm(np.concatenate(part)) for part in state)
        return change, size

    def settled(self, sizes: tuple[float, float]) -> bool:
        """Whether the tolerance is met, or will not be."""
        return self.solver.settled(sizes)

    def told(self, sizes: Sequence[tuple[float, float]]) -> None:
        """Report on all rounds, from their sizes."""
        self.solver.tell(sizes, self.layout.count)
