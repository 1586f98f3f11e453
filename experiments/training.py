"""Training runs: a task learned by a method from a seed, and everything that is recorded while it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from experiments.checkpoints import CheckpointError
from experiments.data import Data, Task
from experiments.estimates import CHECKPOINT_BYTES, quickest, scaled
from experiments.experiment import Context, Record, Request
from experiments.folder import replace
from experiments.history import History, Step, due
from experiments.methods import EXACT, Backward
from experiments.models import RecurrentClassifier, RecurrentLM
from experiments.settings import Problem, problem

POINTS = 200
"""At most so many points has a curve; each is the mean of the steps since the one before."""
VALIDATIONS = 12
PROBES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a training at which its gradients are probed (figure 6)."""
PROBED = (0, 1, 2, 3, 5, 8)
"""The iterations that a probe tries."""
PROBED_TASKS = ("gru", "resnet32", "gpt2", "pixels")
VALIDATED = {"accuracy": 500, "perplexity": 100, "loss": 500}
"""On so many of the first examples the laptop validates, by the metric: of a text many targets are one example."""
CHECKPOINT_S = 20.0
"""Seconds between checkpoints."""


class Trainer(Protocol):
    """A model in training, in one of the libraries."""

    parameters: int
    length: int
    """Layers that follow one another in a stack, or steps of a sequence."""

    def fetch(self) -> None:
        """Make the next batch."""

    def step(self, step: int) -> Step:
        """Train on the batch that was fetched."""

    def validate(self) -> Mapping[str, float]:
        """The loss and the task's metric on the validation examples."""

    def probe(self, iterations: tuple[int, ...]) -> Record:
        """Gradients of one batch by Highway-BP beside the exact one, and the sizes of the increments."""

    def notes(self) -> Record:
        """What else there is to say at the end, as the dampings that were estimated."""

    def save(self, path: Path, extra: Any) -> None:
        """Write all that the next steps depend on, and something else, to a file."""

    def load(self, path: Path) -> Any:
        """Be as when that was written; returns the something else.

        Raises:
            CheckpointError: it was written of another model or other settings.
        """


