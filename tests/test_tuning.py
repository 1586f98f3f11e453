"""The table of times: which row decides, where it is read from, and what `hbp tune` keeps."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.shipped import main as make_shipped
from hbp import cli, tuning
from hbp.backends import _timing, _tuning
from hbp.backends._tuned import VARIABLE, Timing, Timings, read, write
from hbp.backends._tuning import cache_file, fastest, given, pinned

pytestmark = pytest.mark.usefixtures("_forgotten")


@pytest.fixture
def _forgotten(monkeypatch, tmp_path):
    """Times read anew, from a cache folder of this test's own."""
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    _tuning.forget()
    yield
    monkeypatch.undo()
    _tuning.forget()


def table(*rows: tuple[str, str, int, int, dict[str, float]]) -> Timings:
    return Timings("made up", tuple(Timing(*row) for row in rows))


SMALL = ("gru forward", "numpy", 1, 32, {"loop": 1.0, "calls": 2.0})
LARGE = ("gru forward", "numpy", 16, 512, {"loop": 2.0, "calls": 1.0})


def test_the_nearest_size_decides_by_its_ratios():
    """Between (1, 32) and (16, 512) the border lies where the ratios to both are alike: B H = 128 * 8."""
    with given(table(SMALL, LARGE)):
        for batch, hidden, way in ((1, 1, "loop"), (4, 120, "loop"), (4, 136, "calls"), (1000, 4000, "calls")):
            assert fastest("gru forward", "numpy", batch, hidden, ("calls", "loop")) == way
        assert fastest("gru forward", "numpy", 0, 8, ("calls", "loop")) == "loop"  # an empty batch


def test_only_the_task_and_the_library_asked_for_and_only_the_ways_that_there_are():
    other = ("gru forward", "torch", 1, 32, {"loop": 2.0, "calls": 1.0})
    backward = ("gru backward", "numpy", 1, 32, {"loop": 3.0, "calls": 4.0, "more": 1.0})
    with given(table(SMALL, other, backward)):
        assert fastest("gru forward", "torch", 1, 32, ("loop", "calls")) == "calls"
        assert fastest("gru backward", "numpy", 1, 32, ("loop", "calls")) == "loop"
        assert fastest("gru backward", "numpy", 1, 32, ("calls", "more")) == "more"
        for unknown in (("lstm forward", "numpy"), ("gru forward", "cupy")):
            assert fastest(*unknown, 1, 32, ("calls", "loop")) == "calls"


def test_the_first_way_stays_where_another_saves_next_to_nothing():
    for calls, way in ((0.94, "calls"), (0.96, "loop")):
        with given(table(("gru forward", "numpy", 1, 32, {"loop": 1.0, "calls": calls}))):
            assert fastest("gru forward", "numpy", 1, 32, ("loop", "calls")) == way


def test_what_a_call_costs_beside_its_steps_counts_the_more_the_fewer_they_are():
    """1 + 10 / T against 2 a step: alike at T = 10, and 5 % less from T = 1 / (0.9 / 10) = 11.1 on."""
    row = Timing("lstm step", "torch", 1, 32, {"library": 2.0, "compiled": 1.0}, {"library": 0.0, "compiled": 10.0})
    with given(Timings("made up", (row,))):
        for steps, way in ((1, "library"), (11, "library"), (12, "compiled"), (1000, "compiled")):
            found, why = _tuning.explained("lstm step", "torch", 1, 32, ("library", "compiled"), steps)
            assert (found, f"T = {steps}: library 2e+06" in why) == (way, True)
        assert fastest("lstm step", "torch", 1, 32, ("library", "compiled")) == "compiled"


def test_a_call_and_its_steps_are_told_apart(monkeypatch):
    """On a clock of our own: 3 + 2 a step, 20 steps and 10; and a run that does not grow with its steps."""
    monkeypatch.setattr(_timing, "shortest", lambda runs, steps: {name: run() for name, run in runs.items()})
    found = _timing.apart({"a": lambda: 43, "b": lambda: 8}, {"a": lambda: 23, "b": lambda: 8}, 20, 10)
    assert found == ({"a": 2, "b": 0.05}, {"a": 3, "b": 7})


def test_what_a_step_should_take_grows_with_its_work_and_is_not_known_of_ways_not_measured():
    with given(table(("gru forward", "numpy", 2, 8, {"loop": 3.0}))):
        assert [_tuning.expected("gru forward", "numpy", *size, "loop") for size in ((2, 8), (4, 16), (1, 4))] == [
            3,
            24,
            3,
        ]
        assert _tuning.expected("gru forward", "numpy", 2, 8, "shared") == math.inf
        assert _tuning.expected("gru backward", "numpy", 2, 8, "loop") == math.inf


def test_a_way_can_be_pinned_where_there_is_it():
    with given(table(SMALL)), pinned({"gru forward": "calls"}):
        assert fastest("gru forward", "numpy", 1, 32, ("loop", "calls")) == "calls"
        assert fastest("gru forward", "numpy", 1, 32, ("loop",)) == "loop"
        with pinned({"stack": "loop"}):
            assert fastest("gru forward", "numpy", 1, 32, ("loop", "calls")) == "calls"


