"""Records of training runs, looked at by task and method: means over seeds, and rules by which they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from experiments.experiment import Claim, Record, Request
from experiments.methods import EXACT, LIBRARY, Backward
from experiments.settings import problem
from experiments.training import Run

MARGIN = 0.01
"""A difference of this share of exact backprop's value, or of accuracy, is none."""
EQUAL = (
    "as good as exact backprop: not worse by more than twice the standard error of the difference of means, "
    "or 1 % of the loss or perplexity or one point of accuracy"
)
LEARNED = "a fifth of the way from chance to perfect accuracy, or half of the loss or perplexity of chance"
"""What exact backprop must reach, lest methods be compared on what none has learned."""


@dataclass(frozen=True)
class Spread:
    """A figure's mean over seeds, its standard deviation, and their number."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value the deviation is 0; not finite where a run was not."""
        finite = all(map(math.isfinite, values))
        deviation = stdev(values) if len(values) > 1 and finite else 0.0
        return cls(fmean(values) if finite else math.inf, deviation, len(values))

    def error_with(self, other: Spread) -> float:
        """The standard error of the difference of means."""
        return math.sqrt(self.deviation**2 / self.count + other.deviation**2 / other.count)


@dataclass(frozen=True)
class Results:
    """Runs that are done, with their records."""

    pairs: tuple[tuple[Run, Record], ...]

    @classmethod
    def of(cls, runs: Sequence[Run], records: Mapping[str, Record]) -> Results:
        """Those of these runs that have a record."""
        return cls(tuple((run, records[run.key]) for run in runs if run.key in records))

    @property
    def tasks(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(run.task for run, _ in self.pairs))

    def methods(self, task: str, kind: str | None = None) -> list[Backward]:
        """That learned a task, of one kind or all."""
        found = dict.fromkeys(run.method for run, _ in self.pairs if run.task == task)
        return [method for method in found if kind in (None, method.kind)]

    def records(self, task: str, method: Backward) -> list[Record]:
        """Of all seeds."""
        return [record for run, record in self.pairs if (run.task, run.method) == (task, method)]

    def spread(self, task: str, method: Backward, value: Callable[[Record], float]) -> Spread | None:
        """Of a figure over the seeds; None where there are no records."""
        found = [value(record) for record in self.records(task, method)]
        return Spread.of(found) if found else None

    def final(self, task: str, method: Backward, name: str | None = None) -> Spread | None:
        """The task's metric, or another figure of the last validation."""
        return self.spread(task, method, lambda record: final(record, name))

    def metric(self, task: str) -> str:
        """As pages name it."""
        return next(str(record["metric"]) for run, record in self.pairs if run.task == task)

    def title(self, task: str) -> str:
        """As pages name the model."""
        return next(str(record["title"]) for run, record in self.pairs if run.task == task)

    def learned(self, task: str) -> bool:
        """Whether exact backprop has reached `LEARNED`."""
        found, metric = self.final(task, EXACT) or self.final(task, LIBRARY), self.metric(task)
        outputs = problem(task, self.pairs[0][0].preset).task.outputs
        chance = {"accuracy": 1 / outputs, "perplexity": outputs, "loss": 1 / 6}[metric]  # of sums of two numbers
        if found is None:
            return True
        return found.mean >= chance + 0.2 * (1 - chance) if metric == "accuracy" else found.mean <= chance / 2

    def worse(self, task: str, method: Backward, other: Backward = EXACT, name: str | None = None) -> float | None:
        """By how much a method's mean ends worse than another's; None where one was not run, or none has learned."""
        found, wanted = self.final(task, method, name), self.final(task, other, name)
        if found is None or wanted is None or not self.learned(task):
            return None
        higher = (name or self.metric(task)) == "accuracy"
        return wanted.mean - found.mean if higher else found.mean - wanted.mean

    def as_good(self, task: str, method: Backward, other: Backward = EXACT, name: str | None = None) -> bool | None:
        """Whether a method ends as good as another, by the rule `EQUAL`; None where it cannot be told."""
        worse = self.worse(task, method, other, name)
        found, wanted = (self.final(task, one, name) for one in (method, other))
        if worse is None or found is None or wanted is None:
            return None
        if not math.isfinite(found.mean):
            return False
        margin = MARGIN if (name or self.metric(task)) == "accuracy" else MARGIN * abs(wanted.mean)
        return worse <= max(margin, 2 * found.error_with(wanted))

    def enough(self, task: str, kind: str = "highway") -> int | None:
        """The smallest k of those tried from which on all are as good as exact backprop."""
        tried = sorted(_numbers(self.methods(task, kind)), key=lambda method: method.iterations)  # type: ignore[arg-type,return-value]
        best: Any = None
        for method in reversed(tried):
            if not self.as_good(task, method):
                break
            best = method.iterations
        return best

    def note(self, task: str) -> str:
        """A remark where there is nothing to compare."""
        return "" if self.learned(task) else f"; exact backprop has not learned it here ({LEARNED})"

    def show(self, task: str, method: Backward, name: str | None = None) -> str:
        """Mean and deviation of the last validation."""
        found = self.final(task, method, name)
        return "-" if found is None else shown(found, name or self.metric(task))


