"""Beyond the paper: other splits of a layer's Jacobian, and multigrid in time, side by side on trained models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measure import Method, library
from experiments import figures
from experiments.experiment import Claim, Context, Experiment, Record, Request, Section
from experiments.methods import EXACT
from experiments.solving import CHUNKS, FIXED, FOLLOWED, MGRIT, PAPERS, RANK, ways
from experiments.timing import timed
from experiments.training import Run

TASKS = {"pixels": 8, "mlp": 4}
"""With the size of their stages."""
SHARES = (0.1, 1.0)
"""Of the training, at which backward passes are looked at."""
BATCH = 32
ROUNDS = 3
CLOSE = 0.1
"""A relative error with which training goes well."""


@dataclass(frozen=True)
class Splits:
    """A model trained by exact backprop, whose backward passes are solved in all ways, as a piece of work."""

    run: Run

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.run.seed

    @property
    def alone(self) -> bool:
        """Times are those of one seed."""
        return self.seed == 0

    @property
    def what(self) -> str:
        return f"splits+{self.run.task}"

    @property
    def key(self) -> str:
        return f"{self.what}+{self.seed}"

    def check(self) -> int:
        self.run.check()
        return 0

    def estimate(self) -> Record:
        found = self.run.estimate()
        return {**found, "bytes": 0, "seconds": found["seconds"] + 20}  # to solve

    def perform(self, context: Context) -> Record:
        trainer, count = self.run.trainer(), self.run.length_of_training
        marks, points = {max(1, round(share * count)): share for share in SHARES}, []
        for step in range(count):
            trainer.fetch()
            trainer.step(step)
            if step + 1 in marks:
                measured = self._measured(trainer, lambda done, total: context.advance(done, total, "solving"))
                points.append({"share": marks[step + 1], "step": step + 1, **trainer.validate(), **measured})
            context.advance(step + 1, count)
        found = {"task": self.run.task, "title": self.run.problem.title, "seed": self.seed}
        return {**found, "stage": TASKS[self.run.task], "points": points}

    def _measured(self, trainer: Any, advance: Callable[[int, int], None]) -> Record:
        """All ways on one batch, the same at both points."""
        from experiments.chains import points

        lib, task = library("torch"), self.run.problem.task
        batch = next(task.load(self.run.data).train.batches(BATCH, 10_000 + self.seed))
        here, exact = points(trainer.model, task, batch)
        found = list(ways(here, TASKS[self.run.task]))
        methods = [
            Method(way.name, lib, lambda way=way: here.gradient(way.solve()), None, way.k, exact=way.k is None)
            for way in found
        ]
        rows = timed(methods, lib.vector([exact]), ROUNDS if self.alone else 0, advance)
        rows = [{**row, "steps": way.steps} for row, way in zip(rows, found, strict=True)]
        return {"length": len(here.chain), "rows": rows}


def work(request: Request) -> list[Splits]:
    """A GRU over time and a residual MLP over depth; of PyTorch."""
    if request.backend != "torch":
        return []
    seeds = range(request.seeds)
    return [Splits(Run.of(request, task, EXACT, seed)) for task in TASKS for seed in seeds]


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """Error against depth and against time, and the depth that it takes to come close."""
    found = [records[work.key] for work in work(request) if work.key in records]
    claims = [_closer(found), _directions(found), _multigrid(found)]
    drawn = {"splits": _figure(found, "steps"), "splits-time": _figure(found, "ms")}
    return Section(claims, f"{TEXT}\n\n{_table(found)}", drawn)


TEXT = f"""A pixel GRU over time and a pre-norm residual MLP over depth, trained by exact backprop; at a tenth and at
the end of the training, one batch's backward pass is solved in all ways and compared with float64. *Block steps* are
pullbacks one after another, those to the parameters included; a scan along residual maps counts none, which is what
it would take on enough processors, nor does finding a split's maps, which is not timed either. Times are of one seed
on this machine, where nothing is parallel but products.

*Whole Jacobians* is BPPSA, the exact scan of all Jacobians in R: two steps deep, but it forms d x d matrices by d
pullbacks and multiplies them. *Diagonal of the Jacobian* and *rank {RANK} of the rest* (singular values of each
Jacobian beside its diagonal) say what such a split could do at best; *directions of the weight* is hbp's
`rank={RANK}`, from one decomposition of the recurrent weight for all steps.