def test_times_come_from_the_cache_else_from_what_is_shipped_or_whence_a_variable_says(monkeypatch, tmp_path):
    assert "shipped" in _tuning.timings().source
    write(cache_file(), table(SMALL))
    _tuning.forget()
    assert _tuning.timings() == table(SMALL) == read(cache_file())
    write(tmp_path / "other.json", table(LARGE))
    for value, rows in (("shipped", None), (str(tmp_path / "other.json"), table(LARGE).rows)):
        monkeypatch.setenv(VARIABLE, value)
        _tuning.forget()
        assert rows is None or _tuning.timings().rows == rows
        assert (rows is None) == ("shipped" in _tuning.timings().source)


@pytest.mark.parametrize("width", [32, 64])
def test_the_tables_shipped_know_every_task(width, monkeypatch):
    monkeypatch.setattr(_tuning, "vector_bytes", lambda: width)
    rows = read(_tuning.shipped()).rows
    parts = {
        (f"{cell} {part}", library)
        for cell in ("gru", "lstm")
        for part in ("forward", "backward")
        for library in ("numpy", "torch")
    }
    steps = {(f"{cell} step", library) for cell in ("gru", "lstm") for library in ("torch", "torch, plain")}
    assert {(row.task, row.library) for row in rows} == parts | steps | {("stack", "torch")}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{"task": 1}]}',
             json.dumps({"rows": [{"task": "t", "library": "l", "rows": 0, "width": 1, "seconds": {"a": 1}}]}),
             json.dumps({"rows": [{"task": "t", "library": "l", "rows": 1, "width": 1, "seconds": {}}]}),
             json.dumps({"rows": [{"task": "t", "library": "l", "rows": 1, "width": 1, "seconds": {"a": 1},
                                   "once": {"a": -1}}]}),
             json.dumps({"rows": [{"task": "", "library": "", "rows": 1, "width": 1, "seconds": {"a": 1, "b": nan}}]})],
)  # fmt: skip
def test_a_file_that_is_none_is_told_and_can_be_left_behind(text, capsys):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert cli.main(["info"]) == 2
    assert "delete it, or run hbp tune again" in capsys.readouterr().err
    assert cli.main(["tune", "--forget"]) == 0
    assert cli.main(["info"]) == 0
    assert "shipped" in capsys.readouterr().out


def test_that_the_variable_names_no_file_is_one_sentence(monkeypatch, capsys, tmp_path):
    for path, why in ((tmp_path / "nowhere.json", "No such file or directory"), (tmp_path, "Is a directory")):
        monkeypatch.setenv(VARIABLE, str(path))
        _tuning.forget()
        said = (
            f"the times in {str(path)!r} cannot be read: {why}; give HBP_TUNED a file that hbp tune --output wrote, or "
            "'shipped'"
        )
        with pytest.raises(OSError, match=re.escape(said)):
            fastest("gru forward", "numpy", 1, 32, ("loop", "calls"))
        assert cli.main(["info"]) == 2
        assert capsys.readouterr().err == f"hbp: {said}\n"


def test_forget_deletes_what_is_kept_and_nothing_that_was_not_meant(capsys, tmp_path):
    assert cli.main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"nothing is kept at {cache_file()}\n"
    write(cache_file(), table(SMALL))
    for other in (["--backend", "torch"], ["--output", str(tmp_path / "times.json")]):
        assert cli.main(["tune", "--forget", *other]) == 2
        assert f"--forget deletes {cache_file()}, whole; give it alone" in capsys.readouterr().err
    assert cache_file().exists()
    assert cli.main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"deleted {cache_file()}\n"
    assert not cache_file().exists()


def test_steps_are_few_where_they_are_long():
    assert [_timing.steps_of(1, 32), _timing.steps_of(64, 64), _timing.steps_of(1, 2048)] == [512, 76, 32]


@pytest.mark.parametrize("library", tuning.LIBRARIES)
def test_tune_measures_and_keeps(library, monkeypatch, capsys):
    pytest.importorskip(library), pytest.importorskip("numba")
    monkeypatch.setattr(_timing, "WORK", 1)
    for module in ("hbp.backends._numba.tuning", "hbp.backends.torch.tuning"):
        if library == "torch" or "numba" in module:
            monkeypatch.setattr(f"{module}.SIZES", [(1, 4), (2, 8)])
    if library == "torch":
        monkeypatch.setattr("hbp.backends.torch.tuning.STACKS", [(2, 4)])
    monkeypatch.setenv(VARIABLE, "shipped")
    assert cli.main(["tune", "--backend", library]) == 0
    assert "HBP_TUNED=shipped is read instead, until it is unset" in capsys.readouterr().out
    monkeypatch.delenv(VARIABLE)
    assert cli.main(["tune", "--backend", library]) == 0
    found = read(cache_file())
    own = [row for row in found.rows if row.library == library]
    assert len(own) == {"numpy": 8, "torch": 13}[library]
    assert all(time > 0 for row in own for time in row.seconds.values())
    shipped = read(_tuning.shipped())
    assert all(replace(row, source=shipped.source) in found.rows for row in shipped.rows if row.library != library)
    where = ("gru forward", "numpy", 2, 8, ("loop", "calls"))
    assert _tuning.explained(*where)[1].endswith(found.source if library == "numpy" else shipped.source)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(own) + 1
    assert out[-1] == f"wrote {cache_file()}"
    assert _tuning.timings() == found
    assert found.source.startswith("hbp tune, ")


