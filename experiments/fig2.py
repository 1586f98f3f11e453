"""Figure 2: what models of depth learn with k iterations."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Experiment, Record, Request, Section
from experiments.methods import EXACT, Method, fixed_point, highway
from experiments.results import Results, enough_claim, outperforms_claim, runs, table
from experiments.training import Run

AXES = {
    "laptop": dict.fromkeys(("resnet32", "resnet110", "resnet56", "gpt2", "roberta"), ((0, 1, 3), (3,))),
    "paper": {
        "resnet32": ((0, 1, 2, 3, 4, 5, 6, 7),) * 2,
        "resnet110": ((0, 1, 2, 3, 4, 5, 6, 7),) * 2,
        "resnet56": ((0, 1, 2, 3, 4, 5, 6, 7),) * 2,
        "gpt2": ((0, 1, 2, 3, 4, 5),) * 2,
        "roberta": ((0, 1, 2, 3, 5, 7, 10),) * 2,
    },
}
"""Of each task the k of Highway-BP and of the fixed point."""

CLAIMS = {
    "resnet32": ("ResNet32 on CIFAR10 needs 3 to 4 iterations (L = 15).", 4),
    "resnet110": ("ResNet110 at k = 4 matches backprop (L = 54).", 4),
    "resnet56": ("ResNet56 on ImageNet32: about 5 iterations are enough.", 5),
    "gpt2": ("GPT-2 with gamma = 0.2: about 5 iterations are enough.", 5),
    "roberta": ("RoBERTa fine-tuned with gamma = 0.8: about 5 iterations are enough.", 5),
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
    claims.append(outperforms_claim(results, "Highway-BP outperforms the fixed-point iteration at the same k."))
    return Section(claims, table(results), {"fig2": figures.against_k(results)})


EXPERIMENT = Experiment("fig2", "Figure 2: models of depth, against k", work, section)