@dataclass(frozen=True)
class Run:
    """A training run, as a piece of work.

    Args:
        task, method, seed: what is learned, how, from where.
        preset, backend, steps, data: those of the request.
        alone: whether its wall-clock counts.
    """

    task: str
    method: Backward
    seed: int
    preset: str = "laptop"
    backend: str = "torch"
    steps: int | None = None
    data: Path | None = None
    alone: bool = False

    @classmethod
    def of(cls, request: Request, task: str, method: Backward, seed: int, alone: bool = False) -> Run:
        """What a request needs."""
        return cls(task, method, seed, request.preset, request.backend, request.steps, request.data, alone)

    @property
    def what(self) -> str:
        return f"{self.task}+{self.method.key}"

    @property
    def key(self) -> str:
        return f"{self.what}+{self.seed}"

    @property
    def probed(self) -> bool:
        """Whether gradients are probed on the way."""
        return self.method == EXACT and self.task in PROBED_TASKS

    @property
    def problem(self) -> Problem:
        """What is learned."""
        return problem(self.task, self.preset)

    @property
    def length_of_training(self) -> int:
        """Steps of the optimizer."""
        own = self.problem.training.steps
        return own if self.steps is None else min(own, self.steps)

    def trainer(self) -> Trainer:
        """The model at its start."""
        made: Trainer = self._module.Trainer(self, _data(self.problem.task, self.data))
        return made

    @property
    def _module(self) -> Any:
        """What trains in this library: a `Trainer`, and ``check(run)``, a ValueError where it cannot."""
        try:
            return import_module(f"experiments.{self.backend}_trainer")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"training with --backend {self.backend} needs {error.name}: pip install {error.name}"
            ) from error

    @property
    def validated(self) -> int | None:
        """How many examples are validated on; None for all."""
        return VALIDATED[self.problem.task.metric] if self.preset == "laptop" else None

    def check(self) -> int:
        self._module.check(self)
        return CHECKPOINT_BYTES * _parameters(self.task, self.preset, self.backend, self.data)

    def estimate(self) -> Record:
        self._module.check(self)
        steps = self.length_of_training
        if self.preset == "paper":  # whose steps take minutes, and whose data hours to fetch
            rounds: Any = self.method.solver(0, steps).iterations
            return scaled(self.task, self.preset, self.backend, rounds or 0, steps)
        trainer = self.trainer()
        found = {"parameters": trainer.parameters, "steps": steps, "bytes": CHECKPOINT_BYTES * trainer.parameters}
        return {**found, "seconds": quickest(trainer, 4) * steps, "how": "its own first steps"}

    def perform(self, context: Context) -> Record:
        """Train to the end; the clock runs for the steps alone."""
        start = perf_counter()
        trainer, steps = self.trainer(), self.length_of_training
        history = _going_on(trainer, context.checkpoint)
        context.earlier, written = history.performed, perf_counter()
        while True:
            self._measure(trainer, history, steps)
            if history.step == steps or not _finite(history):
                break
            self._step(trainer, history, steps)
            if perf_counter() - written > CHECKPOINT_S:
                history.performed = context.earlier + perf_counter() - start
                replace(context.checkpoint, lambda path: trainer.save(path, history))
                written = perf_counter()
            context.advance(history.step, steps, _remark(history))
        return self._record(trainer, history, steps)

    def _step(self, trainer: Trainer, history: History, steps: int) -> None:
        trainer.fetch()
        start = perf_counter()
        done = trainer.step(history.step)
        history.seconds += perf_counter() - start
        history.step += 1
        history.count(done, trainer.length, self.method.chunk, self.sources)
        if due(history.step, steps, POINTS) or not math.isfinite(done.loss):
            history.point(history.curve, loss=sum(history.pending) / len(history.pending))
            history.pending.clear()

    @property
    def sources(self) -> bool:
        """Whether losses, or the layers above, enter at every step of a sequence."""
        sizes = self.problem.sizes
        return isinstance(sizes, RecurrentLM) or (isinstance(sizes, RecurrentClassifier) and sizes.layers > 1)

    def _measure(self, trainer: Trainer, history: History, steps: int) -> None:
        """Validate and probe where it is time to."""
        seen = history.validation.get("step", [])
        if (history.step == 0 or due(history.step, steps, VALIDATIONS)) and history.step not in seen:
            history.point(history.validation, **trainer.validate())
        places = [int(share * steps) for share in PROBES]
        if self.probed and history.step in places and history.step not in [one["step"] for one in history.probes]:
            history.probes.append({"step": history.step, "share": history.step / steps, **trainer.probe(PROBED)})

    def _record(self, trainer: Trainer, history: History, steps: int) -> Record:
        task, training = self.problem.task, self.problem.training
        found = {"task": self.task, "method": self.method.key, "label": self.method.label, "seed": self.seed}
        found |= {"title": self.problem.title, "data": task.title, "metric": task.metric, "batch": training.batch}
        found |= {"parameters": trainer.parameters, "steps": steps, "length": trainer.length}
        found |= {"finished": history.step == steps, "seconds": round(history.seconds, 4)}
        found |= {"block_steps": history.block_steps, "curve": history.curve, "validation": history.validation}
        found |= {"rounds_mean": history.rounds / history.passes} if history.passes else {}
        return {**found, **({"probes": history.probes} if self.probed else {}), **trainer.notes()}


def _going_on(trainer: Trainer, checkpoint: Path) -> History:
    """From the checkpoint where there is one; CheckpointError for whatever is wrong with it."""
    if not checkpoint.exists():
        return History()
    try:
        found: History = trainer.load(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:  # of what other versions of the libraries or of this code have written
        raise CheckpointError.of(checkpoint, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return found


@lru_cache(maxsize=4)
def _data(task: Task, folder: Path | None) -> Data:
    """The last tasks' examples stay, which runs of several methods share."""
    return task.load(folder)


@cache
def _parameters(task: str, preset: str, backend: str, folder: Path | None) -> int:
    return Run(task, EXACT, 0, preset, backend, data=folder).trainer().parameters


def _finite(history: History) -> bool:
    losses = history.curve.get("loss", [])
    return not losses or losses[-1] is not None


def _remark(history: History) -> str:
    losses = history.curve.get("loss", [])
    return f"loss {losses[-1]:.3f}" if losses and losses[-1] is not None else ""
