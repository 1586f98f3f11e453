"""Beyond the paper: strong directions of the recurrent weights in the residual path, on digits pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
EVERY = (EXACT, GATE, CHUNK, RANK, AUTO)
FEW = (EXACT, RANK, AUTO)
TASKS = {"pixels": EVERY, "pixels-lstm": FEW, "pixels-256": FEW, "pixels-lstm-256": FEW}
"""Of each task its methods; the gate alone and chunks on the other three are `experiments.gates`."""


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


def compared(
    name: str,
    title: str,
    tasks: Mapping[str, Sequence[Backward]],
    claim: Callable[[Results, str], Claim] = _claim,
) -> Experiment:
    """Methods side by side on some tasks, with a claim on each: if none is given, on ranks with a tolerance."""

    def work(request: Request) -> list[Run]:
        return runs(request, tasks)

    def section(request: Request, records: Mapping[str, Record]) -> Section:
        results = Results.of(work(request), records)
        figure = figures.grid(results, lambda axis, task: _draw(axis, results, task))
        return Section([claim(results, task) for task in results.tasks], table(results), {name: figure})

    return Experiment(name, title, work, section)


EXPERIMENT = compared("ranks", "Strong directions in the residual path", TASKS)
