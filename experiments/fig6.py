"""Figure 6: how well gradients agree, and how large each iteration's share is, in the course of training."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT
from experiments.results import Results, runs
from experiments.training import PROBED_TASKS, PROBES, Run

LONG_RANGE = "pixels"
GOOD = 0.95


def work(request: Request) -> list[Run]:
    """Exact backprop, with probes on the way."""
    return runs(request, {task: [EXACT] for task in PROBED_TASKS})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """Cosines and increments, a column for each task."""
    results = Results.of(work(request), records)
    figure = figures.Figure(figsize=(4 * len(results.tasks), 6.8), layout="constrained")
    axes = figure.subplots(2, len(results.tasks), squeeze=False)
    for column, task in zip(axes.T, results.tasks, strict=True):
        _draw(column, results, task)
    figures.legend(figure, list(axes.ravel()))
    claims = [_later(results), *([_far(results)] if LONG_RANGE in results.tasks else [])]
    return Section(claims, _table(results), {"fig6": figure})


def _draw(axes: Any, results: Results, task: str) -> None:
    for i, share in enumerate(PROBES):
        probes = _probes(results, task, share)
        if probes:
            label = f"{share:.0%} of training"
            axes[0].plot(probes[0]["k"], _mean(probes, "cosine"), "o-", color=f"C{i}", markersize=3, label=label)
            increments = _mean(probes, "increments")
            axes[1].plot(range(len(increments)), increments, "o-", color=f"C{i}", markersize=3)
    axes[0].set(title=results.title(task), ylabel="cosine with the exact gradient", ylim=(None, 1.01))
    axes[1].set(xlabel="iteration k", ylabel="norm of increment k / of the sum", yscale="log")


def _probes(results: Results, task: str, share: float) -> list[Record]:
    found = [probe for record in results.records(task, EXACT) for probe in record["probes"]]
    return [probe for probe in found if abs(probe["share"] - share) < 0.02]


def _mean(probes: list[Record], name: str) -> list[float]:
    return [fmean(values) for values in zip(*(probe[name] for probe in probes), strict=True)]


def _needed(probes: list[Record]) -> int | None:
    """The smallest k tried from which on the mean cosine is good."""
    found = None
    for k, cosine in reversed(list(zip(probes[0]["k"], _mean(probes, "cosine"), strict=True))):
        if cosine < GOOD:
            break
        found = k
    return found


def _word(k: int | None, probes: list[Record]) -> str:
    return f"more than {probes[0]['k'][-1]}" if k is None else str(k)


def _later(results: Results) -> Claim:
    paper = "Late in training more iterations are needed than early; the transformer is the most constant."
    rule = (
        f"The smallest k with a mean cosine of {GOOD} or more, at the start and at the end: never smaller at the end, "
        "larger somewhere."
    )
    parts, grows = [], []
    for task in results.tasks:
        ends = [_probes(results, task, share) for share in (0.0, 1.0)]
        if all(ends):
            first, last = map(_needed, ends)
            parts.append(f"{results.title(task)}: k = {_word(first, ends[0])}, then {_word(last, ends[1])}")
            far = ends[0][0]["k"][-1] + 1
            grows.append((far if last is None else last) - (far if first is None else first))
    agrees = None if not grows else min(grows) >= 0 and max(grows) > 0
    return Claim(paper, "; ".join(parts) or "not run", rule, agrees)


def _far(results: Results) -> Claim:
    """Where it does not work."""
    paper = "Where it fails: on a long-range task late in training a few iterations give a poor gradient (ours)."
    rule = "The mean cosine at k = 3 after training is below 0.9 on the pixel GRU."
    probes = _probes(results, LONG_RANGE, 1.0)
    if not probes or 3 not in probes[0]["k"]:
        return Claim(paper, "not run", rule, None)
    cosine = _mean(probes, "cosine")[probes[0]["k"].index(3)]
    early = _probes(results, LONG_RANGE, 0.0)
    before = f", {_mean(early, 'cosine')[early[0]['k'].index(3)]:.3f} at the start" if early else ""
    return Claim(paper, f"cosine at k = 3: {cosine:.3f} at the end{before}", rule, cosine < 0.9, limit=True)


def _table(results: Results) -> str:
    ks = next(record["probes"][0]["k"] for _, record in results.pairs)
    lines = [["cosine", "of training", *(f"k = {k}" for k in ks)], ["---", "---:", *["---:"] * len(ks)]]
    for task in results.tasks:
        for share in PROBES:
            probes = _probes(results, task, share)
            if probes:
                lines.append([results.title(task), f"{share:.0%}", *(f"{c:.3f}" for c in _mean(probes, "cosine"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


EXPERIMENT = Experiment("fig6", "Figure 6: gradients in the course of training", work, section)
