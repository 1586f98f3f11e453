"""What a diagnosis is made of, in any library: a gradient's agreement, an increment's share, the recommendation."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

import hbp
from hbp.core.increments import Iterate, Report
from hbp.core.solver import Solver
from hbp.diagnosis import Diagnosis, Row, Settings, Spectrum
from hbp.diagnosis.agreement import Agreement

REPORT = Report((2.0, 1.0), (2.0, 4.0), exact=False)


def agreement(error: float) -> Agreement:
    return Agreement(error * error, 1.0, 1.0, 1.0)


def row(
    k: int | None, error: float, seconds: float, chunk: int = 1, report: Report | None = REPORT, rank: Any = 0
) -> Row:
    reports = {} if report is None else {"": report}
    return Row(k, chunk, agreement(error), {"0": agreement(error)}, reports, seconds, rank)


def diagnosis(*rows: Row, exact: float = 0.010) -> Diagnosis:
    return Diagnosis(row(None, 0.0, exact, report=None), rows, 0.05)


def test_an_agreement_is_the_relative_error_and_the_cosine(library):
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (5,), (0,))]
    found = [a + 0.1 * rng.normal(size=a.shape).astype(np.float32) for a in exact]
    a, b = (np.concatenate([part.ravel() for part in parts]).astype(np.float64) for parts in (found, exact))
    backend = library.front_end.backend
    nested = [((library.array(x), library.array(y)), library.array(z)) for x, y, z in (found, exact)]
    for scale in (1, 1e-30, 1e30):  # of squares that leave float32's range
        one, other = ([[[scale * x for x in inner], scale * last] for inner, last in [tree]] for tree in nested)
        whole = Agreement.of(one, other, backend)
        assert whole.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-5)
        assert whole.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    parts = [Agreement.of(library.array(x), library.array(y), backend) for x, y in zip(found, exact, strict=True)]
    assert sum(parts, Agreement()).error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-5)


def test_an_agreement_in_half_precision_is_summed_in_single(library):
    exact = np.full(100_000, 2.0, np.float16)
    found = exact * np.where(np.arange(100_000) % 2, 1.5, 1).astype(np.float16)
    whole = Agreement.of(library.array(found), library.array(exact), library.front_end.backend)
    assert whole.error == pytest.approx(0.125**0.5, rel=1e-3)
    assert whole.cosine == pytest.approx(1.25 / 1.625**0.5, rel=1e-3)


def test_agreements_of_zeros_and_of_other_shapes():
    from hbp.backends.numpy import backend

    zero, one = np.zeros(2), np.ones(2)
    found = {
        name: Agreement.of(a, b, backend) for name, a, b in (("00", zero, zero), ("10", one, zero), ("01", zero, one))
    }
    assert [(found[name].error, found[name].cosine) for name in ("00", "10", "01")] == [(0, 1), (math.inf, 0), (1, 0)]
    assert math.isnan(Agreement.of(np.array([np.nan, 1]), one, backend).error)
    with pytest.raises(ValueError, match=r"the gradient found has shape \(2,\), expected \(3,\)"):
        Agreement.of(zero, np.zeros(3), backend)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        Agreement.of([zero], [zero, one], backend)


def test_an_increment_s_share_of_the_solution():
    report = Report((2.0, 0.0, 1.0), (4.0, 0.0, 0.0), exact=False)
    assert report.shares == (0.5, 0.0, math.inf)
    assert report.shares[-1] == math.inf
    assert [Iterate(0, None, new, size).relative for new, size in zip((2, 0, 1), (4, 0, 0), strict=True)] == [
        0.5,
        0,
        math.inf,
    ]
    both = Row(1, 1, agreement(0.1), {}, {"a": REPORT, "b": report})
    assert both.increment == math.inf
    assert math.isnan(row(1, 0.0, 1.0, report=None).increment)


def test_the_fastest_setting_within_the_target_is_recommended():
    rows = row(0, 0.3, 0.001), row(1, 0.04, 0.009), row(2, 0.03, 0.007), row(3, 0.0, 0.008, chunk=2)
    found = diagnosis(*rows)
    assert found.within == rows[1:]
    assert found.recommended is rows[2]
    assert found.advice == (
        "recommended for an error of 0.05: iterations=2, chunk=1 (error 0.03, 7 ms; exact backprop takes 10 ms)"
    )


@pytest.mark.parametrize("seconds", [0.006, 0.007])
def test_exact_backprop_is_recommended_unless_a_setting_is_faster(seconds):
    found = diagnosis(row(1, 0.04, 0.009), row(2, 0.03, 0.007, chunk=4), exact=seconds)
    assert found.recommended is found.exact
    assert found.recommended.solver == Solver()
    assert found.advice == (
        f"recommended for an error of 0.05: exact backprop, which is the fastest here, {1e3 * seconds:.3g} ms; of "
        "Highway-BP's settings within it iterations=2, chunk=4 is the fastest (error 0.03, 7 ms), and on other "
        "hardware it may pay"
    )


def test_a_lucky_k_does_not_count():
    """Of k = 1 to 4 only the last two are within the target with every larger k."""
    rows = [row(k, error, 0.001) for k, error in ((3, 0.05), (1, 0.01), (2, 0.2), (4, 0.01))]
    other = row(1, 0.01, 0.002, chunk=2)
    assert [r.iterations for r in diagnosis(*rows, other).within] == [1, 3, 4]
    assert diagnosis(*rows, other).within[0] is other
    assert diagnosis(*rows, row(5, math.nan, 0.001)).within == ()


def test_ranks_are_settings_of_their_own():
    """At rank 8 both k are within the target, at rank 0 none, and "auto" is by luck at k = 1."""
    errors = {0: (0.3, 0.2), 8: (0.04, 0.01), "auto": (0.02, 0.1)}
    rows = [
        row(k + 1, error, 0.002 + k / 1e3, rank=rank) for rank, own in errors.items() for k, error in enumerate(own)
    ]
    found = diagnosis(*rows)
    assert [(r.rank, r.iterations) for r in found.within] == [(8, 1), (8, 2)]
    assert found.recommended is rows[2]
    assert found.advice.startswith("recommended for an error of 0.05: iterations=1, chunk=1, rank=8 (error 0.04, 2 ms")
    assert not found.worse
    assert "worse" not in str(found)
    assert [line.split()[2] for line in str(found).splitlines()[2:8]] == ["0", "0", "8", "8", "auto", "auto"]


def test_a_rank_that_is_worse_than_none_is_named():
    """At the same k and chunk, beyond rounding; NaN is worse than anything."""
    plain = row(1, 0.3, 0.001), row(2, 0.2, 0.001), row(1, 0.9, 0.001, chunk=4), row(3, 0.1, 0.001)
    ranked = row(1, 0.8, 0.001, rank=2), row(2, 0.1, 0.001, rank=2), row(3, math.nan, 0.001, rank=4)
    unlike = row(2, 0.2 + 1e-6, 0.001, rank=8), row(5, 2.0, 0.001, rank=8), row(1, 0.4, 0.001, chunk=4, rank="auto")
    found = diagnosis(*plain, *ranked, *unlike)
    assert found.worse == (ranked[0], ranked[2])
    (told,) = [line for line in found.advice.splitlines() if line.startswith("rank")]
    assert told.startswith("rank 2, 4 is worse than none at some settings (error ")
    marked = [line for line in str(found).splitlines() if line.endswith(" worse than rank 0")]
    assert [line.split()[:3] for line in marked] == [["1", "1", "2"], ["3", "1", "4"]]
    (told,) = [line for line in diagnosis(*plain, ranked[0]).advice.splitlines() if line.startswith("rank")]
    assert "(error 0.8 at iterations=1, chunk=1, rank=2, 0.3 without)" in told


def test_a_rank_whose_increments_grow_is_named():
    growing = Report((1.0, 9.0), (1.0, 8.0), exact=False)
    found = diagnosis(row(1, 0.3, 0.001), row(1, 0.2, 0.001, rank=4, report=growing), row(1, 0.1, 0.001, rank=8))
    assert "the split diverges at some settings (rank 4): damp the split" in found.advice
    assert "rank" not in diagnosis(row(1, 0.3, 0.001, report=growing)).advice.split("settings")[1].split(":")[0]


def test_automatic_ranks_that_take_nothing_are_no_fault_of_the_loss():
    plain = row(1, 0.3, 0.001), row(2, 0.2, 0.001)
    assert "hand rank on" not in diagnosis(*plain, row(1, 0.3, 0.001, rank="auto")).advice
    assert "hand rank on" in diagnosis(*plain, row(1, 0.3, 0.001, rank=2)).advice


def test_a_spectrum_beside_its_flat_edge(rng):
    noise = rng.uniform(-1, 1, (90, 30))
    u, s, v = np.linalg.svd(noise, full_matrices=False)
    s[:2] = 3 * s[0], 2 * s[0]
    found = Spectrum(tuple(s.tolist()), (90, 30))
    assert (found.strong, hbp.directions((u * s) @ v, "auto").rank) == (2, 6)
    assert found.edge == pytest.approx(s[2], rel=0.1)
    assert str(found).startswith(f"2 of 30 directions above 1.1 times the flat edge of {found.edge:.3g}: {s[0]:.3g} ")
    assert str(Spectrum((), (0, 0))).startswith("0 of 0 directions")
    rows = row(1, 0.3, 0.001), row(1, 0.01, 0.001, rank=2)
    shown = Diagnosis(row(None, 0.0, 0.01), rows[:1], 0.05, {"weight": found})
    assert f"weight: {found}" in str(shown).splitlines()
    assert "ranks=(0, 'auto') may be" in shown.advice
    assert "ranks=" not in Diagnosis(row(None, 0.0, 0.01), rows, 1e-3, {"weight": found}).advice


def test_where_nothing_is_within_the_target_exact_backprop_is_recommended():
    found = diagnosis(row(0, 0.3, 0.001), row(1, 0.2, 0.002))
    assert found.recommended is found.exact
    assert "recommended: exact backprop, 10 ms; no setting tried is within the target error of 0.05" in found.advice


def test_settings_that_nobody_heeds_are_not_recommended():
    found = diagnosis(row(1, 0.0, 0.001, report=None), row(2, 0.0, 0.001, report=None))
    assert found.recommended is found.exact
    assert found.advice.startswith("no backward pass by Highway-BP was seen")
    unwatched = diagnosis(row(1, 0.01, 0.001, report=None))
    assert unwatched.recommended is unwatched.rows[0]


def test_rows_are_printed_exact_ones_too():
    found = diagnosis(row(12, 0.3, 0.0123))
    header, exact, other, _ = str(found).splitlines()
    assert exact.split() == ["exact", "1", "0", "0", "1.0000", "10.00"]
    assert other.split() == ["12", "1", "0", "0.3", "1.0000", "0", "0.3", "0.25", "12.30"]
    assert len(header) == len(exact) == len(other)
    assert str(row(1, 0.3, math.nan)).split()[-1] == "0.25"
    assert str(Row(1, 1, agreement(2), {}, {"": Report((1.0, 9.0), (1.0, 8.0), exact=False)})).endswith("diverges")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iterations": ()}, ValueError, "give at least one number of iterations"),
        ({"iterations": (None,)}, TypeError, "iterations=None is a NoneType"),
        ({"chunks": (0,)}, ValueError, "chunk=0 is too small"),
        ({"iterations": 3}, TypeError, r"iterations=3; give several to compare, as \(3,\)"),
        ({"ranks": "auto"}, TypeError, r"ranks='auto'; give several to compare, as \('auto',\)"),
        ({"ranks": ()}, ValueError, "give at least one number of iterations, one chunk and one rank"),
        ({"ranks": (0, "all")}, ValueError, "rank='all'; give a number of directions, 'auto'"),
        ({"ranks": (-1,)}, ValueError, "rank=-1 is too small"),
        ({"ranks": (True,)}, TypeError, "rank=True is a bool"),
        ({"ranks": (hbp.directions(np.eye(2), 1),)}, TypeError, "ranks holds a Directions; give numbers"),
        ({"target": "5 %"}, ValueError, "target='5 %'; give a relative error"),
        ({"target": math.nan}, ValueError, "target=nan; give a relative error"),
        ({"target": -1}, ValueError, "target=-1; give a relative error"),
        ({"plot": "nowhere/found.png"}, FileNotFoundError, "there is no folder 'nowhere'; make it first"),
        ({"plot": "found.xyz"}, ValueError, "'found.xyz' ends in .xyz; give one of .*png"),
    ],
)
def test_bad_settings(change, error, message):
    if "plot" in change:
        pytest.importorskip("matplotlib")
    given: dict[str, Any] = {"iterations": (1,), "chunks": (1,), "target": 0.05, "plot": None} | change
    with pytest.raises(error, match=message):
        Settings(**given)


def test_a_picture_that_could_not_be_drawn_or_written(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    Settings((1,), (1,), 0.05, tmp_path / "found.PNG")
    Settings((1,), (1,), 0.05, tmp_path / "found")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(PermissionError, match="cannot be written there"):
            Settings((1,), (1,), 0.05, tmp_path / "found.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install"):
        Settings((1,), (1,), 0.05, tmp_path / "found.png")
