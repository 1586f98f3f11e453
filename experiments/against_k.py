"""What models learn with k iterations, beside the fixed point and exact backprop: figures 2 and 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from experiments import figures
from experiments.experiment import Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward, fixed_point, highway
from experiments.results import Results, enough_claim, outperforms_claim, runs, table
from experiments.training import Run

Axes: TypeAlias = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Of each task the k of Highway-BP and of the fixed point."""


def methods(axes: Axes, task: str) -> list[Backward]:
    """Of one task."""
    ours, theirs = axes[task]
    return [EXACT, *highway(*ours), *fixed_point(*theirs)]


def experiment(
    name: str, title: str, axes: Mapping[str, Axes], claims: Mapping[str, tuple[str, int]], outperforms: str
) -> Experiment:
    """The experiment of such a figure.

    Args:
        name, title: the experiment's.
        axes: by preset.
        claims: what the paper says of each task, and how many iterations are enough by that.
        outperforms: what it says of the fixed point.
    """

    def work(request: Request) -> list[Run]:
        return runs(request, {task: methods(axes[request.preset], task) for task in claims})

    def section(request: Request, records: Mapping[str, Record]) -> Section:
        results = Results.of(work(request), records)
        found = [enough_claim(results, task, *claims[task]) for task in results.tasks]
        found.append(outperforms_claim(results, outperforms))
        return Section(found, table(results), {name: figures.against_k(results)})

    return Experiment(name, title, work, section)
