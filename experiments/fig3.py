"""Figure 3: GPT-2's validation loss on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping

from experiments import fig2, figures
from experiments.against_k import methods
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward
from experiments.results import Results, runs
from experiments.training import Run

TASK = "gpt2"


def _methods(request: Request) -> list[Backward]:
    return [method for method in methods(fig2.AXES[request.preset], TASK) if method.kind != "fixed-point"]


def work(request: Request) -> list[Run]:
    """A part of figure 2's."""
    return runs(request, {TASK: _methods(request)})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves."""
    results = Results.of(work(request), records)
    figure, (axis,) = figures.panels(1, 6.5, 4.2)
    figures.curves(axis, results, TASK, "step")
    figures.legend(figure, [axis])
    return Section([_claim(results)], "", {"fig3": figure})


def _claim(results: Results) -> Claim:
    paper = "At too low a k GPT-2 learns as smoothly and as fast at first, but ends at a higher loss."
    rule = (
        "At the smallest k the loss falls by a fifth or more, and yet ends above exact backprop's by more than twice "
        "the standard error and 1 %."
    )
    lowest = min(results.methods(TASK, "highway"), key=lambda method: str(method.iterations), default=EXACT)
    verdict = results.as_good(TASK, lowest, name="loss")
    found = results.final(TASK, lowest, "loss")
    if verdict is None or found is None:
        return Claim(paper, "not run", rule, None)
    learned = math.isfinite(found.mean) and found.mean < 0.8 * results.records(TASK, lowest)[0]["validation"]["loss"][0]
    exact = results.show(TASK, EXACT, "loss")
    measured = f"loss {results.show(TASK, lowest, 'loss')} at k = {lowest.iterations}, exact {exact}"
    return Claim(paper, measured, rule, learned and not verdict)


EXPERIMENT = Experiment("fig3", "Figure 3: GPT-2's loss against steps", work, section)
