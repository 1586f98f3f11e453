"""Tables 3 and 6, memory, and splits side by side: what is compared, and the verdicts that are computed from it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import hbp

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib")
pytest.importorskip("rich", reason="the experiments show their progress with rich")
pytest.importorskip("threadpoolctl", reason="the experiments limit threads with threadpoolctl")
pytest.importorskip("sklearn", reason="the experiments learn scikit-learn's digits")

from benchmarks import measure
from experiments import memory, splits, tables
from experiments.__main__ import main
from experiments.experiment import Request
from experiments.layers import ITERATIONS, LAYER, LOOP, LOOP_HIGHWAY, Case, methods, reference
from experiments.methods import EXACT
from experiments.solving import CHUNKS, FIXED, FOLLOWED, MGRIT, MGRIT_FCF, PAPERS, SEQUENTIAL, WHOLE
from experiments.timing import pick, timed
from experiments.training import Run

CONTEXT = SimpleNamespace(advance=lambda done, total, text="": None)
SMALL = {
    "lstm": Case("lstm", 1, 19, 2, 5),
    "layers": Case("gru", 2, 9, 3, 4),
    "last": Case("gru", 1, 19, 2, 5, every=False),
}


EACH = pytest.mark.parametrize("library", ["torch", "jax"], indirect=True)
TORCH = pytest.mark.parametrize("library", ["torch"], indirect=True)


@TORCH
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_all_ways_to_a_training_step_find_the_gradient_they_name(library, case):
    rows = checked(library, case)
    ours, loops = ([pick(rows, name, k)["error"] for k in ITERATIONS] for name in ("Highway-BP", LOOP_HIGHWAY))
    np.testing.assert_allclose(ours, loops, rtol=1e-2, atol=1e-5)  # each k by two ways of code


@pytest.mark.parametrize("library", ["jax"], indirect=True)
@pytest.mark.parametrize("name", ["lstm", "layers"])
def test_so_do_those_in_jax(library, name, monkeypatch):
    monkeypatch.setattr("experiments.jax_layers.ITERATIONS", (0, 20))  # each takes seconds to compile
    checked(library, SMALL[name])


def checked(library, case):
    rows = tables.Steps("LSTM", library.name, case, rounds=2).perform(CONTEXT)["rows"]
    assert pick(rows, LAYER)["error"] < 1e-5  # NumPy's definitions agree with the library's own autograd
    for row in rows:
        assert row["whole_ms"][0] > 0
        assert row["error"] < 1e-5 or not (row["exact"] or row["k"] >= case.T)
    assert min(row["error"] for row in rows if row["k"] == 0) > 1e-2
    return rows


@TORCH
def test_a_wrong_exact_gradient_ends_the_measurement(library):
    case = SMALL["last"]
    with pytest.raises(RuntimeError, match="the library's layer: relative error"):
        timed(list(methods(case, measure.library(library.name))), 1.01 * reference(case), 0, lambda done, total: None)


def test_the_papers_preset_has_the_papers_sizes():
    works = tables.work(Request("paper", steps=2))
    assert [(w.case.T, w.case.B, w.case.H, w.case.layers) for w in works] == [
        (256, 128, 512, 1), (256, 128, 512, 1), (256, 128, 512, 3), (1024, 128, 64, 1)
    ]  # fmt: skip
    assert {work.rounds for work in works} == {2}
    assert len({work.key for work in works if work.alone}) == 4


def steps_record(name, factor, exact):
    """Times in which Highway-BP is so many times faster than the loop, and the exact adjoint so many."""
    case = dict(zip(("cell", "layers", "T", "B", "H", "every"), ("gru", 1, 2, 2, 2, True), strict=True))
    rows = []
    for method in (LOOP, tables.LOOP_EXACT, LAYER, tables.OURS):
        time = 12 / exact if method == tables.LOOP_EXACT else 12.0
        rows.append({"method": method, "k": None, "error": 0.0, "whole_ms": [time] * 3})
    for method in (LOOP_HIGHWAY, tables.LOOP_FIXED, tables.HIGHWAY):
        for k in ITERATIONS:
            time = 12 / factor if method == LOOP_HIGHWAY else 13.0
            rows.append({"method": method, "k": k, "error": 0.1, "whole_ms": [time] * 3})
    for row in rows:
        row |= {"forward_ms": [1.0] * 3, "backward_ms": [row["whole_ms"][0] - 1] * 3}
    return {"name": name, "case": case, "rows": rows}


@pytest.mark.parametrize(
    ("factor", "exact", "verdicts"), [(2, 1.5, [True, True]), (2, 3, [True, False]), (9, 3, [False, True])]
)
def test_what_the_speed_up_is_made_of_is_computed(factor, exact, verdicts):
    request = Request()
    records = {work.key: steps_record(work.name, factor, exact) for work in tables.work(request)}
    section = tables.section(request, records)
    assert [claim.agrees for claim in section.claims] == [*verdicts, False]  # 13 ms against the library's 12
    assert "| LSTM | the loop, after the loop | 2 | 2 | 2 |" in section.text or factor != 2
    assert set(section.figures) == {"tables", "tables-parts"}
    one = dict([*records.items()][:1])
    assert tables.section(request, one).claims  # of whatever there is


def memory_record(name, extra):
    case = {"T": 10, "B": 2, "H": 5, "cell": "gru"}
    rows = [("exact adjoint", None, 1, 5, 7), ("Highway-BP", 3, 1, 5, 7 + extra), ("Highway-BP", 3, 8, 5, 30)]
    rows = [dict(zip(("method", "k", "chunk", "saved", "peak"), row, strict=True)) for row in rows]
    rows = [row | {"saved": 400 * row["saved"], "peak": 400 * row["peak"]} for row in rows]
    return {"name": name, "case": case, "hidden": 400, "rows": rows}


@pytest.mark.parametrize(("extra", "agrees"), [(2, True), (3, False), (-1, True)])
def test_memory_beyond_exact_backprop_is_held_against_the_papers_count(extra, agrees):
    request = Request()
    records = {work.key: memory_record(work.name, extra) for work in memory.work(request)}
    section = memory.section(request, records)
    assert section.claims[0].agrees is agrees
    assert f"LSTM: {extra:+.1f}" in section.claims[0].measured
    assert f"| Highway-BP, k = 3 | 5.00 | {7 + extra:.2f} |" in section.text


def test_memory_that_the_system_does_not_tell_is_no_verdict():
    request = Request()
    records = {work.key: memory_record(work.name, 2) for work in memory.work(request)}
    for record in records.values():
        record["rows"] = [row | {"peak": None} for row in record["rows"]]
    section = memory.section(request, records)
    assert (section.claims[0].agrees, "| - |" in section.text) == (None, True)


@EACH
def test_memory_finds_what_it_compares_among_the_ways(library):
    for work in memory.work(Request(backend=library.name)):
        record = {"rows": [{"method": m.name, "k": m.k, "chunk": m.chunk or 1} for m in work._methods()]}
        assert (memory._highway(record)["k"], memory._exact(record)["k"]) == (3, None)


@TORCH
@pytest.mark.parametrize("task", splits.TASKS)
def test_chains_have_the_models_own_gradient(library, task):
    import torch

    from experiments.chains import points
    from experiments.models.torch import loss, tensors

    run = Run(task, EXACT, 0)
    trainer, learned = run.trainer(), run.problem.task
    batch = next(learned.load().train.batches(3, 0))
    here, exact = points(trainer.model, learned, batch)
    model = trainer.model.double().requires_grad_()
    (inputs,), targets = tensors(batch)
    value = loss(learned, model(inputs.double()), targets)
    part = model.stack if hasattr(model, "stack") else model.layers[0]
    found = torch.autograd.grad(value, list(part.parameters()))
    expected = torch.cat([d.flatten() for d in found])
    if task == "mlp":  # the chain's are parameter by parameter, the model's layer by layer
        count = len(list(model.stack[0].parameters()))
        expected = torch.cat([d.flatten() for i in range(count) for d in found[i::count]])
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        here.gradient(hbp.backprop(here.chain, here.cotangent)).double(), expected, rtol=1e-3, atol=1e-6
    )


@TORCH
def test_a_record_holds_all_ways_at_both_points(library, monkeypatch):
    monkeypatch.setattr(splits, "ROUNDS", 1)
    record = splits.Splits(Run("mlp", EXACT, 0, steps=10)).perform(CONTEXT)
    assert [point["step"] for point in record["points"]] == [1, 10]
    for point in record["points"]:
        rows = {(row["method"], row["k"]): row for row in point["rows"]}
        assert point["length"] == rows[SEQUENTIAL, None]["steps"] == 16
        assert max(rows[method, None]["error"] for method in (SEQUENTIAL, WHOLE)) < 1e-3
        assert all(row["whole_ms"] for row in rows.values())
        assert rows[MGRIT_FCF, 2]["error"] < 1e-4 < rows[MGRIT_FCF, 1]["error"]  # four stages
        assert (FOLLOWED, 0) not in rows  # no weight is shared by all layers
    other = splits.Splits(Run("mlp", EXACT, 1, steps=10))
    assert not other.alone  # times are of one seed


def split_record(task, seed, highway, fixed, chunks, multigrid, followed):
    rows = []
    for method, error in (
        (PAPERS, highway),
        (FIXED, fixed),
        (CHUNKS, chunks),
        (MGRIT, multigrid),
        (FOLLOWED, followed),
    ):
        rows += [
            {"method": method, "k": k, "steps": 10 * (method == MGRIT) + k, "error": error / (k + 1), "whole_ms": None}
            for k in (0, 1, 2, 3, 5, 8)
        ]
    points = [{"share": share, "length": 16, "rows": rows} for share in splits.SHARES]
    return {"task": task, "title": task, "seed": seed, "stage": 4, "points": points}


@pytest.mark.parametrize(
    ("errors", "verdicts"),
    [
        ((0.5, 1, 0.3, 0.3, 0.2), [True, True, True]),
        ((1, 0.5, 0.3, 0.3, 0.2), [False, True, True]),
        ((0.2, 1, 0.9, 0.3, 0.9), [True, False, True]),  # MGRIT is ten steps deeper
        ((0.2, 1, 1.9, 0.3, 0.1), [True, True, False]),  # no number tried is enough
    ],
)
def test_verdicts_on_splits_are_computed(errors, verdicts):
    request = Request(seeds=2)
    works = splits.work(request)
    section = splits.section(request, {w.key: split_record(w.run.task, w.seed, *errors) for w in works})
    assert [claim.agrees for claim in section.claims] == verdicts
    assert set(section.figures) == {"splits", "splits-time"}


@pytest.mark.parametrize("library", ["jax"], indirect=True)
def test_splits_are_pytorchs_and_that_is_one_sentence(library, tmp_path, capsys):
    assert splits.work(Request(backend="jax")) == []
    assert main(["splits", "--backend", "jax", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "experiments: there is nothing to do for splits with --backend jax\n"
