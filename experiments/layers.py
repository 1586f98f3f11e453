"""A training step of recurrent layers: the case, its gradient in float64, and the names of the ways to it.

Several layers are stacked as the paper does, with residual connections around all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.measure import Library, Method
from hbp import cells
from hbp.backends._array import NumpyLike

ITERATIONS = (0, 1, 2, 3, 5, 10, 20)
LOOP, LAYER, OURS, HIGHWAY = "step loop", "the library's layer", "hbp, exact", "Highway-BP"
LOOP_EXACT, LOOP_HIGHWAY, LOOP_FIXED = "step loop, exact adjoint", "step loop, Highway-BP", "step loop, fixed point"


@dataclass(frozen=True)
class Case:
    """A recurrent model, as wide inside as outside.

    Args:
        cell: "gru" or "lstm".
        layers: how many.
        T, B, H: steps, batch and units.
        every: whether a loss enters after each step, or after the last one alone.
    """

    cell: str
    layers: int
    T: int
    B: int
    H: int
    every: bool = True

    @property
    def gates(self) -> int:
        """Of the cell, each with weights of its own."""
        return {"gru": 3, "lstm": 4}[self.cell]

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return self.layers * self.gates * self.H * (2 * self.H + 2)

    def problem(self) -> tuple[list[Any], np.ndarray, np.ndarray]:
        """Each layer's weights as PyTorch draws them, the inputs, and the cotangents of the outputs; float32."""
        rng, bound, rows = np.random.default_rng(0), self.H**-0.5, self.gates * self.H
        kind = cells.GRUParameters if self.cell == "gru" else cells.LSTMParameters
        shapes = ((rows, self.H), (rows, self.H), (rows,), (rows,))
        layers = [kind(*(rng.uniform(-bound, bound, s).astype(np.float32) for s in shapes)) for _ in range(self.layers)]
        x, dy = rng.standard_normal((2, self.T, self.B, self.H), dtype=np.float32)
        if not self.every:
            dy[:-1] = 0
        return layers, x, dy


PAPER: dict[str, tuple[float, dict[str, tuple[float, ...]]]] = {
    "LSTM": (261, {"fixed point": (81, 92, 99, 111, 128, 173, 262), HIGHWAY: (87, 101, 114, 125, 154, 218, 347)}),
    "GRU": (209, {"fixed point": (62, 69, 73, 79, 92, 119, 176), HIGHWAY: (66, 77, 88, 97, 118, 166, 266)}),
    "GRU, 3 layers": (
        687,
        {"fixed point": (226, 243, 260, 281, 316, 400, 573), HIGHWAY: (240, 268, 300, 332, 389, 538, 839)},
    ),
    "GRU, long": (
        715,
        {"fixed point": (191, 207, 204, 203, 209, 216, 241), HIGHWAY: (205, 210, 210, 210, 230, 248, 292)},
    ),
}
"""Table 6, milliseconds of a training step: of backprop, and of k in `ITERATIONS`."""
CASES = {
    "paper": (
        Case("lstm", 1, 256, 128, 512),
        Case("gru", 1, 256, 128, 512),
        Case("gru", 3, 256, 128, 512),
        Case("gru", 1, 1024, 128, 64, every=False),
    ),
    "laptop": (
        Case("lstm", 1, 256, 8, 128),
        Case("gru", 1, 256, 8, 128),
        Case("gru", 3, 256, 8, 128),
        Case("gru", 1, 1024, 8, 64, every=False),
    ),
}


def methods(case: Case, lib: Library) -> Iterator[Method]:
    """All ways in a library."""
    found: Iterator[Method] = import_module(f"experiments.{lib.name}_layers").methods(case, lib)
    return found


def stacked(outputs: Any, x: Any, layers: int) -> Any:
    """The input of the next layer."""
    return outputs if layers == 1 else x + outputs


def pulled(pullbacks: Sequence[Any], dy: Any, **how: Any) -> list[Any]:
    """The gradients of all parameters by the layers' pullbacks, from the last layer to the first."""
    found: list[Any] = []
    for n in reversed(range(len(pullbacks))):
        pair = isinstance(pullbacks[n], cells.LSTMPullback)
        params, dx, _ = pullbacks[n]((dy, None) if pair else dy, with_inputs=n > 0, **how)
        found = [*params, *found]
        dy = dy if dx is None else dy + dx
    return found


def reference(case: Case) -> np.ndarray:
    """The exact gradient in float64, by NumPy's plain definitions."""
    plain, (layers, x, dy), pullbacks = NumpyLike("numpy", np), case.problem(), []
    x = x.astype(np.float64)
    for own in layers:
        params, zero = type(own)(*(w.astype(np.float64) for w in own)), np.zeros_like(x[0])
        if case.cell == "gru":
            h, pullback = cells.gru(params, x, zero, backend=plain)
        else:
            (h, _), pullback = cells.lstm(params, x, (zero, zero), backend=plain)
        pullbacks.append(pullback)
        x = stacked(h, x, case.layers)
    return np.concatenate([d.ravel() for d in pulled(pullbacks, dy.astype(np.float64))])
