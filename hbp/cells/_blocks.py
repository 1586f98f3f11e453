"""The GRU's pullback in blocks of time, whose arrays stay in the caches and in memory that was written before.

Pullbacks compose: a block's cotangent of its initial state enters at the end of the block before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hbp.cells import GRUParameters, GRUPullback
from hbp.cells._common import matmul
from hbp.core.backend import Array

Solve: TypeAlias = Callable[[GRUPullback, int, Array], tuple[Array, Array, Array]]
"""A block, its first step, and the cotangent that enters at its last state from behind -> the cotangents of both
pre-activations and of its initial state."""

BLOCK = 2_000_000
"""Numbers in the largest array of a block; beyond some 10 MB fresh memory costs more than the arithmetic in it."""


def blocks_of(pullback: GRUPullback) -> list[tuple[int, GRUPullback]]:
    """The pullbacks of the blocks, each with its first step."""
    params, x, h = pullback.params, pullback.x, pullback.h
    _, batch, hidden = h.shape
    size = max(BLOCK // max(3 * hidden * batch, 1), 8)
    return [
        (a, GRUPullback(params, x[a : a + size], h[a - 1] if a else pullback.h0, h[a : a + size], pullback.backend))
        for a in range(0, len(x), size)
    ]


def pull_in_blocks(
    pullback: GRUPullback, blocks: list[tuple[int, GRUPullback]], solve: Solve, with_inputs: bool = True
) -> tuple[GRUParameters, Array | None, Array]:
    """The gradients of the parameters, of the inputs where wanted, and of the initial state; empties ``blocks``."""
    backend, x = pullback.backend, pullback.x
    dx, total, carry = backend.zeros_like(x) if with_inputs else None, None, backend.zeros_like(pullback.h0)
    while blocks:
        a, block = blocks.pop()  # what a block computed is gone after it
        inputs, recurrent, carry = solve(block, a, carry)
        found = block.parameters(inputs, recurrent)
        if dx is not None:
            dx[a : a + len(block.x)] = matmul(inputs, pullback.params.weight_ih)
        total = found if total is None else _added(total, found)
    assert total is not None
    return total, dx, carry


def _added(a: GRUParameters, b: GRUParameters) -> GRUParameters:
    return GRUParameters(*(None if one is None else one + other for one, other in zip(a, b, strict=True)))
