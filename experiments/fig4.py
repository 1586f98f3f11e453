"""Figure 4: what recurrent models learn with k iterations."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Experiment, Record, Request, Section
from experiments.methods import EXACT, Method, fixed_point, highway
from experiments.results import Results, enough_claim, outperforms_claim, runs, table
from experiments.training import Run

AXES = {
    "laptop": {
        "lstm": ((0, 1, 3), (3,)),
        "gru": ((0, 1, 3), (3,)),
        "gru3": ((0, 1, 3), (3,)),
        "pixels": ((0, 1, 3, 10), (3,)),
    },
    "paper": {
        "lstm": ((0, 1, 2, 3, 5, 7, 10),) * 2,
        "gru": ((0, 1, 2, 3, 5, 7, 10),) * 2,
        "gru3": ((0, 1, 2, 3),) * 2,
        "pixels": ((0, 1, 2, 3, 5, 7, 10),) * 2,
    },
}
"""Of each task the k of Highway-BP and of the fixed point."""

CLAIMS = {
    "lstm": ("Character LSTM (L = 256): about 5 iterations are enough.", 5),
    "gru": ("Character GRU (L = 256): about 5 iterations are enough.", 5),
    "gru3": ("GRU of three layers on words: close to backprop at a very low k (its axis ends at 3).", 3),
    "pixels": ("Pixel GRU (L = 1024): k = 10 reaches backprop's accuracy.", 10),
}


def methods(request: Request, task: str) -> list[Method]:
    """Of one task."""
    ours, theirs = AXES[request.preset][task]
    return [EXACT, *highway(*ours), *fixed_point(*theirs)]


def work(request: Request) -> list[Run]:
    """Runs of all tasks and methods."""
    return runs(request, {task: methods(request, task) for task in CLAIMS})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The metric against k."""
    results = Results.of(work(request), records)
    claims = [enough_claim(results, task, *CLAIMS[task]) for task in results.tasks]
    claims.append(outperforms_claim(results, "Highway-BP constantly outperforms the fixed point at equal k."))
    return Section(claims, table(results), {"fig4": figures.against_k(results)})


EXPERIMENT = Experiment("fig4", "Figure 4: recurrent models, against k", work, section)
