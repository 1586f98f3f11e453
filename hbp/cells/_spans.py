"""The GRU's pullback in spans of time, whose arrays stay in the caches and in memory that was written before.

Pullbacks compose: a span's cotangent of its initial state enters at the end of the span before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hbp.cells import GRUParameters, GRUPullback
from hbp.cells._common import matmul
from hbp.core.backend import Array

Solve: TypeAlias = Callable[[GRUPullback, int, Array], tuple[Array, Array, Array]]
"""A span, its first step, and the cotangent that enters at its last state from behind -> the cotangents of both
pre-activations and of its initial state."""

SPAN = 2_000_000
"""Numbers in the largest array of a span; beyond some 10 MB fresh memory costs more than the arithmetic in it."""


def spans_of(pullback: GRUPullback) -> list[tuple[int, GRUPullback]]:
    """The pullbacks of the spans, each with its first step."""
    params, x, h = pullback.params, pullback.x, pullback.h
    _, batch, hidden = h.shape
    size = max(SPAN // max(3 * hidden * batch, 1), 8)
    return [
        (a, GRUPullback(params, x[a : a + size], h[a - 1] if a else pullback.h0, h[a : a + size], pullback.backend))
        for a in range(0, len(x), size)
    ]


def pull_in_spans(
    pullback: GRUPullback, spans: list[tuple[int, GRUPullback]], solve: Solve, with_inputs: bool = True
) -> tuple[GRUParameters, Array | None, Array]:
    """The gradients of the parameters, of the inputs where wanted, and of the initial state; empties ``spans``."""
    backend, x = pullback.backend, pullback.x
    dx, total, carry = backend.zeros_like(x) if with_inputs else None, None, backend.zeros_like(pullback.h0)
    while spans:
        a, span = spans.pop()  # what a span computed is gone after it
        inputs, recurrent, carry = solve(span, a, carry)
        found = span.parameters(inputs, recurrent)
        if dx is not None:
            dx[a : a + len(span.x)] = matmul(inputs, pullback.params.weight_ih)
        total = found if total is None else _added(total, found)
    assert total is not None
    return total, dx, carry


def _added(a: GRUParameters, b: GRUParameters) -> GRUParameters:
    return GRUParameters(*(None if one is None else one + other for one, other in zip(a, b, strict=True)))
