"""Scikit-learn's digits read pixel by pixel, and a recurrent classifier for them, in any array library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from hbp import cells
from hbp.core.backend import Array, Backend
from hbp.core.operator import LinearOperator
from hbp.core.solver import Solver
from hbp.directions import Rank

CLASSES = 10
TEST = 360
LENGTH = 64
"""Pixels of an image, one a time step."""


class Digits(NamedTuple):
    """Images as sequences (64, N, 1) with values in [0, 1], and one-hot labels (N, 10), float32."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


class Classifier(NamedTuple):
    """A recurrent cell and a linear head on its last state: weight (10, H), bias (10,)."""

    cell: Any
    weight: Array
    bias: Array


class Cell(NamedTuple):
    """What differs between the GRU and the LSTM."""

    gates: int
    parameters: type
    run: Any
    pullback: Any
    pair: bool
    """Whether the state is a pair (h, c)."""


CELLS = {
    "gru": Cell(3, cells.GRUParameters, cells.gru, cells.GRUPullback, False),
    "lstm": Cell(4, cells.LSTMParameters, cells.lstm, cells.LSTMPullback, True),
}


def digits(xp: Any) -> Digits:
    """The 1797 images, 360 of them for the test, split at random but always alike."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = (images[order] / 16).astype(np.float32).T[:, :, None]
    y = np.eye(CLASSES, dtype=np.float32)[labels[order]]
    return Digits(*(xp.asarray(np.ascontiguousarray(a)) for a in (x[:, TEST:], y[TEST:], x[:, :TEST], y[:TEST])))


def initial(cell: str, hidden: int, seed: int, xp: Any) -> Classifier:
    """A classifier with weights uniform in +-1/sqrt(H), as PyTorch's, the same in every library."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return xp.asarray(rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(hidden**0.5))

    rows = CELLS[cell].gates * hidden
    parameters = CELLS[cell].parameters(draw(rows, 1), draw(rows, hidden), draw(rows), draw(rows))
    return Classifier(parameters, draw(CLASSES, hidden), draw(CLASSES))


class Model:
    """Forward and backward pass of one kind of classifier in one array library."""

    def __init__(self, cell: str, backend: Backend) -> None:
        self._cell, self._backend = CELLS[cell], backend

    def _start(self, model: Classifier, x: Array) -> Any:
        h0 = self._backend.zeros_like(x[0] + model.weight[0])  # (B, 1) + (H,)
        return (h0, h0) if self._cell.pair else h0

    def forward(self, model: Classifier, x: Array, y: Array) -> tuple[Array, Array, Any]:
        """The mean cross-entropy, its cotangent of the logits, and the cell's states."""
        states, _ = self._cell.run(model.cell, x, self._start(model, x), backend=self._backend)
        h = states[0] if self._cell.pair else states
        logits = h[-1] @ model.weight.T + model.bias
        xp = self._backend.xp
        shifted = logits - xp.max(logits)
        log_p = shifted - xp.log(xp.exp(shifted).sum(-1))[:, None]
        return -(log_p * y).sum() / len(y), (xp.exp(log_p) - y) / len(y), states

    def correct(self, model: Classifier, x: Array, y: Array) -> Array:
        """How many labels the logits' largest entries hit."""
        dlogits = self.forward(model, x, y)[1]
        return ((dlogits * len(y) + y).argmax(-1) == y.argmax(-1)).sum()

    def backward(
        self, model: Classifier, x: Array, dlogits: Array, states: Any,
        *, solver: Solver, residual: LinearOperator | None = None, rank: Rank = 0,
    ) -> Classifier:  # fmt: skip
        """The gradient of all parameters; the options are those of the cell's pullback."""
        h = states[0] if self._cell.pair else states
        last = (dlogits @ model.weight)[None]
        dh = self._backend.concat([self._backend.zeros_like(h[:-1]), last])
        pullback = self._cell.pullback(model.cell, x, self._start(model, x), states, self._backend)
        given = (dh, None) if self._cell.pair else dh
        dcell, _, _ = pullback(given, solver=solver, residual=residual, rank=rank)
        return Classifier(dcell, dlogits.T @ h[-1], dlogits.sum(0))


class Adam(NamedTuple):
    """Adam's state: parameters, both moments, and the number of steps taken (Kingma and Ba, 2015)."""

    model: Classifier
    first: list[Array]
    second: list[Array]
    steps: int = 0

    @classmethod
    def start(cls, model: Classifier, backend: Backend) -> Adam:
        """No steps taken."""
        first, second = ([backend.zeros_like(p) for p in leaves(model)] for _ in range(2))
        return cls(model, first, second)

    def step(self, gradient: Classifier, rate: float, clip: float = 1.0) -> Adam:
        """One step along a gradient clipped to norm ``clip``."""
        grads, t = leaves(gradient), self.steps + 1
        norm = sum((g * g).sum() for g in grads) ** 0.5
        factor = clip / norm.clip(min=clip)
        first = [0.9 * m + (0.1 * factor) * g for m, g in zip(self.first, grads, strict=True)]
        second = [0.999 * v + (0.001 * factor**2) * (g * g) for v, g in zip(self.second, grads, strict=True)]
        scale, correction = rate / (1 - 0.9**t), 1 - 0.999**t
        moved = [
            p - scale * m / ((v / correction) ** 0.5 + 1e-8)
            for p, m, v in zip(leaves(self.model), first, second, strict=True)
        ]
        return Adam(rebuilt(self.model, moved), first, second, t)


def leaves(model: Classifier) -> list[Array]:
    """All parameter arrays, those of the cell first."""
    return [*model.cell, model.weight, model.bias]


def rebuilt(model: Classifier, arrays: list[Array]) -> Classifier:
    """A classifier like ``model`` with other arrays, in the order of `leaves`."""
    return Classifier(type(model.cell)(*arrays[:-2]), arrays[-2], arrays[-1])
