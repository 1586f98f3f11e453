"""How long a training takes, told without its data: steps of few made-up examples, scaled to the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from time import perf_counter
from typing import Any

from experiments.experiment import Record
from experiments.methods import EXACT, Backward
from experiments.models import RecurrentClassifier, RecurrentLM, Roberta
from experiments.settings import Problem, problem

FEW = {True: 4, False: 1}
"""Examples of a recurrent model, whose products with one row would take as long as those with many; of one of depth."""
CHECKPOINT_BYTES = 16
"""Of a parameter: itself, two moments of Adam's, and some to spare."""
HOW = "exact backprop on few made-up examples, times the batch, each of k rounds a third of that more; no data are read"


@dataclass(frozen=True)
class Sketch:
    """What a trainer asks of a run, with few examples to a batch and nothing to read."""

    problem: Problem
    method: Backward = EXACT
    seed: int = 0
    length_of_training: int = 2
    data: None = None


@cache
def sketched(task: str, preset: str, backend: str) -> tuple[int, float]:
    """A model's parameters, and the seconds of an example in a step of exact backprop."""
    whole = problem(task, preset)
    sizes, few = whole.sizes, FEW[isinstance(whole.sizes, RecurrentLM | RecurrentClassifier)]
    sizes = replace(sizes, pretrained=None) if isinstance(sizes, Roberta) else sizes
    sketch = Sketch(replace(whole, sizes=sizes, training=replace(whole.training, batch=few)))
    trainer = import_module(f"experiments.{backend}_trainer").Trainer(sketch, whole.task.made_up(few))
    return trainer.parameters, quickest(trainer, sketch.length_of_training) / few


def quickest(trainer: Any, count: int) -> float:
    """The seconds of the quickest of so many training steps, or of those begun in five seconds, two at least."""
    times: list[float] = []
    while len(times) < count and (len(times) < 2 or sum(times) <= 5):  # code is compiled in the first one
        trainer.fetch()
        start = perf_counter()
        trainer.step(len(times))
        times.append(perf_counter() - start)
    return min(times)


def scaled(task: str, preset: str, backend: str, rounds: int, steps: int) -> Record:
    """The estimate of a training of so many steps, each with so many rounds of Highway-BP."""
    parameters, seconds = sketched(task, preset, backend)
    whole = steps * problem(task, preset).training.batch * seconds * (1 + rounds / 3)
    found = {"parameters": parameters, "steps": steps, "bytes": CHECKPOINT_BYTES * parameters}
    return {**found, "seconds": whole, "how": HOW}
