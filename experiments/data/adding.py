"""The adding problem: a long-range task of any length (Hochreiter and Schmidhuber, 1997)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.examples import Data, Examples, Task


@dataclass(frozen=True)
class Adding(Task):
    """The sum of two marked numbers among ``length`` of them: inputs (B, T, 2) of numbers in [0, 1) and marks.

    One mark lies in each half of the sequence. Answering 1 always has a squared error of 1/6.
    """

    title = "adding problem"
    loss = "squared error"
    metric = "loss"
    length: int = 100
    examples: int = 20_000

    @property
    def outputs(self) -> int:
        return 1

    def load(self, folder: Path | None = None) -> Data:
        return Data(self._drawn(self.examples, 0), self._drawn(1000, 1))

    def _drawn(self, count: int, seed: int) -> Examples:
        rng, half = np.random.default_rng([20260101, seed]), self.length // 2
        x = np.zeros((count, self.length, 2), np.float32)
        x[..., 0] = rng.random(x.shape[:2])
        marked = np.stack([rng.integers(0, half, count), rng.integers(half, self.length, count)], 1)
        np.put_along_axis(x[..., 1], marked, 1, 1)
        targets = np.take_along_axis(x[..., 0], marked, 1).sum(1, keepdims=True)
        return Examples((x,), targets)