def final(record: Record, name: str | None = None) -> float:
    """The last validation's metric, or another of its figures; infinite where the run was not finite."""
    value = record["validation"][name or record["metric"]][-1]
    return math.inf if value is None or not record["finished"] else float(value)


def shown(found: Spread, metric: str) -> str:
    """For people."""
    if not math.isfinite(found.mean):
        return "diverged"
    if metric == "accuracy":
        return f"{found.mean:.1%} ± {found.deviation:.1%}"
    return f"{found.mean:.4g} ± {found.deviation:.2g}"


def _numbers(methods: Sequence[Backward]) -> list[Backward]:
    """Those whose only option is a number of iterations."""
    return [m for m in methods if isinstance(m.iterations, int) and m == Backward(m.kind, m.iterations)]


def runs(request: Request, tasks: Mapping[str, Sequence[Backward]], alone: bool = False) -> list[Run]:
    """Runs of all seeds of these methods of these tasks."""
    seeds = range(request.seeds)
    return [Run.of(request, task, method, seed, alone) for task in tasks for method in tasks[task] for seed in seeds]


def enough_claim(results: Results, task: str, paper: str, at_most: int) -> Claim:
    """That some number of iterations is as good as exact backprop."""
    exact, found = results.show(task, EXACT), results.enough(task)
    last = max((m.iterations for m in _numbers(results.methods(task, "highway"))), default=None)  # type: ignore[type-var]
    at = "at no k tried" if found is None else f"from k = {found} on"
    k = last if found is None else found
    there = "" if k is None else f", k = {k}: {results.show(task, Backward('highway', k))}"
    known = results.final(task, EXACT) is not None and last is not None and results.learned(task)
    agrees = found is not None and found <= at_most if known else None
    measured = f"{results.title(task)}: as good as exact {at} (exact: {exact}{there}){results.note(task)}"
    return Claim(paper, measured, f"The smallest k tried from which on all are {EQUAL}; at most {at_most}.", agrees)


def outperforms_claim(results: Results, paper: str) -> Claim:
    """That Highway-BP is nowhere worse than the fixed point with as many iterations."""
    better, worse = [], []
    for task in results.tasks:
        for method in _numbers(results.methods(task, "fixed-point")):
            ours = Backward("highway", method.iterations)
            verdict = results.as_good(task, ours, method)
            if verdict is not None:
                (better if verdict else worse).append(f"{results.title(task)}, k = {method.iterations}")
    measured = f"at least as good in {len(better)} of {len(better) + len(worse)} comparisons"
    measured += f"; worse: {'; '.join(worse)}" if worse else ""
    rule = "At the same k never worse than the fixed point by more than twice the standard error, 1 %, or one point."
    return Claim(paper, measured, rule, not worse if better or worse else None)


def reached(results: Results, task: str, method: Backward, clock: str, level: float) -> float | None:
    """The clock at the first validation whose loss, a mean over seeds, is at most a level; None where none is."""
    records = [record for record in results.records(task, method) if record["finished"]]
    for at, losses in zip(*(_columns(records, name) for name in (clock, "loss")), strict=True):
        if None not in losses and fmean(losses) <= level:
            return fmean(at)
    return None


def _columns(records: Sequence[Record], name: str) -> list[tuple[Any, ...]]:
    return list(zip(*(record["validation"][name] for record in records), strict=False))


def table(results: Results) -> str:
    """Markdown: of every task and method the figure at the end, both clocks, and the rounds."""
    lines = [
        "| task | method | at the end | block steps | seconds | rounds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *_rows(results)])


def _rows(results: Results) -> Iterator[str]:
    for task in results.tasks:
        for method in results.methods(task):
            records = results.records(task, method)
            steps = fmean(record["block_steps"] for record in records)
            rounds = [record["rounds_mean"] for record in records if "rounds_mean" in record]
            name = f"{results.title(task)} ({results.metric(task)})"
            seconds = f"{fmean(record['seconds'] for record in records):.1f}"
            seconds += "" if all(record["alone"] for record in records) else " (not alone)"
            last = f"{fmean(rounds):.2f}" if rounds else ""
            yield f"| {name} | {method.label} | {results.show(task, method)} | {steps:,.0f} | {seconds} | {last} |"
