"""The rules by which verdicts on records are computed, on records written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib")
pytest.importorskip("sklearn", reason="the experiments learn scikit-learn's digits")

from experiments import fig2, fig6, gates, ranks
from experiments.experiment import Request
from experiments.methods import EXACT, Backward, highway
from experiments.results import Results, enough_claim, outperforms_claim, reached
from experiments.training import Run


def record(*metric: float, task: str = "pixels", name: str = "accuracy", loss: tuple[float, ...] = (2.0, 1.0, 0.5)):
    """Of a run whose validations came at steps 0, 10 and 20."""
    clocks = {"step": [0, 10, 20], "seconds": [0.0, 1.0, 2.0], "block_steps": [0, 100, 200]}
    validation = {**clocks, "loss": list(loss), name: [0.1, 0.2, *metric][-3:]}
    return {"metric": name, "title": task, "finished": True, "validation": validation, "alone": True, "seconds": 2.0,
            "block_steps": 200, "rounds_mean": 3.0, "length": 64}  # fmt: skip


def results(task: str, found: dict[Backward, list[float]]) -> Results:
    """Of the last accuracies of each method's seeds."""
    runs = {Run(task, method, seed): record(value) for method in found for seed, value in enumerate(found[method])}
    return Results(tuple(runs.items()))


ZERO, ONE, THREE = highway(0, 1, 3)


def test_as_good_is_within_noise_or_a_point():
    found = results("pixels", {EXACT: [0.80, 0.82, 0.84], ZERO: [0.70] * 3, ONE: [0.81] * 3, THREE: [0.75, 0.81, 0.87]})
    assert not found.as_good("pixels", ZERO)
    assert found.as_good("pixels", ONE)  # a point below
    assert found.as_good("pixels", THREE)  # 0.01 below, with a standard error of 0.037
    assert found.as_good("pixels", Backward("highway", 9)) is None
    assert results("pixels", {EXACT: [0.8], ONE: [0.9]}).as_good("pixels", ONE)  # better


def test_enough_is_the_k_from_which_on_all_are_as_good():
    found = results("pixels", {EXACT: [0.8] * 2, ZERO: [0.8] * 2, ONE: [0.5] * 2, THREE: [0.8] * 2})
    assert found.enough("pixels") == 3  # k = 0 was luck
    assert enough_claim(found, "pixels", "", 3).agrees is True
    assert enough_claim(found, "pixels", "", 2).agrees is False
    never = results("pixels", {EXACT: [0.8] * 2, THREE: [0.5] * 2})
    assert never.enough("pixels") is None
    assert enough_claim(never, "pixels", "", 9).agrees is False


def test_nothing_is_told_of_a_task_that_was_not_learned():
    found = results("pixels", {EXACT: [0.15] * 3, THREE: [0.15] * 3})
    assert not found.learned("pixels")
    claim = enough_claim(found, "pixels", "", 3)
    assert claim.agrees is None
    assert "exact backprop has not learned it here" in claim.measured


def test_highway_against_the_fixed_point():
    fixed = Backward("fixed-point", 3)
    better = results("pixels", {EXACT: [0.8] * 2, THREE: [0.7] * 2, fixed: [0.5] * 2})
    assert outperforms_claim(better, "").agrees is True
    worse = results("pixels", {EXACT: [0.8] * 2, THREE: [0.5] * 2, fixed: [0.7] * 2})
    assert outperforms_claim(worse, "").agrees is False
    assert "worse: pixels, k = 3" in outperforms_claim(worse, "").measured


def test_reached_is_the_first_validation_at_a_level():
    runs = [Run("pixels", EXACT, seed) for seed in range(2)]
    found = Results(tuple(zip(runs, [record(loss=(2, 1, 0.5)), record(loss=(2, 1.4, 0.7))], strict=True)))
    assert reached(found, "pixels", EXACT, "seconds", 1.2) == 1
    assert reached(found, "pixels", EXACT, "block_steps", 0.6) == 200
    assert reached(found, "pixels", EXACT, "seconds", 0.5) is None


def test_ranks_are_judged_by_accuracy_and_rounds():
    request = Request(seeds=1)

    def verdict(accuracy: float, rounds: float) -> bool | None:
        records = {}
        for run in ranks.EXPERIMENT.work(request):
            if run.task == "pixels":
                one = record(accuracy if run.method in (ranks.RANK, ranks.AUTO) else 0.8)
                records[run.key] = {**one, "rounds_mean": rounds}
        return ranks.EXPERIMENT.section(request, records).claims[0].agrees

    assert verdict(0.795, 3.9) is True
    assert verdict(0.785, 3.9) is False
    assert verdict(0.795, 4.1) is False


@pytest.mark.parametrize(("gate", "chunks", "agrees"), [(0.7, 0.79, True), (0.795, 0.8, False), (0.7, 0.69, False)])
def test_the_gate_alone_is_judged_beside_chunks(gate, chunks, agrees):
    request, ends = Request(seeds=1), {ranks.EXACT: 0.8, ranks.GATE: gate, ranks.CHUNK: chunks}
    records = {run.key: record(ends[run.method]) for run in gates.EXPERIMENT.work(request)}
    claims = gates.EXPERIMENT.section(request, records).claims
    assert [(claim.agrees, claim.limit) for claim in claims] == [(agrees, True)] * 3


def test_figure_6_says_where_more_iterations_are_needed():
    request = Request(seeds=1)

    def claims(*last: float):
        probes = [{"share": share, "k": [0, 1, 3], "cosine": [0.9, 0.96, 0.99], "increments": [1, 0.5]}
                  for share in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
        probes[-1] = {**probes[-1], "cosine": list(last)}
        records = {run.key: {**record(0.8, task=run.task), "probes": probes} for run in fig6.work(request)}
        return fig6.section(request, records).claims

    later, far = claims(0.3, 0.5, 0.7)
    assert later.agrees is True
    assert far.agrees is True
    assert far.limit
    later, far = claims(0.9, 0.96, 0.99)
    assert later.agrees is False
    assert far.agrees is False


def test_figure_2_shows_what_diverged():
    request = Request(seeds=2)
    records = {}
    for run in fig2.EXPERIMENT.work(request):
        one = record(0.5 if run.method == EXACT else 0.4)
        records[run.key] = {**one, "finished": run.method != ZERO}
    section = fig2.EXPERIMENT.section(request, records)
    assert "diverged" in section.text
    assert section.figures["fig2"] is not None
