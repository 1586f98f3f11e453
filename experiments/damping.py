"""Beyond the paper: gamma given, estimated, and estimated for each layer."""

from __future__ import annotations

from collections.abc import Mapping

from experiments import figures
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.methods import EXACT, Backward, Estimated
from experiments.results import MARGIN, Results, runs, table
from experiments.training import Run

TASK = "gpt2"
K = 1
PLAIN = Backward("highway", K, damping=0.0)
GIVEN = Backward("highway", K)
ESTIMATED = Backward("highway", K, damping=Estimated())
PER_LAYER = Backward("highway", K, damping=Estimated(per_layer=True))


def work(request: Request) -> list[Run]:
    """At one k; the task's own gamma is figure 2's run."""
    return runs(request, {TASK: [EXACT, PLAIN, GIVEN, ESTIMATED, PER_LAYER]})


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """The curves, and the estimates on the way."""
    results = Results.of(work(request), records)
    figure, axes = figures.panels(2, 5.2, 4)
    figures.curves(axes[0], results, TASK, "step")
    for i, record in enumerate(results.records(TASK, PER_LAYER)):
        for step, *gammas in record.get("damping", []):
            axes[1].plot(gammas, color=f"C{i}", alpha=0.2 + 0.8 * step / record["steps"])
    axes[1].set(xlabel="layer", ylabel="estimated gamma", title="darker: later in training; a colour each seed")
    figures.legend(figure, axes[:1])
    return Section([_diverges(results), _estimated(results)], table(results), {"damping": figure})


def _diverges(results: Results) -> Claim:
    paper = "Plain gamma = 0 makes Highway-BP diverge on GPT-2; gamma = 0.2 does not."
    rule = f"At k = {K} the final loss with gamma = 0 is not finite, or at least 10 % above that with the task's gamma."
    plain, given = (results.final(TASK, method, "loss") for method in (PLAIN, GIVEN))
    if plain is None or given is None:
        return Claim(paper, "not run", rule, None)
    measured = f"loss {results.show(TASK, PLAIN, 'loss')} with 0, {results.show(TASK, GIVEN, 'loss')} with the task's"
    return Claim(paper, measured, rule, plain.mean > 1.1 * given.mean, limit=True)


def _estimated(results: Results) -> Claim:
    paper = "Beyond the paper: an estimated gamma needs no tuning."
    rule = (
        "The better of both estimates ends at a loss not above the given gamma's by more than twice the standard error "
        f"or {MARGIN:.0%}."
    )
    verdicts = [results.as_good(TASK, method, GIVEN, "loss") for method in (ESTIMATED, PER_LAYER)]
    measured = "; ".join(f"{m.label}: {results.show(TASK, m, 'loss')}" for m in (EXACT, GIVEN, ESTIMATED, PER_LAYER))
    return Claim(paper, measured, rule, None if None in verdicts else any(verdicts))


EXPERIMENT = Experiment("damping", "Damping: gamma given and estimated", work, section)