*MGRIT* is two-level multigrid reduction in time on the same adjoint equation (Falgout et al. 2014; Guenther et al.
2020, arXiv 1812.04352): C-points are every S-th state; relaxation propagates exactly through the stages between them,
all at once; the coarse correction goes from stage to stage by the stage's first block, held for S steps: I + S B
where R = I, the layer rediscretised with S times its step. It starts from a coarse solve. With the residual path as
its propagator instead, and F-relaxation, it is Highway-BP with chunks to the last digit (tested): both differ in
whether the coarse solve crosses blocks, one after another, or is a scan."""


def _error(found: Sequence[Record], task: str, at: int, method: str, k: int | None) -> float | None:
    """The median over seeds; None where there is no such row."""
    errors = [
        row["error"]
        for record in found
        if record["task"] == task
        for row in record["points"][at]["rows"]
        if (row["method"], row["k"]) == (method, k)
    ]
    return median(errors) if errors else None


def _needed(found: Sequence[Record], task: str, at: int, method: str) -> int | None:
    """The least block steps from which on a way is close, by medians over seeds."""
    last = None
    for row in sorted(_rows(found, task, at, method), key=lambda row: row["steps"], reverse=True):
        if not (_error(found, task, at, method, row["k"]) or 0) <= CLOSE:
            break
        last = int(row["steps"])
    return last


def _rows(found: Sequence[Record], task: str, at: int, method: str) -> list[Record]:
    """Of one seed."""
    record = next(record for record in found if record["task"] == task)
    return [row for row in record["points"][at]["rows"] if row["method"] == method]


def _places(found: Sequence[Record]) -> list[tuple[str, int, str]]:
    """Tasks and points, with their titles."""
    lengths = {record["task"]: record["points"][0]["length"] for record in found}
    titles = {r["task"]: f"{r['title']}, L = {lengths[r['task']]}, S = {r['stage']}" for r in found}
    return [
        (task, at, f"{titles[task]}, {share:.0%} of training") for task in titles for at, share in enumerate(SHARES)
    ]


def _closer(found: Sequence[Record]) -> Claim:
    paper = "Highway-BP outperforms the fixed point (R = 0) after as many iterations."
    cases = [(task, at, k) for task, at, _ in _places(found) for k in (1, 2, 3, 5)]
    pairs = [[_error(found, task, at, method, k) for method in (PAPERS, FIXED)] for task, at, k in cases]
    wins = sum(ours < theirs for ours, theirs in pairs)  # type: ignore[operator]
    rule = "At each k from 1 to 5, model and point of training: the smaller relative error, by medians over seeds."
    return Claim(paper, f"closer in {wins} of {len(pairs)} comparisons", rule, wins == len(pairs))


def _word(value: int | None) -> str:
    return "none" if value is None else str(value)


def _compared(found: Sequence[Record], ours: str, theirs: str, tasks: Sequence[str]) -> tuple[str, bool | None]:
    """Both ways' block steps to come close, and whether the first takes no more anywhere."""
    parts, fine = [], []
    for task, at, title in _places(found):
        if task in tasks:
            pair = [_needed(found, task, at, method) for method in (ours, theirs)]
            parts.append(f"{title}: {_word(pair[0])} against {_word(pair[1])}")
            far = [math.inf if value is None else value for value in pair]
            fine.append(far[0] <= far[1])
    return "; ".join(parts), all(fine) if fine else None


def _directions(found: Sequence[Record]) -> Claim:
    paper = "Beyond the paper: a recurrent net's residual path needs the strong directions of its weight."
    measured, agrees = _compared(found, FOLLOWED, PAPERS, ["pixels"])
    rule = f"With them a relative error of {CLOSE:.0%} takes no more block steps than without, early and late."
    return Claim(paper, f"block steps: {measured}", rule, agrees)


def _multigrid(found: Sequence[Record]) -> Claim:
    paper = "Asked by the paper's reviewers: how does it compare with MGRIT?"
    measured, agrees = _compared(found, CHUNKS, MGRIT, list(TASKS))
    rule = (
        f"Highway-BP with chunks of S comes to a relative error of {CLOSE:.0%} in no more block steps than MGRIT with "
    )
    rule += "F-relaxation and stages of S, for both models, early and late."
    return Claim(paper, f"block steps, chunks against MGRIT: {measured}", rule, agrees)


def _names(found: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(row["method"] for record in found for row in record["points"][0]["rows"]))


def _table(found: Sequence[Record]) -> str:
    places = _places(found)
    lines = [
        [f"block steps to {CLOSE:.0%} error", *(title for _, _, title in places)],
        ["---", *["---:"] * len(places)],
    ]
    for name in _names(found):
        cells = [
            _word(_needed(found, task, at, name)) if _rows(found, task, at, name) else "" for task, at, _ in places
        ]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(found: Sequence[Record], clock: str) -> Any:
    """Errors, with all seeds' extremes as a band, against block steps, or against the milliseconds of one seed."""
    figure, axes = figures.panels(len(_places(found)), 5, 3.6)
    for axis, (task, at, title) in zip(axes, _places(found), strict=True):
        for i, name in enumerate(_names(found)):
            points = list(_points(found, task, at, name, clock))
            if points:
                x, middle, low, high = zip(*points, strict=True)
                axis.plot(x, middle, "*" if len(x) == 1 else ".-", color=f"C{i}", linewidth=1, label=name)
                axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
        label = "sequential block steps" if clock == "steps" else "ms, here"
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="relative error of the gradient")
        axis.set_title(title, fontsize=9)
    figures.legend(figure, axes)
    return figure


def _points(found: Sequence[Record], task: str, at: int, name: str, clock: str) -> Iterator[tuple[float, ...]]:
    """Clock, median error, and its extremes over seeds."""
    seeds = [record["points"][at]["rows"] for record in found if record["task"] == task]
    for index, row in enumerate(seeds[0]):
        if row["method"] == name and (clock == "steps" or row["whole_ms"]):
            errors = [rows[index]["error"] for rows in seeds]
            yield row["steps"] if clock == "steps" else row["whole_ms"][0], median(errors), min(errors), max(errors)


EXPERIMENT = Experiment("splits", "Splits side by side", work, section)
