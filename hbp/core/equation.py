"""One adjoint equation and its solution: layer after layer, or by the iteration ``g <- scan(R^T, c + B^T g)``.

The iteration's increments ``d[0] = scan(R^T, c)``, ``d[n+1] = scan(R^T, B^T d[n])`` sum up to its iterates and tell how
far it has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TypeAlias

from hbp.core.backend import Array, Backend, dtype_name
from hbp.core.chain import LinearizedChain, Stages
from hbp.core.increments import Iterate
from hbp.core.scan import loop
from hbp.core.solver import Solver

State: TypeAlias = tuple[Array, Array]
"""The last increment, and the solution so far, at the states of the chain of stages."""
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The relative error of one number; a sum of increments keeps that of the largest."""


@dataclass(frozen=True, eq=False)
class Equation:
    """An adjoint equation whose input has been checked: a bound chain, what enters at its states, and a solver."""

    chain: LinearizedChain
    cotangent: Array
    sources: Array | None
    solver: Solver
    backend: Backend

    @cached_property
    def coarse(self) -> LinearizedChain:
        """The chain of stages; with chunks of one layer, the chain itself."""
        coarse = self.chain.coarsen(self.solver.chunk)
        return coarse if coarse is self.chain else coarse.bind(self.cotangent, self.backend)

    @cached_property
    def c(self) -> Array:
        """What enters at the states of the chain of stages, (number of stages + 1, ...)."""
        sources, count = self.sources, len(self.coarse)
        if sources is None:
            zero = self.backend.zeros_like(self.cotangent)
            sources = self.backend.xp.broadcast_to(zero, (count, *self.cotangent.shape))
        elif self.coarse is not self.chain:
            *_, sources = self.coarse.pullbacks.sweep(self.backend.zeros_like(sources[:count]), sources, self.backend)
        return self.backend.concat([sources, self.cotangent[None]])

    @property
    def most(self) -> int:
        """The number of rounds at most, beyond which nothing is left."""
        return self.solver.most(self.backend.total(len(self.coarse)))

    def solved(self) -> Array:
        """All of g, shape (L+1, ...)."""
        if self.solver.exact:
            return self._exact()
        g = self._scanned(self.c)
        if not self.solver.measures:
            return self.filled(self.backend.repeat(lambda g: self._round(g, self.c), g, self.most))
        return self.filled(self.backend.repeat(self.advance, (g, g), self.most, self)[1])

    def iterates(self, filled: bool = True) -> Iterator[Iterate]:
        """The iterates that the solver would go through; else than ``filled`` only their sizes."""
        state = (self._scanned(self.c),) * 2
        for k in range(self.most + 1):
            state = self.advance(state) if k else state
            sizes = self.measure(state)
            # The iteration goes on from its own arrays, whatever becomes of these.
            yield Iterate(k, self.backend.concat([self.filled(state[1])]) if filled else None, *sizes)
            if self.settled(sizes):
                return

    def advance(self, state: State) -> State:
        """The next increment, and the sum of all."""
        increment = self._round(state[0], self.backend.zeros_like(self.c))
        return increment, state[1] + increment

    def measure(self, state: State) -> tuple[float, float]:
        """The sizes of the increment and of the solution."""
        return self.backend.norm(state[0]), self.backend.norm(state[1])

    def settled(self, sizes: tuple[float, float]) -> bool:
        """Whether the tolerance is met, or will not be."""
        return self.solver.settled(sizes)

    def told(self, sizes: Sequence[tuple[float, float]]) -> None:
        """Report on all rounds, from their sizes."""
        rounding = ROUNDING.get(dtype_name(self.cotangent), 0.0)
        self.solver.tell(sizes, self.backend.total(len(self.coarse)), rounding)

    def _scanned(self, c: Array) -> Array:
        return self.backend.propagate(self.coarse.residual.T, c)

    def _round(self, g: Array, c: Array) -> Array:
        """``scan(R^T, c + B^T g)``: all blocks at once, then one suffix scan."""
        pulled = self.coarse.pull_blocks(g[1:], self.backend) + c[:-1]
        return self._scanned(self.backend.concat([pulled, c[-1:]]))

    def _exact(self) -> Array:
        """Layer after layer."""
        if not len(self.chain):
            return self.backend.stack([self.cotangent])

        def layer_by_layer(g: Array, i: int) -> Array:
            g = self.chain.at(i, g, self.backend)
            return g if self.sources is None else g + self.sources[i]

        scan = self.backend.scan if self.chain.traceable else partial(loop, backend=self.backend)
        g = scan(layer_by_layer, self.cotangent, len(self.chain), reverse=True)
        return self.backend.concat([g, self.cotangent[None]])

    def filled(self, g: Array) -> Array:
        """``g`` at all states of the chain, from its values at the stage boundaries."""
        if self.coarse is self.chain:
            return g
        stages: Stages = self.coarse.pullbacks
        inside = list(islice(stages.sweep(g[1:], self.sources, self.backend), stages.size - 1))
        rows = self.backend.stack([g[:-1], *reversed(inside)], axis=1)
        states = rows.reshape((len(stages) * stages.size, *g.shape[1:]))[: len(self.chain)]
        return self.backend.concat([states, g[-1:]])
