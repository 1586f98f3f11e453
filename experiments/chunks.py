"""Beyond the paper: exact backprop inside chunks, Highway-BP across them, on the long-range task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward, block_steps, highway
from experiments.results import EQUAL, Results, runs, table
from experiments.training import Run

TASK = "pixels"
PLAIN = highway(0, 1, 3, 10)
CHUNKS = (8,)
CHUNKED = [method for chunk in CHUNKS for method in highway(0, 1, 3, chunk=chunk)]


def work(request: Request) -> list[Run]:
    """Those without chunks are a part of figure 4's."""
    return runs(request, {TASK: [EXACT, *PLAIN, *CHUNKED]})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """Accuracy against k, and against the sequential block steps of a backward pass."""
    results = Results.of(work(request), records)
    figure = figures.against_k(results)
    return Section([_claim(results)], table(results), {"chunks": figure, "chunks-steps": _by_steps(results)})


def _by_steps(results: Results) -> Any:
    figure, (axis,) = figures.panels(1, 6, 4)
    length = results.pairs[0][1]["length"]
    exact = results.final(TASK, EXACT)
    if exact is not None:
        axis.errorbar([length], [exact.mean], [exact.deviation], fmt="k*", markersize=10, label="exact")
    for chunk in (1, *CHUNKS):
        points = []
        for method in results.methods(TASK, "highway"):
            found = results.final(TASK, method)
            if method.chunk == chunk and found is not None and isinstance(method.iterations, int):
                points.append((block_steps(length, method.iterations, chunk, False), found.mean, found.deviation))
        if points:
            steps, mean, deviation = zip(*sorted(points), strict=True)
            axis.errorbar(steps, mean, deviation, fmt="o-", capsize=3, label=f"chunk {chunk}")
    axis.set(xscale="log", xlabel="sequential block steps of a backward pass", ylabel=results.metric(TASK))
    figures.legend(figure, [axis])
    return figure


def _claim(results: Results) -> Claim:
    paper = "Beyond the paper: on long sequences chunks buy most of the accuracy for little depth."
    rule = f"Some chunk is {EQUAL} at k <= 3 in at most half of exact's block steps, where k = 3 without chunks is not."
    length = results.pairs[0][1]["length"]
    verdicts = {method: results.as_good(TASK, method) for method in CHUNKED}
    good = [
        method
        for method, verdict in verdicts.items()
        if verdict and 2 * block_steps(length, _k(method), method.chunk, False) <= length
    ]
    plain = results.as_good(TASK, Backward("highway", 3))
    parts = [f"{method.label}: {results.show(TASK, method)}" for method in [EXACT, Backward("highway", 3), *good]]
    known = plain is not None and any(verdict is not None for verdict in verdicts.values())
    return Claim(paper, "; ".join(parts), rule, bool(good) and not plain if known else None)


def _k(method: Backward) -> int:
    assert isinstance(method.iterations, int)
    return method.iterations


EXPERIMENT = Experiment("chunks", "Chunks", work, section)
