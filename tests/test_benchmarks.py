"""The benchmarks' own correctness: what they check, measure and write, at tiny sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
pytest.importorskip("rich", reason="the benchmarks show their progress with rich")

from benchmarks import __main__ as command
from benchmarks import blocks, cases, crossover, measure, memory, plots, precision, rank, report, rnn, scan, stack

alone = pytest.mark.usefixtures("once")
GRU = {"cell": "gru", "T": 20, "B": 2, "H": 4, "weights": 1.0}
LSTM = {**GRU, "cell": "lstm"}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(cases, "_TESTS", {})
    monkeypatch.setitem(scan.CASES, "quick", [{"T": 9, "B": 2, "D": 3}, {"T": 17, "B": 2, "D": 3}])
    monkeypatch.setitem(rnn.CASES, "quick", [GRU, LSTM])
    monkeypatch.setitem(stack.CASES, "quick", [{"L": 9, "d": 3, "B": 2}])
    monkeypatch.setitem(blocks.CASES, "quick", [{"L": 4, "d": 6, "heads": 2, "T": 5}])
    monkeypatch.setitem(crossover.CASES, "quick", [GRU, {**GRU, "B": 3}, {**GRU, "T": 9}, LSTM])
    monkeypatch.setitem(rank.CASES, "quick", [{**GRU, "H": 20, "strong": 3}, {**LSTM, "H": 20, "strong": 3}])
    monkeypatch.setitem(precision.CASES, "quick", [{**GRU, **precision.CHECK, "inputs": True}])
    monkeypatch.setitem(memory.CASES, "quick", [GRU])


def run(library, tmp_path, *tables):
    status = command.main([*tables, "--backends", library.name, "--out", str(tmp_path)])
    return status, {table: json.loads((tmp_path / f"{table}.json").read_text()) for table in tables}


def test_every_row_is_checked_and_timed(library, tmp_path, monkeypatch, request):
    if library.name == "numpy":
        request.getfixturevalue("once")
    for table in (rnn, stack):
        monkeypatch.setattr(table, "ITERATIONS", (0, 3))  # in JAX each k is compiled anew, in every method
    tables = ["scan", "rnn"]
    tables += {"torch": ["stack", "blocks", "crossover", "rank"], "jax": ["stack"]}.get(library.name, [])
    status, documents = run(library, tmp_path, *tables)
    assert status == 0
    for table, document in documents.items():
        assert document["environment"]["versions"]["numpy"]
        assert document["environment"]["limits"][library.name]["flops_per_s"] > 0
        rows = [row for row in document["rows"] if "no scan" not in row["method"] and "another" not in row["method"]]
        assert any(row["ours"] for row in rows)
        for row in rows:
            assert row["failed"] is None
            assert row["check"] < 1e-4
            assert row["error"] < (1e-4 if row["exact"] else 2)
            assert row["error"] > 1e-4 or row["cosine"] > 1 - 1e-8
            median, low, high = row["whole_ms"]
            assert 0 < low <= median <= high
        text = (tmp_path / f"{table}.md").read_text()
        assert text.count("| --- | --- |") == len({json.dumps(row["case"]) for row in rows})


@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_each_method_stands_beside_itself_with_products_in_a_lower_precision(library, tmp_path):
    import torch

    a = torch.randn(256, 256)
    lowered = not torch.equal(a @ a, precision._lower(torch.matmul)(a, a))  # where the processor has instructions
    assert torch.get_float32_matmul_precision() == "highest"
    status, documents = run(library, tmp_path, "precision")
    rows = documents["precision"]["rows"]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert status == 0
    assert [one["method"] + precision.LOWER for one, _ in pairs] == [other["method"] for _, other in pairs]
    assert [one["k"] for one, _ in pairs] == [None, None, 1, 3]
    for one, other in pairs:
        assert one["check"] < 1e-4
        assert (other["check"] > 1e-4) == lowered
        assert other["check"] < 1e-2
    (line,) = [line for line in (tmp_path / "precision.md").read_text().splitlines() if line.startswith("| GRU T")]
    assert line.count("off") == (5 if lowered else 3)


@alone
def test_a_wrong_method_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(case, lib, real=scan.methods):
        for method in real(case, lib):
            yield replace(method, forward=lambda f=method.forward: 1.001 * f()) if method.ours else method

    monkeypatch.setattr(scan, "methods", wrong)
    assert command.main(["scan", "--backends", "numpy", "--out", str(tmp_path)]) == 1
    assert "relative error 1.0e-03 in its test" in capsys.readouterr().err
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    assert {row["whole_ms"] is None for row in rows if row["ours"]} == {True}
    assert {row["whole_ms"] is None for row in rows if not row["ours"]} == {False}
    assert "**hbp" not in (tmp_path / "scan.md").read_text()


@alone
def test_the_reference_is_the_derivative():
    """Finite differences of the loss along the gradient, in float64."""
    for case, module in ((GRU, rnn), (LSTM, rnn), ({"L": 5, "d": 3, "B": 2}, stack)):
        gradient = module.reference(case)
        assert gradient.size == sum(a.size for a in parameters(module, case))
        slope = (loss(module, case, 1e-6 * gradient) - loss(module, case, -1e-6 * gradient)) / 2e-6
        assert slope == pytest.approx(gradient @ gradient, rel=1e-6)


@alone
def test_a_size_is_drawn_where_most_of_it_was_measured():
    """Large sizes are measured at few others, which would make a plot of single points."""
    cases = [
        {"T": T, "B": B, "H": H} for T in (256, 1024) for B in (1, 4, 16) for H in (64, 1024) if T * B * H <= 2**20
    ]
    assert {name: plots._widest(cases, name) for name in "TBH"} == {
        "T": {"B": 4, "H": 64},
        "B": {"T": 1024, "H": 64},
        "H": {"T": 256, "B": 4},
    }


@alone
@pytest.mark.parametrize("cell", ["gru", "lstm", None])
def test_no_two_iterates_pass_for_one_another(cell):
    """At the size of the tests before timing, so that a method which does not heed its k fails them."""
    module = rnn if cell else stack
    case = {"cell": cell, **module.CHECK}
    method = measure.Method("Highway-BP", measure.library("numpy"), lambda: 0, None)
    found = [module.reference(case, replace(method, k=k)) for k in rnn.ITERATIONS] + [module.reference(case)]
    for one, other in pairwise(found):
        assert measure.agreement(one, other).error > 3 * cases.TOLERANCE["float32"]


@alone
@pytest.mark.parametrize("cell", rnn.BOTH)
def test_strong_directions_are_what_the_gates_miss(cell):
    case = {"cell": cell, "T": 96, "B": 2, "H": 256, "weights": 1.0, **rank.STRONG}
    exact, method = rnn.reference(case), measure.Method("", measure.library("numpy"), lambda: 0, None, 1)
    gate, ranked = (rnn.reference(case, replace(method, name=name)) for name in ("Highway-BP", rnn.RANKED))
    assert measure.agreement(ranked, exact).error < 0.1 < 0.3 < measure.agreement(gate, exact).error


@alone
def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(case, lib, real=scan.methods):
        def fail():
            raise MemoryError("out of memory")

        for method in real(case, lib):  # at full size only
            yield replace(method, forward=fail) if method.ours and case != {**case, **scan.CHECK} else method

    monkeypatch.setattr(scan, "methods", broken)
    assert command.main(["scan", "stack", "--backends", "numpy", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "MemoryError: out of memory" in said
    assert "stack has no methods for numpy" in said
    text = (tmp_path / "scan.md").read_text()
    assert "Failed: T = 9, B = 2, D = 3, numpy, hbp: MemoryError" in text
    assert "loop over steps" in text


def parameters(module, case):
    found = module.problem(case)
    return found[0] if module is rnn else [w for pair in zip(*found[:2], strict=True) for w in pair]


def loss(module, case, shift):
    """The loss with all parameters moved, by the formulas alone."""
    arrays, at = [], 0
    for a in parameters(module, case):
        arrays.append(a.astype(np.float64) + shift[at : at + a.size].reshape(a.shape))
        at += a.size
    *_, x, dy = module.problem(case)
    if module is stack:
        for u, w in zip(arrays[::2], arrays[1::2], strict=True):
            x = x + np.tanh(x @ u) @ w
        return (x * dy).sum()
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    w_ih, w_hh, b_ih, b_hh = arrays
    h = c = np.zeros(x.shape[1:])
    total = 0.0
    for row, weight in zip(x, dy, strict=True):
        own, past = row @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if case["cell"] == "gru":
            (r, z, n), (r_h, z_h, n_h) = np.split(own, 3, -1), np.split(past, 3, -1)
            z = sigmoid(z + z_h)
            h = (1 - z) * np.tanh(n + sigmoid(r + r_h) * n_h) + z * h
        else:
            i, f, g, o = np.split(own + past, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        total += (h * weight).sum()
    return total


@alone
def test_times_are_medians_of_all_rounds(monkeypatch):
    ticks = iter(np.cumsum([1.0, 2.0, 3.0, 4.0] * 100).tolist())
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks))
    method = measure.Method("m", measure.library("numpy"), lambda: 0, lambda state: state)
    row = measure.Row.of("t", {}, method)
    measure.time_all([(row, method)], 4, lambda: None)
    assert row.forward_ms[0] + row.backward_ms[0] == pytest.approx(row.whole_ms[0])
    assert measure.milliseconds([1, 5, 2]) == [2000, 1500, 3500]


@alone
def test_memory(tmp_path):
    status, documents = run(type("L", (), {"name": "numpy"}), tmp_path, "memory")
    assert status == 0
    for row in documents["memory"]["rows"]:
        assert row["saved_bytes"] >= 4 * GRU["T"] * GRU["B"] * GRU["H"]  # the states
    assert report.write(tmp_path / "memory.json")[-1].stat().st_size > 1000


@alone
def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["scam"])
    assert caught.value.code == 2
    file = tmp_path / "file"
    file.touch()
    assert command.main(["scan", "--backends", "numpy", "--out", str(file)]) == 2
    monkeypatch.setenv("HBP_KERNELS", "on")
    assert command.main(["scan", "--backends", "numpy", "--out", str(tmp_path)]) == 2
    assert "give one of auto, all, off" in capsys.readouterr().err


@alone
def test_a_method_is_tested_as_itself(monkeypatch):
    """Also where a size has fewer methods than the small one of the tests."""

    def fewer(case, lib, real=scan.methods):
        for method in real(case, lib):
            if case == {**case, **scan.CHECK}:
                yield replace(method, name="wrong, and of small sizes", forward=lambda f=method.forward: 2 * f())
            yield method

    monkeypatch.setattr(cases, "_TESTS", {})
    lib = measure.library("numpy")
    limits = {"numpy": {"copy_bytes_per_s": 1.0, "flops_per_s": 1.0}}
    rows = cases.rows_of("scan", {"T": 9, "B": 2, "D": 3}, [lib], limits, 1, methods=fewer)
    assert [row.failed for row in rows] == [None] * len(rows)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_device_compares_its_own_results(name, monkeypatch):
    torch = pytest.importorskip("torch", reason="it compares there")
    pytest.importorskip(name, reason="whose results are compared")
    lib = replace(measure.library(name), on_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    method = measure.Method("", lib, lambda: 0, None)
    for dtype, error in (("float32", 0), ("bfloat16", 3e-3)):
        found = method.result([lib.cast(lib.array(row), dtype) for row in x])
        assert (type(found), found.dtype, found.shape) == (torch.Tensor, torch.float64, (12,))
        assert measure.agreement(found, x.ravel().astype(np.float64)).error <= error
        assert measure.agreement(x.ravel(), found).error <= error
        assert measure.agreement(found, 2 * found).error == pytest.approx(0.5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_cosines_of_paths_early_and_late(cell, tmp_path, monkeypatch):
    """One in as many rounds as steps, and without any where the path takes all directions."""
    pytest.importorskip("sklearn", reason="the nets read scikit-learn's digits")
    from benchmarks import cosines

    monkeypatch.setattr(cosines, "MEASURED", 1)
    paths = {"gate alone": (1, 0), "gate, chunk 8": (8, 0), "rank 8": (1, 6), "rank auto": (1, "auto")}
    rows = cosines.measured(cell, (0, 2), (0, 64), 6, paths)
    assert [(row["step"], row["path"]) for row in rows] == [(step, path) for step in (0, 2) for path in paths]
    for row in rows:
        assert row["cosine"][1] == pytest.approx(1, abs=1e-5)
        assert (row["cosine"][0] == pytest.approx(1, abs=1e-5)) == (row["path"] == "rank 8")
    early, late = ([row["cosine"][0] for row in rows if row["step"] == step] for step in (0, 2))
    assert early != late
    cosines.draw(rows, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
