"""Beyond the paper: transformers that change k during training, one like GPT-2 and one like Llama."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward, Phases, highway
from experiments.results import EQUAL, Results, runs, table
from experiments.training import Run

LOW = highway(1)[0]
RISING = Backward("highway", Phases((1, 2, None)))
TASKS = ("gpt2", "llama")


def work(request: Request) -> list[Run]:
    """Exact, one k all the time, and k that rises and ends exact."""
    return runs(request, {task: [EXACT, LOW, RISING] for task in TASKS})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves, against steps and block steps."""
    results = Results.of(work(request), records)
    figure, axes = figures.panels(2 * len(results.tasks), 5.2, 3.8)
    for i, task in enumerate(results.tasks):
        figures.curves(axes[2 * i], results, task, "step")
        figures.curves(axes[2 * i + 1], results, task, "block_steps")
    figures.legend(figure, axes)
    return Section([_claim(results, task) for task in results.tasks], table(results), {"changing": figure})


def _claim(results: Results, task: str) -> Claim:
    paper = "Beyond the paper (its future work): raising k during training and ending exact ends as exact backprop."
    verdict = results.as_good(task, RISING, name="loss")
    parts = [f"{method.label}: {results.show(task, method, 'loss')}" for method in (EXACT, LOW, RISING)]
    return Claim(paper, f"{results.title(task)}: {'; '.join(parts)}", f"The loss is {EQUAL}.", verdict)


EXPERIMENT = Experiment("changing", "Transformers that change k during training", work, section)
