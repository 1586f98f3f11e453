"""The memory of the NumPy cells, counted by tracemalloc in units of the bytes of ``h``."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import hbp
from hbp.cells import GRUParameters, LSTMParameters

BATCH, WIDTH = 4, 32
FEW, MANY = 64, 256

# Peaks of the first call, which linearises, and of a second one. Measured: GRU 17.1 and 10.2, LSTM 25.1 and 17.3,
# LSTM with a tolerance 28.5 and 21.5; x is as wide as h.
LIMITS = {"gru": (20, 12), "lstm": (32, 24)}


def peak_and_kept(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """The bytes a call allocates at its peak, those of what it returns, and what it returns."""
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, kept, result


def run(cell: str, steps: int, rng: np.random.Generator) -> Callable[[], Any]:
    kind, gates = (GRUParameters, 3) if cell == "gru" else (LSTMParameters, 4)
    rows = gates * WIDTH
    params = kind(*(rng.uniform(-0.2, 0.2, shape) for shape in ((rows, WIDTH), (rows, WIDTH), rows, rows)))
    x, h0 = rng.normal(size=(steps, BATCH, WIDTH)), np.zeros((BATCH, WIDTH))
    initial = h0 if cell == "gru" else (h0, h0)
    return lambda: getattr(hbp.cells, cell)(params, x, initial)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"iterations": 1},
        {"iterations": 12},
        {"iterations": 3, "chunk": 8},
        {"iterations": 3, "residual": hbp.Zero()},
        {"iterations": 12, "tolerance": 1e-9},
    ],
    ids=str,
)
def test_backward_needs_a_constant_number_of_states(
    cell: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    states, pullback = run(cell, FEW, rng)()
    pullback(states, **options)  # compiled code is loaded, and stays
    for steps in (FEW, MANY):
        states, pullback = run(cell, steps, rng)()
        unit = steps * BATCH * WIDTH * 8
        for limit in LIMITS[cell]:
            peak, _, _ = peak_and_kept(partial(pullback, states, **options))
            assert peak <= limit * unit


@pytest.mark.parametrize(("cell", "arrays"), [("gru", 1), ("lstm", 2)])
def test_forward_keeps_the_states_alone(cell: str, arrays: int, rng: np.random.Generator) -> None:
    forward = run(cell, MANY, rng)
    forward()  # compiled code is loaded, and stays
    _, kept, _ = peak_and_kept(forward)
    assert kept <= (arrays + 0.1) * MANY * BATCH * WIDTH * 8
