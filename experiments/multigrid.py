"""The adjoint equation by two-level multigrid reduction in time, the other way to a parallel backward pass.

MGRIT (Falgout et al. 2014; on the layers of residual nets: Guenther et al. 2020, arXiv 1812.04352) keeps every S-th
state as a C-point. With the whole stages' pullbacks ``F[j]`` the C-points obey ``G[j] = F[j] G[j+1] + b[j]``. A cycle
is relaxation (exact propagation from each C-point through its stage, all stages at once) and the coarse correction
``e[j] = P[j] e[j+1] + r[j]`` of the residual r, one stage after another, by a propagator P that costs one layer. With
F-relaxation and a coarse solve at the start this is Parareal,

    G <- solve P:  G[j] = P[j] G[j+1] + (F[j] - P[j]) G_old[j+1] + b[j],

which with the stages' residual paths as P is Highway-BP with chunks: what differs is the propagator, which Highway-BP
takes cheap enough for a parallel scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from hbp.core.backend import Array, Backend, check_count
from hbp.core.chain import LinearizedChain
from hbp.core.equation import Equation
from hbp.core.pullbacks import Pullbacks
from hbp.core.registry import resolve
from hbp.core.scan import loop
from hbp.core.solver import Solver

Relaxation: TypeAlias = Literal["F", "FCF"]
SWEEPS: dict[str, int] = {"F": 1, "FCF": 2}
"""How often a cycle of each relaxation goes through the stages."""


@dataclass(frozen=True, eq=False)
class HeldBlocks(Pullbacks):
    """The coarse propagators: each stage with its first layer's block alone, held while its state takes S steps.

    ``x <- R[i] x + block`` with a constant block is ``(product of R) + (sum of the products after each layer) B`` to
    the first order. Where R = I this is the literature's rediscretised layer of S times the step, ``I + S B``; where
    S = 1 it is the layer.
    """

    chain: LinearizedChain
    size: int

    def __len__(self) -> int:
        return -(-len(self.chain) // self.size)

    def at(self, i: int, cotangent: Array, backend: Backend) -> Array:
        stage = self.chain[i * self.size : (i + 1) * self.size]
        moved = held = cotangent
        for n in reversed(range(1, len(stage))):
            moved = stage.residual[n].T.mv(moved)
            held = held + moved
        return stage.residual[0].T.mv(moved) + stage[:1].pull_blocks(held[None], backend)[0]


def multigrid(
    chain: LinearizedChain,
    cotangent: Array,
    cycles: int,
    size: int,
    *,
    relaxation: Relaxation = "F",
    coarse: Pullbacks | None = None,
    sources: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    """All of ``g``, (L+1, ...), after some cycles from a coarse solve; exact from as many cycles as there are stages.

    With FCF-relaxation from half as many. ``size`` is S; ``coarse`` other propagators than `HeldBlocks`, whose `at`
    pulls one cotangent back through a stage; cotangent, sources and backend as in `hbp.highway`.
    """
    resolved = resolve(backend, cotangent, *chain.residual.arrays)
    solver = Solver(check_count("cycles", cycles, 0), size)
    fine = Equation(chain.bind(cotangent, resolved), cotangent, sources, solver, resolved)
    propagators = HeldBlocks(fine.chain, size) if coarse is None else coarse

    def relaxed(g: Array) -> Array:
        return resolved.concat([fine.coarse(g[1:], resolved) + fine.c[:-1], fine.c[-1:]])

    def solved(c: Array) -> Array:
        step = lambda g, i: propagators.at(i, g, resolved) + c[i]  # noqa: E731
        g = loop(step, c[-1], len(c) - 1, reverse=True, backend=resolved)
        return resolved.concat([g, c[-1:]])

    g = solved(fine.c)
    for _ in range(cycles):
        for _ in range(SWEEPS[relaxation] - 1):
            g = relaxed(g)
        g = g + solved(relaxed(g) - g)
    return fine.filled(g)


def steps(length: int, cycles: int, size: int, relaxation: Relaxation = "F") -> int:
    """How many layers are pulled back through one after another: coarse solves, relaxations, and the last sweep.

    That goes from the C-points through the stages' layers to their states and parameters.
    """
    return (cycles + 1) * -(-length // size) + (cycles * SWEEPS[relaxation] + 1) * size
