"""Train the same classifier with exact backprop, the fixed-point baseline and Highway-BP, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

import numpy as np

from hbp.core.backend import Array
from hbp.core.increments import Report
from hbp.core.operator import LinearOperator, Zero
from hbp.core.solver import Solver
from hbp.demo.model import Adam, Classifier, Digits, Model, digits, initial
from hbp.diagnosis.agreement import Agreement

COSINE_EVERY = 10
ACCURACY_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """What one comparison trains, for how long, and on how many threads."""

    backend: str = "numpy"
    cell: str = "gru"
    steps: int = 600
    seed: int = 0
    iterations: tuple[int, ...] = (1, 3)
    chunks: tuple[int, ...] = (1, 8)
    ranks: tuple[int | Literal["auto"], ...] = (0, 8)
    tolerance: float | None = 0.1
    """Of the ranks but 0; None: each of the iterations instead"""
    hidden: int = 32
    batch: int = 64
    rate: float = 5e-3
    threads: int = 1
    """CPU threads that it may use"""


@dataclass
class Run:
    """One method's training: what it does, and every figure recorded while it did."""

    method: str
    iterations: int | None
    chunk: int
    residual: LinearOperator | None = None
    rank: int | Literal["auto"] = 0
    tolerance: float | None = None
    rounds: list[int] = field(default_factory=list)
    """Those that each step took, where a tolerance ends them"""
    losses: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    """(steps taken, accuracy on the test images)"""

    @property
    def solver(self) -> Solver:
        """How the backward pass is solved."""
        return Solver(self.iterations, self.chunk, self.tolerance)

    @property
    def k(self) -> float | None:
        """The rounds of a backward pass, in the mean where a tolerance ends them; None for exact backprop."""
        return self.iterations if self.tolerance is None else fmean(self.rounds)

    @property
    def family(self) -> str:
        """A name for the runs that differ in k alone."""
        chunk, rank = f" chunk={self.chunk}" * (self.chunk > 1), f" rank={self.rank}" * (self.rank != 0)
        return f"{self.method}{chunk}{rank}"

    @property
    def label(self) -> str:
        """A name for plots and progress."""
        if self.solver.exact:
            return self.method
        return f"{self.family} {f'k={self.iterations}' if self.tolerance is None else f'tolerance={self.tolerance}'}"

    def cut(self, steps: int) -> Run:
        """The figures of the first ``steps`` steps."""
        names = ("losses", "rounds", "forward_ms", "backward_ms", "update_ms")
        kept = {name: getattr(self, name)[:steps] for name in names}
        cosines = self.cosines[: -(-steps // COSINE_EVERY)]
        return replace(self, cosines=cosines, accuracies=[a for a in self.accuracies if a[0] <= steps], **kept)

    @property
    def step_ms(self) -> list[float]:
        """The duration of each whole step."""
        return [sum(parts) for parts in zip(self.forward_ms, self.backward_ms, self.update_ms, strict=True)]

    @property
    def ms_per_step(self) -> float:
        """The median, which the load of the machine moves least."""
        return median(self.step_ms)

    def block_steps(self, length: int) -> float:
        """How many pullbacks through one time step's block a backward does one after another, on any machine.

        Exact: one a step. Highway-BP and the fixed point: one a chunk's step in each round (at most as many rounds as
        there are chunks), and as many again from the chunks' ends through their steps to the parameters: S (k + 1).
        Scans of the residual path are not counted, nor gates, recomputed for all steps at once. The loss enters
        after the last step; one at every step would have to be gathered in each chunk first, in S more.
        """
        if self.k is None:
            return length
        size = min(self.chunk, length)
        return size * (min(self.k, -(-length // size)) + 1)


def runs(settings: Settings) -> list[Run]:
    """The methods to compare; the fixed point of no iterations is no method: it never looks back in time."""
    found = [Run("exact", None, 1)]
    if 0 in settings.ranks:
        found += [Run("fixed point", k, 1, Zero()) for k in settings.iterations if k]
        found += [Run("highway", k, chunk) for chunk in settings.chunks for k in settings.iterations]
    for rank in (rank for rank in settings.ranks if rank != 0):
        if settings.tolerance is None:
            found += [Run("highway", k, 1, rank=rank) for k in settings.iterations]
        else:
            found.append(Run("highway", None, 1, rank=rank, tolerance=settings.tolerance))
    return found


class Trainer:
    """Trains one run step by step and records its figures; the clock is stopped for everything but the step."""

    def __init__(self, run: Run, settings: Settings, data: Digits, front_end: ModuleType) -> None:
        backend, jit = front_end.backend, front_end.jit
        model = Model(settings.cell, backend)
        self.run, self._data, self._rate, self._backend = run, data, settings.rate, backend
        self._state = Adam.start(initial(settings.cell, settings.hidden, settings.seed, backend.xp), backend)
        self._forward, self._correct = jit(model.forward), jit(model.correct)
        self._update = jit(Adam.step)
        self._exact = jit(_with(model.backward, solver=Solver()))
        solver = run.solver if run.tolerance is None else run.solver.watched(self._count)
        self._backward = jit(_with(model.backward, solver=solver, residual=run.residual, rank=run.rank))

    def _count(self, report: Report) -> None:
        self.run.rounds.append(len(report.increments) - 1)

    def warm_up(self, x: Array, y: Array) -> None:
        """Compile and touch everything once, outside all figures."""
        _, dlogits, states = self._forward(self._state.model, x, y)
        gradient = self._backward(self._state.model, x, dlogits, states)
        self._update(self._state, gradient, self._rate)
        self._exact(self._state.model, x, dlogits, states)
        self.measure_accuracy()
        self.run.accuracies.clear()
        self.run.rounds.clear()

    def step(self, x: Array, y: Array) -> None:
        """One training step on a batch."""
        run, before = self.run, self._state
        loss, (dlogits, states), forward_ms = self._timed_forward(x, y)
        start = perf_counter()
        gradient = self._backward(before.model, x, dlogits, states)
        _wait(gradient)
        middle = perf_counter()
        self._state = self._update(before, gradient, self._rate)
        _wait(self._state.model)
        end = perf_counter()
        if len(run.losses) % COSINE_EVERY == 0:
            exact = self._exact(before.model, x, dlogits, states)
            # of the cell's parameters: the head's gradient is exact with every method
            run.cosines.append(Agreement.of(gradient.cell, exact.cell, self._backend).cosine)
        run.forward_ms.append(forward_ms)
        run.backward_ms.append(1e3 * (middle - start))
        run.update_ms.append(1e3 * (end - middle))
        run.losses.append(loss)  # last: its length counts the steps whose figures are complete
        if len(run.losses) % ACCURACY_EVERY == 0:
            self.measure_accuracy()

    def measure_accuracy(self) -> None:
        """Record the share of test images named rightly."""
        count = float(self._correct(self._state.model, self._data.test_x, self._data.test_y))
        self.run.accuracies.append((len(self.run.losses), count / len(self._data.test_y)))

    def _timed_forward(self, x: Array, y: Array) -> tuple[float, tuple[Array, Any], float]:
        start = perf_counter()
        loss, dlogits, states = self._forward(self._state.model, x, y)
        value = float(loss)
        return value, (dlogits, states), 1e3 * (perf_counter() - start)


def train(settings: Settings, front_end: ModuleType) -> Iterator[list[Run]]:
    """Train all runs in turns, each step on the same batch, so that their times compare.

    Yields the runs after the warm-up of each and then after every step; all their figures are there at each yield.
    """
    data = digits(front_end.backend.xp)
    found = runs(settings)
    trainers = [Trainer(run, settings, data, front_end) for run in found]
    rng = np.random.default_rng(settings.seed)

    def batch() -> tuple[Array, Array]:
        chosen = front_end.backend.xp.asarray(rng.integers(0, len(data.train_y), settings.batch))
        return data.train_x[:, chosen], data.train_y[chosen]

    x, y = batch()
    for trainer in trainers:
        trainer.warm_up(x, y)
        yield found
    for step in range(settings.steps):
        x, y = batch()
        for trainer in trainers[step % len(trainers) :] + trainers[: step % len(trainers)]:
            trainer.step(x, y)
        yield found
    for trainer in trainers:
        if not trainer.run.accuracies or trainer.run.accuracies[-1][0] < settings.steps:
            trainer.measure_accuracy()


def _with(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        return function(*args, **options)

    return called


def _wait(model: Classifier) -> None:
    """Wait for asynchronous work: reading one number of the last result needs all of it."""
    float(model.bias[0])
    float(model.cell.weight_hh[0, 0])
