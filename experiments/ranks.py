"""Beyond the paper: strong directions of the recurrent weights in the residual path, on long-range tasks."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward
from experiments.results import Results, runs, table
from experiments.training import Run

CAP = 16
GATE = Backward("highway", 3)
CHUNK = Backward("highway", 3, chunk=8)
RANK = Backward("highway", CAP, tolerance=0.1, rank=8)
AUTO = Backward("highway", CAP, tolerance=0.1, rank="auto")
METHODS = (EXACT, GATE, CHUNK, RANK, AUTO)
SHORT = (EXACT, GATE, RANK, AUTO)
TASKS = {
    "pixels": METHODS,
    "pixels-lstm": SHORT,
    "pixels-256": SHORT,
    "pixels-lstm-256": SHORT,
    "adding-256": METHODS,
    "adding-256-lstm": SHORT,
}
"""Of each task its methods; chunks, slow on an LSTM here, on the GRU alone."""


def work(request: Request) -> list[Run]:
    """Exact backprop, the gate alone, chunks, ranks with a tolerance."""
    return runs(request, TASKS)


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves of all tasks."""
    results = Results.of(work(request), records)
    figure = figures.grid(results, lambda axis, task: _draw(axis, results, task))
    return Section([_claim(results, task) for task in results.tasks], table(results), {"ranks": figure})


def _draw(axis: object, results: Results, task: str) -> None:
    figures.curves(axis, results, task, "step", name=results.metric(task))


def _claim(results: Results, task: str) -> Claim:
    paper = "Beyond the paper: with rank 8, or auto, rounds until the last increment is below 10 % train as exact does."
    rule = "The mean metric at the end is within .01 of exact's, or better, with at most 4 rounds in the mean."
    parts, verdicts = [], []
    for method in results.methods(task):
        parts.append(f"{method.label}: {results.show(task, method)}")
        worse = results.worse(task, method)
        if method in (RANK, AUTO):
            rounds = fmean(record["rounds_mean"] for record in results.records(task, method))
            parts[-1] += f" with {rounds:.2f} rounds"
            verdicts.append(None if worse is None else worse <= 0.01 and rounds <= 4)
    measured = f"{results.title(task)}: {'; '.join(parts)}{results.note(task)}"
    return Claim(paper, measured, rule, None if None in verdicts or not verdicts else all(verdicts))


EXPERIMENT = Experiment("ranks", "Strong directions in the residual path", work, section)
