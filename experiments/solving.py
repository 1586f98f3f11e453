"""All ways to solve one chain's adjoint equation that are compared, each with its depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import hbp
from experiments.methods import block_steps
from experiments.multigrid import multigrid, steps

if TYPE_CHECKING:
    from experiments.chains import Point

ITERATIONS = (0, 1, 2, 3, 5, 8)
RANK = 8
SEQUENTIAL, WHOLE = "layer after layer", "whole Jacobians, scanned"
FIXED, PAPERS, DIAGONAL = "fixed point, R = 0", "the paper's R", "diagonal of the Jacobian"
LOW, FOLLOWED = f"diagonal and rank {RANK} of the rest", f"the paper's R and {RANK} directions of the weight"
CHUNKS, MGRIT, MGRIT_FCF = "the paper's R, chunks of S", "MGRIT, F-relaxation", "MGRIT, FCF-relaxation"


class Way(NamedTuple):
    """One way, and how many layers it goes through one after another, those to the parameters included."""

    name: str
    k: int | None
    steps: int
    solve: Callable[[], Any]
    """Returns all of g."""


def ways(point: Point, size: int) -> Iterator[Way]:
    """Layer after layer; splits; chunks and multigrid with stages of ``size`` layers; the scan of all Jacobians."""
    chain, cotangent, length = point.chain, point.cotangent, len(point.chain)
    yield Way(SEQUENTIAL, None, length, partial(hbp.backprop, chain, cotangent))
    for name, split in splits(point):
        for k in ITERATIONS:
            yield Way(name, k, block_steps(length, k, 1, False), partial(hbp.highway, split, cotangent, k))
    for k in (k for k in ITERATIONS if k <= -(-length // size)):
        solve = partial(hbp.highway, chain, cotangent, k, chunk=size)
        yield Way(CHUNKS, k, block_steps(length, k, size, False), solve)
        for name, relaxation in ((MGRIT, "F"), (MGRIT_FCF, "FCF")):
            solve = partial(multigrid, chain, cotangent, k, size, relaxation=relaxation)
            yield Way(name, k, steps(length, k, size, relaxation), solve)  # type: ignore[arg-type]

    def scanned() -> Any:
        return hbp.highway(chain.resplit(hbp.Dense(point.jacobians())), cotangent, 0)

    yield Way(WHOLE, None, 2, scanned)  # all Jacobians at once, and the parameters


def splits(point: Point) -> Iterator[tuple[str, hbp.LinearizedChain]]:
    """The chain under each split; what a split is made of is found here, and not timed."""
    chain = point.chain
    yield FIXED, chain.resplit(hbp.Zero())
    yield PAPERS, chain
    yield DIAGONAL, chain.resplit(point.diagonal(0))
    yield LOW, chain.resplit(point.diagonal(RANK))
    if point.following is not None:
        yield FOLLOWED, point.following(RANK)