def test_shipped_times_are_the_geometric_means_of_those_of_several_machines(tmp_path, capsys):
    one = Timing("gru step", "torch", 1, 8, {"library": 1.0, "adjoint": 2.0}, {"library": 0.0, "adjoint": 512.0})
    other = replace(one, seconds={"library": 4.0, "adjoint": 1.5, "compiled": 1.0}, once={"library": 3.0})
    alone = replace(one, width=9)
    for name, rows in (("a", (one,)), ("b", (alone, other)), ("c", (replace(one, seconds={"new": 1.0}, once={}),))):
        write(tmp_path / name, Timings(name.upper(), rows))
    assert make_shipped([str(tmp_path / name) for name in ("a", "b", "made")]) == 0
    found = read(tmp_path / "made")
    assert found.source == "shipped with hbp, measured on A and B"
    # B's 512 timed steps took 1.5 s each with their share of a call's 512: 0.75 at least. Compiled takes it 4 / 3 of
    # that, the fastest, whose mean is sqrt(0.75).
    each = {"library": 2.0, "adjoint": 1.22, "compiled": 1.15}
    assert found.rows == (replace(one, seconds=each, once={"library": 1.5, "adjoint": 512.0}), alone)
    assert make_shipped([str(tmp_path / "made")]) == 2
    assert make_shipped([str(tmp_path / name) for name in ("a", "c", "made")]) == 2
    assert "gru step has no way that all machines have" in capsys.readouterr().err


def test_the_shipped_times_are_made_from_those_of_the_machines_beside_the_benchmarks(tmp_path):
    file = Path(_tuning.__file__).with_name("tuned-64.json")
    machines = sorted((file.parents[2] / "benchmarks" / "times").glob("64-*.json"))
    assert len(machines) >= 2
    assert make_shipped([*map(str, machines), str(tmp_path / "made")]) == 0
    assert read(tmp_path / "made") == read(file)


def test_tune_refuses_what_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(cli.tune, "find_spec", lambda name: None)
    monkeypatch.setenv("HBP_KERNELS", "off")
    assert cli.main(["tune"]) == 2
    assert "no PyTorch is installed, and no compiled loops: plain (HBP_KERNELS=off)" in capsys.readouterr().err
    with pytest.raises(ImportError, match="'jax' has nothing to tune; give one of numpy, torch"):
        tuning.tune(["jax"])


@pytest.mark.parametrize("trouble", [RuntimeError("Could not determine home directory."), PermissionError(13, "no")])
def test_without_a_cache_folder_the_shipped_times_decide_and_tune_says_so(trouble, monkeypatch, capsys):
    """As under a user without a home, or with somebody else's, in a container."""

    def nowhere():
        raise trouble

    for module in (_tuning, cli.tune):
        monkeypatch.setattr(module, "cache_file", nowhere)
    assert "shipped" in _tuning.timings().source
    assert cli.main(["info"]) == 0
    monkeypatch.setattr(cli.tune, "find_spec", lambda name: name == "torch")
    monkeypatch.setattr(tuning, "find_spec", lambda name: True)
    for arguments in (["tune"], ["tune", "--forget"]):
        assert cli.main(arguments) == 2
        assert str(trouble) in capsys.readouterr().err


def test_that_tune_cannot_write_is_said_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setattr(tuning, "_loops", None)
    monkeypatch.setattr(cli.tune, "find_spec", lambda name: name == "torch")
    (tmp_path / "file").touch()
    for output in (str(tmp_path), "", str(tmp_path / "file" / "times.json")):
        assert cli.main(["tune", "--output", output]) == 2
        assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_compiled_loops_the_own_times_of_stacks_replace_the_shipped_ones(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    parts = ("stack", "torch, plain")
    shipped = [next(row for row in _tuning.timings().rows if part in (row.task, row.library)) for part in parts]
    own = [replace(row, seconds=dict.fromkeys(row.seconds, 7.0)) for row in shipped]
    monkeypatch.setattr(tuning, "CPU", SimpleNamespace(load=lambda: None))
    monkeypatch.setattr(tuning, "_steps", lambda libraries: iter(own))
    tuning.tune(["torch"], lambda line: None, tmp_path / "times.json")
    with given(read(tmp_path / "times.json")):
        for row in own:
            assert _tuning.timings().nearest(row.task, row.library, row.rows, row.width) == row
        assert any(row.library == "torch" and row.task == "gru step" for row in _tuning.timings().rows)
