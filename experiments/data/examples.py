"""Examples and their batches, each batch a function of seed and step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

Array = np.ndarray
Inputs = tuple[Array, ...]
IGNORED = -100
"""A target that counts neither in loss nor metric."""


class Batch(NamedTuple):
    """What a model is called with, ``model(*inputs)``, and what it should answer; the first axis is the batch's.

    Inputs are float32 or int64; targets int64 classes (`IGNORED` where there is none), or float32 numbers.
    """

    inputs: Inputs
    targets: Array


def as_they_are(inputs: Inputs, rng: np.random.Generator | None) -> Inputs:  # noqa: ARG001
    """Inputs that need no preparation."""
    return inputs


@dataclass(frozen=True)
class Examples:
    """Examples along the first axis.

    Args:
        inputs: arrays of all examples.
        targets: their targets.
        prepare: called with a batch's inputs, and a generator in training (for augmentation), None in validation.
    """

    inputs: Inputs
    targets: Array
    prepare: Callable[[Inputs, np.random.Generator | None], Inputs] = as_they_are

    def __len__(self) -> int:
        return len(self.targets)

    def first(self, count: int | None) -> Examples:
        """So many of them; None for all."""
        return replace(self, inputs=tuple(x[:count] for x in self.inputs), targets=self.targets[:count])

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Endless training batches from step ``start`` on, each epoch in another random order.

        An epoch's last batch is filled from the next epoch.
        """
        step, orders = start, _Orders(len(self), seed)
        while True:
            places = range(step * size, (step + 1) * size)
            rng = np.random.default_rng([seed, 1, step])
            yield self._batch(np.array([orders[place] for place in places]), rng)
            step += 1

    def once(self, size: int) -> Iterator[Batch]:
        """All examples in order, as validation needs them; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self._batch(np.arange(start, min(start + size, len(self))), None)

    def _batch(self, which: Array, rng: np.random.Generator | None) -> Batch:
        inputs = self.prepare(tuple(array[which] for array in self.inputs), rng)
        return Batch(tuple(_plain(array) for array in inputs), _plain(self.targets[which]))


class _Orders:
    """Which example stands at a place of the endless row of epochs."""

    def __init__(self, examples: int, seed: int) -> None:
        self._examples, self._seed, self._epoch = examples, seed, -1

    def __getitem__(self, place: int) -> int:
        epoch, offset = divmod(place, self._examples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, 0, epoch]).permutation(self._examples)
        return int(self._order[offset])


def _plain(array: Array) -> Array:
    kind: Any = np.float32 if array.dtype.kind == "f" else np.int64
    return np.ascontiguousarray(array, kind)


class Data(NamedTuple):
    """A task's examples."""

    train: Examples
    validation: Examples


@dataclass(frozen=True)
class Task(ABC):
    """What is learned, as a value: where the examples come from, and how answers are judged."""

    title: ClassVar[str]
    """As pages name the data."""
    loss: ClassVar[Literal["cross-entropy", "squared error"]] = "cross-entropy"
    """Mean over all targets that are not `IGNORED`."""
    metric: ClassVar[Literal["accuracy", "perplexity", "loss"]] = "accuracy"
    """Share of right answers, exp(loss), or the loss itself; over the validation examples."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers a model answers per target: classes, symbols, or 1."""

    @abstractmethod
    def load(self, folder: Path | None = None) -> Data:
        """All examples; ``folder`` is where data sets lie and what was made of them is kept.

        Raises:
            DataError: one sentence: what is missing or broken, where it is looked for, and how to get it.
        """

    def made_up(self, count: int) -> Data:
        """So many examples like these or more, without a file: what this machine makes, else random numbers."""
        return self.load()
