"""Figure 5: loss against wall-clock, beside the library's own layer."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, LIBRARY, Backward, highway
from experiments.results import Results, reached, runs, table
from experiments.training import Run

TASK = "gru3"
METHODS = (LIBRARY, EXACT, *highway(0, 1, 3))


def work(request: Request) -> list[Run]:
    """Runs that have the machine to themselves."""
    return runs(request, {TASK: METHODS}, alone=True)


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves, against both clocks."""
    results = Results.of(work(request), records)
    figure, axes = figures.panels(2, 5.5, 4)
    for axis, clock in zip(axes, ("seconds", "block_steps"), strict=True):
        figures.curves(axis, results, TASK, clock)
    axes[1].set_xscale("symlog", linthresh=100)
    figures.legend(figure, axes)
    claims = [
        _claim(results, LIBRARY, "Highway-BP reaches a loss in less time than backprop (the paper's is a step loop)."),
        _claim(results, EXACT, "Beyond the paper: it does so too against an exact adjoint without a graph."),
    ]
    return Section(claims, table(results), {"fig5": figure})


def _claim(results: Results, base: Backward, paper: str) -> Claim:
    """That Highway-BP reaches the base's last loss sooner."""
    rule = (
        f"The first validation with a mean loss within 1 % of the last one of {base.label}, in seconds; k = 0, 1 or 3."
    )
    last, seconds = results.final(TASK, base, "loss"), results.spread(TASK, base, lambda record: record["seconds"])
    if last is None or seconds is None:
        return Claim(paper, "not run", rule, None)
    times = {m: reached(results, TASK, m, "seconds", 1.01 * last.mean) for m in results.methods(TASK, "highway")}
    whole = reached(results, TASK, base, "seconds", 1.01 * last.mean) or seconds.mean
    hit = {method: time for method, time in times.items() if time is not None}
    if not hit:
        return Claim(paper, f"no k reaches the loss of {base.label} ({last.mean:.3f})", rule, False)
    best = min(hit, key=lambda method: hit[method])
    measured = f"{best.label} after {hit[best]:.1f} s, {base.label} after {whole:.1f} s ({hit[best] / whole:.0%})"
    return Claim(paper, measured, rule, hit[best] < whole)


EXPERIMENT = Experiment("fig5", "Figure 5: loss against wall-clock, GRU of three layers", work, section)
