"""Beyond the paper: iterations that change in the course of training and end exact, by themselves or by measurement."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, LIBRARY, Backward, Diagnosed, Phases
from experiments.results import EQUAL, Results, reached, runs, table
from experiments.training import Run

TASK = "gru-long"
EQUAL_PARTS = Backward("highway", Phases((1, 2, 5, None)))
LATE = Backward("highway", Phases((1, 2, 5, None), (0, 0.4, 0.7, 0.9)))
TOLERANCE = Backward("highway", None, tolerance=0.1)
DIAGNOSED = Backward("highway", Diagnosed(0.1))
SCHEDULES = (EQUAL_PARTS, LATE, TOLERANCE, DIAGNOSED)


def work(request: Request) -> list[Run]:
    """Runs that have the machine to themselves."""
    return runs(request, {TASK: (LIBRARY, EXACT, *SCHEDULES)}, alone=True)


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves, against both clocks."""
    results = Results.of(work(request), records)
    figure, axes = figures.panels(3, 5, 4)
    for axis, clock in zip(axes, ("step", "seconds", "block_steps"), strict=True):
        figures.curves(axis, results, TASK, clock)
    axes[2].set_xscale("symlog", linthresh=1000)
    figures.legend(figure, axes)
    clocks = (
        _clock(results, LIBRARY, "seconds", 0.7, "wall-clock of torch.nn's layer"),
        _clock(results, EXACT, "block_steps", 0.25, "sequential block steps of exact backprop"),
    )
    return Section([_equal(results), *clocks], table(results), {"schedules": figure})


def _equal(results: Results) -> Claim:
    paper = "Beyond the paper (its future work): schedules that end exact, or stop by tolerance, end as exact backprop."
    verdicts = {method: results.as_good(TASK, method, name="loss") for method in SCHEDULES}
    known = {method: verdict for method, verdict in verdicts.items() if verdict is not None}
    parts = [f"{method.label}: {results.show(TASK, method, 'loss')}" for method in known]
    measured = f"exact {results.show(TASK, EXACT, 'loss')}; {'; '.join(parts)}"
    return Claim(paper, measured, f"The loss of each is {EQUAL}.", all(known.values()) if known else None)


def _clock(results: Results, base: Backward, clock: str, share: float, name: str) -> Claim:
    """That some schedule reaches the base's last loss in a share of its whole training."""
    paper = f"Beyond the paper: a schedule reaches exact's final loss in at most {share:.0%} of the {name}."
    rule = (
        "The first validation with a mean loss of at most the base's last one and its seeds' standard deviation, "
        "against the base's whole training."
    )
    last, whole = results.final(TASK, base, "loss"), results.spread(TASK, base, lambda record: record[clock])
    if last is None or whole is None:
        return Claim(paper, "not run", rule, None)
    times = {m: reached(results, TASK, m, clock, last.mean + last.deviation) for m in (EXACT, *SCHEDULES)}
    parts = [
        f"{method.label} {'never' if time is None else f'{time / whole.mean:.1%}'}" for method, time in times.items()
    ]
    hit = [time for method, time in times.items() if time is not None and method != EXACT]
    return Claim(paper, "; ".join(parts), rule, bool(hit) and min(hit) <= share * whole.mean)


EXPERIMENT = Experiment("schedules", "Schedules of k, against both clocks", work, section)
