"""``python -m benchmarks gpu``: how its time is spent, what it keeps, and what follows from its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from benchmarks import __main__ as everything
from benchmarks.gpu import command, correctness, defaults, device, page, speed
from benchmarks.gpu.record import COMPLETE, OUT_OF_TIME, Record
from benchmarks.gpu.steps import STEPS, Step, There, WrongError
from benchmarks.measure import library
from hbp.backends import _kernels, _measured
from hbp.backends._measured import Measured, Place

PLANTED = """
import os, time
from pathlib import Path
from benchmarks.gpu.steps import Part

def noted(there, name, run):
    def noting():
        with (there.folder / "ran").open("a") as file:
            file.write(name + "\\n")
        return run()
    return Part(name, noting)

def fail():
    raise ArithmeticError("planted")

def good(there):
    yield noted(there, "one", lambda: 1)
    yield Part("two", fail, only="it needs a device")
    yield noted(there, "three", lambda: 3)

def failing(there):
    yield noted(there, "bad", fail)
    yield noted(there, "after", lambda: 2)

def hanging(there):
    yield noted(there, "quick", lambda: 1)
    yield noted(there, "hang", lambda: os.system("sleep 1000"))
    yield noted(there, "late", lambda: 2)

def dying(there):
    yield noted(there, "dies", lambda: os._exit(7))
    yield noted(there, "next", lambda: 2)

def broken(there):
    raise ImportError("no parts")

def slow(there):
    for i in range(8):
        yield noted(there, str(i), lambda: time.sleep(0.7))
"""


pytestmark = pytest.mark.usefixtures("once")


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Steps of a module that only the processes of steps import."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def steps(*names, seconds=20.0):
        return [Step(name, f"planted:{name}", seconds, "planted", seconds) for name in names]

    return steps


def run(steps, folder, *arguments):
    return command.main(["--rehearse", "--out", str(folder), *arguments], steps)


def ran(folder):
    return (folder / "ran").read_text().split()


def record(folder, step):
    return Record.read(folder / f"{step}.json")


def test_each_part_is_written_once_and_what_needs_a_device_is_listed(planted, tmp_path):
    folder = tmp_path / "out"
    for _ in range(2):  # the second finds nothing to do
        assert run(planted("good"), folder) == 0
        assert ran(folder) == ["one", "three"]
    found = record(folder, "good")
    assert (found.results(), found.reasons("skipped"), found.ended) == (
        {"one": 1, "three": 3},
        {"two": "it needs a device"},
        COMPLETE,
    )
    text = (folder / page.NAME).read_text()
    assert "Rehearsal without a device" in text
    assert "* good, two: it needs a device" in text


def test_what_fails_or_dies_costs_its_own_part(planted, tmp_path):
    folder = tmp_path / "out"
    assert run(planted("failing", "dying", "broken", "good"), folder) == 1
    assert ran(folder) == ["bad", "after", "dies", "next", "one", "three"]
    assert record(folder, "failing").reasons("failed") == {"bad": "ArithmeticError: planted"}
    assert record(folder, "dying").reasons("failed") == {"dies": "ended with exit status 7"}
    assert record(folder, "dying").complete
    assert record(folder, "broken").ended == "ended with exit status 1"
    assert "no parts" in (folder / "broken.log").read_text()
    assert "failing, bad: ArithmeticError: planted" in (folder / page.NAME).read_text()


def test_what_hangs_costs_its_own_limit_and_a_later_call_goes_on(planted, tmp_path):
    folder = tmp_path / "out"
    hanging, good = planted("hanging", seconds=6.0) + planted("good")
    assert run([hanging, good], folder) == 1
    assert ran(folder) == ["quick", "hang", "one", "three"]
    assert record(folder, "hanging").reasons("failed") == {"hang": "cut off after 6 s"}
    assert not subprocess.run(["pgrep", "-f", "^sleep 1000$"], capture_output=True).stdout
    assert run([hanging, good], folder) == 1
    assert ran(folder) == ["quick", "hang", "one", "three", "late"]  # it had its time


def test_a_part_begun_late_is_tried_again(planted, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    origin = device.origin(rehearse=True)
    late = {"seconds": 0.1, "failed": "cut off after 20 s", "cut": True}
    Record(
        folder / "good.json", asdict(origin), {"one": late, "three": {**late, "seconds": 15}}, ended="cut off"
    ).write()
    assert run(planted("good"), folder) == 1
    assert ran(folder) == ["one"]


def test_time_that_is_left_goes_to_what_ran_out_of_it(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "WORTH", 1.0)
    folder = tmp_path / "out"
    steps = planted("slow", seconds=5.0) + planted("good")
    assert run(steps, folder) == 0
    parts = ran(folder)
    assert sorted(parts) == sorted([*map(str, range(8)), "one", "three"])
    assert parts.index("one") < parts.index("7")
    assert record(folder, "slow").complete


def test_a_limit_is_that_of_all_calls(planted, tmp_path):
    """Called again and again for a few minutes, a long step does not eat what the steps after it need."""
    folder = tmp_path / "out"
    folder.mkdir()
    origin = asdict(device.origin(rehearse=True))
    Record(folder / "slow.json", origin, {"0": {"seconds": 1, "result": 0}}, ended=OUT_OF_TIME, seconds=20.0).write()
    assert run(planted("slow", "good"), folder) == 0
    assert ran(folder) == ["one", "three", *map(str, range(1, 8))]


def test_one_command_at_a_time_and_no_room(planted, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    with command._alone(tmp_path):
        assert run(planted("good"), tmp_path) == 2
    assert f"another command is at work in {tmp_path}" in capsys.readouterr().err

    def full(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "write", full)
    assert run(planted("good"), folder) == 2
    assert capsys.readouterr().err == "benchmarks gpu: [Errno 28] No space left on device\n"
    (tmp_path / "file").write_text("")
    assert run(planted("good"), tmp_path / "file") == 2
    assert "File exists" in capsys.readouterr().err


KILLED = """
import sys
from benchmarks.gpu import command
from benchmarks.gpu.steps import Step
steps = [Step(name, f"planted:{name}", 60, "planted", 60) for name in ("slow", "good")]
sys.exit(command.main(["--rehearse", "--minutes", "2", "--out", sys.argv[1]], steps))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_started_again_it_goes_on(how, planted, tmp_path):
    planted()
    folder = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(device.ROOT), str(tmp_path)])}
    start = lambda: subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=env, stdout=subprocess.DEVNULL)  # noqa: E731
    first = start()
    deadline = time.monotonic() + 60
    while not (folder / "ran").exists() or len(ran(folder)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(how)
    assert first.wait(20) == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    before = len(ran(folder))
    time.sleep(1.0)  # a child whose parent has gone ends too, at once
    assert len(ran(folder)) <= before + 1
    known = record(folder, "slow").parts
    time.sleep(1.0)
    assert record(folder, "slow").parts == known
    assert start().wait(60) == 0
    parts = ran(folder)
    assert set(parts) == {*map(str, range(8)), "one", "three"}
    assert len(parts) <= 11  # what was at work when it ended is done again, no more


def test_bad_input_is_one_sentence(planted, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    steps = planted("good")

    def refused(*arguments):
        assert command.main([*arguments, "--out", str(folder)], steps) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("benchmarks gpu: ")
        return said

    monkeypatch.setattr(device, "cuda_device", lambda: None)
    assert "there is no CUDA device" in refused()
    assert "--minutes 0.1 is less than the first step, good, may take; give 0.33 or more" in refused(
        "--rehearse", "--minutes", "0.1"
    )
    assert "--minutes nan" in refused("--rehearse", "--minutes", "nan")
    assert run(steps, folder) == 0
    monkeypatch.setattr(device, "cuda_device", lambda: "NVIDIA H1000")
    assert "holds results of device no CUDA device, and this is NVIDIA H1000; give another --out" in refused()
    monkeypatch.setattr(device, "commit", lambda: "0123456789ab")
    known = record(folder, "good")
    known.origin["commit"] = "ba9876543210"
    known.write()
    assert "holds results of commit ba9876543210, and this is 0123456789ab" in refused("--rehearse")
    monkeypatch.setattr(device, "source_digest", lambda: "0")
    known.origin["commit"] = None  # a tree without its history
    known.write()
    assert "holds results of source" in refused("--rehearse")
    (folder / "good.json").write_text("{}")
    assert "is no record of a step" in refused("--rehearse")
    with pytest.raises(SystemExit):
        command.main(["--steps", "goad"], steps)


def test_outcomes_of_pytest_are_read_from_what_it_prints():
    plain = """
tests/test_a.py::test_one[x-1] PASSED                                    [ 20%]
tests/test_a.py::test_two FAILED                                         [ 40%]
tests/test_a.py::test_gru[y] SKIPPED (no device)                         [ 60%]
tests/test_a.py::test_four ERROR                                         [ 80%]
"""
    workers = """
[gw0] [ 20%] PASSED tests/test_a.py::test_one[x-1]
[gw3] [ 40%] FAILED tests/test_a.py::test_two
[gw0] [ 60%] SKIPPED tests/test_a.py::test_gru[y]
[gw1] [ 80%] ERROR tests/test_a.py::test_four
"""
    for output in (plain, workers):
        found = correctness.outcomes(output)
        assert found == {
            "failed": ["tests/test_a.py::test_two", "tests/test_a.py::test_four"],
            "passed": 1,
            "skipped": 1,
        }


def test_a_kernel_that_fails_is_off(tmp_path):
    there = type("There", (), {})()
    tests = {
        "kernels of torch": {"failed": ["t.py::test_rounds[gru-3]"], "passed": 9},
        "kernels of cupy": {"failed": [], "passed": 9},
        "races in the kernels of cupy": {"errors": 2},
        "kernels of jax": {"failed": [], "passed": 3},
        **{f"every kernel of {lib} once": "exercised" for lib in ("torch", "cupy", "jax")},
    }
    there.results = lambda step: tests
    lstm = ["torch.lstm_rounds", "torch.lstm_low_rank_rounds"]
    assert correctness.passed(there) == ["torch.suffix_scan", "torch.low_rank_scan", *lstm, "jax.suffix_scan"]
    tests["kernels of torch"]["failed"] = ["t.py::test_rounds[directions-lstm-3]"]
    left_out = {"torch.lstm_low_rank_rounds", "cupy.suffix_scan"}
    assert correctness.passed(there) == [name for name in _kernels.NAMES if name not in left_out]
    tests["kernels of torch"]["failed"] = ["t.py::test_scan[3]"]
    tests["front end of jax, kernels all"] = {"failed": ["a", "b"]}
    tests["front end of jax, kernels off"] = {"failed": ["b"]}
    assert correctness.passed(there) == []
    tests["front end of jax, kernels off"]["failed"].append("a")  # not the kernels' fault
    assert correctness.passed(there) == ["jax.suffix_scan"]
    for name in ("kernels of jax", "every kernel of jax once"):  # untested
        kept = tests.pop(name)
        assert correctness.passed(there) == []
        tests[name] = kept


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("exercised 4 calls\n========= ERROR SUMMARY: 0 errors", {"errors": 0, "in other kernels": 0}),
        ("at gemm_sm90\nexercised 4 calls\n========= ERROR SUMMARY: 3 errors", {"errors": 0, "in other kernels": 3}),
        (
            "at scan_kernel+0x10\nexercised 4 calls\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)",
            "2 errors",
        ),
        ("exercised 4 calls\n========= Error: Device not supported", "memcheck ended with 0"),
        ("========= ERROR SUMMARY: 0 errors", "memcheck ended with 0"),
    ],
)
def test_what_the_sanitizer_says_is_heard(said, found, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if isinstance(found, dict):
        assert correctness._sanitized(("memcheck",), "torch") == found
    else:
        with pytest.raises((WrongError, RuntimeError), match=found):
            correctness._sanitized(("memcheck",), "torch")


H200 = Place("sm_90", "float32", 16385, 4096)


def planted_results(folder):
    """Results as a device would leave them: tuned at one size, timed at two."""
    origin = {"device": "NVIDIA H200", "commit": "0123456789ab", "source": "0"}

    def write(step, results):
        Record(folder / f"{step}.json", origin, {n: {"seconds": 1, "result": r} for n, r in results.items()}).write()

    where = {"family": "sm_90", "versions": {}, "missing": [], "unusable": {}, "processor": "", "cores": 1}
    where |= {"minutes": 9.0, "fitting": ["machine"]}
    write("machine", {"environment": where})
    found = {"kernel": "torch.suffix_scan", "dtype": "float32", "states": 16385, "channels": 4096}
    write("search", {"one": {**found, "settings": {"warps": 8}, "ms": 1.0, "guessed_ms": 2.0, "tried": []}})

    def row(method, T, ms, **more):
        case = {"T": T, "B": 8, "D": 512}
        base = {
            "table": "scan",
            "case": case,
            "method": method,
            "library": "torch",
            "k": None,
            "chunk": None,
            "ours": True,
        }
        times = {"forward_ms": None, "backward_ms": None, "whole_ms": ms, "copy_fraction": 0.5, "first_ms": 1.0}
        return {**base, **times, "error": 1e-7, "cosine": 1.0, "failed": None, "exact": True, **more}

    plain = "Hillis-Steele (the paper's)"
    write(
        "scan",
        {
            "long": [row(plain, 16384, [3.0, 2.9, 3.1]), row("hbp (kernels)", 16384, [1.0, 0.9, 1.1])],
            "short": [row(plain, 64, [1.0, 0.9, 1.1]), row("hbp (kernels)", 64, [1.0, 0.8, 1.05])],
        },
    )


def test_defaults_follow_from_what_was_measured(tmp_path, monkeypatch):
    planted_results(tmp_path)
    long, short = rows = defaults.measured(tmp_path)
    source = str(tmp_path / "scan.json")
    assert long == Measured("torch.suffix_scan", H200, True, source, {"warps": 8})
    assert (short.place, short.faster, short.settings) == (replace(H200, states=65), False, {})
    assert _measured.TABLE == ()
    (row,) = defaults.searched(tmp_path)  # was compared with other block sizes alone
    assert (row.place, row.faster, row.settings) == (H200, False, {"warps": 8})
    assert eval(defaults.source(rows).split(" = ")[1], {"Measured": Measured, "Place": Place}) == rows
    text = page.write(tmp_path)[0].read_text()
    assert text.count("Measured(") == 2
    assert "Of the 9 minutes of the first call there was room for the whole limits of machine;" in text
    monkeypatch.setattr(_measured, "TABLE", rows)
    assert _measured.settings("torch.suffix_scan", replace(H200, states=30000)) == {"warps": 8}
    for name, place in (
        ("torch.suffix_scan", replace(H200, states=100_000)),
        ("torch.suffix_scan", replace(H200, dtype="bfloat16")),
        ("torch.suffix_scan", replace(H200, device="sm_80")),
        ("cupy.suffix_scan", H200),
    ):
        assert _measured.nearest(name, place) is None


def test_a_table_of_measurements_turns_kernels_on(monkeypatch):
    kernels = _kernels.Kernels("torch", "_numba", "json", ("suffix_scan", "gru_rounds"))
    module = type("Module", (), {"suffix_scan": "scan", "gru_rounds": "rounds"})
    monkeypatch.setattr(_kernels, "import_module", lambda name: module)

    def found(level, place=H200):
        monkeypatch.setenv(_kernels.VARIABLE, level)
        kernels._loaded.cache_clear()
        return [kernels.find(name, lambda: place) for name in ("suffix_scan", "gru_rounds", "lstm_rounds")]

    assert found("auto") == found("off") == found("jax.suffix_scan") == [None, None, None]
    assert found("all") == ["scan", "rounds", None]
    assert found("torch.gru_rounds,jax.suffix_scan") == [None, "rounds", None]
    assert kernels.state() == "json: gru rounds"
    row = Measured("torch.suffix_scan", H200, True, "here")
    monkeypatch.setattr(_measured, "TABLE", (row,))
    assert found("auto") == ["scan", None, None]
    assert kernels.state() == "json: suffix scan (where measured faster)"
    assert found("auto", replace(H200, states=70)) == [None, None, None]
    monkeypatch.setattr(_measured, "TABLE", (replace(row, faster=False),))
    assert found("auto") == [None, None, None]
    assert kernels.state().startswith("plain (unmeasured")
    kernels._loaded.cache_clear()
    with pytest.raises(ValueError, match=r"names of torch\.suffix_scan, torch\.low_rank_scan"):
        found("torch.suffix_scam")


def test_the_steps_are_those_of_the_command(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = capsys.readouterr().out
    assert all(step.name in said for step in STEPS)
    assert sum(step.seconds for step in STEPS) <= 25 * 60
    json.dumps([asdict(step) for step in STEPS])


def test_what_decides_comes_first():
    cases = speed.rnn_cases()
    assert [case["B"] for case in cases[:18]] == [1] * 18
    assert {case["T"] for case in cases[:18]} == {1024, 4096, 16384}
    assert max(case["T"] * case["B"] * case["H"] for case in cases) <= speed.LARGEST


def test_loops_over_very_many_steps_are_not_timed(tmp_path, monkeypatch):
    timed = {}

    def rows(there, table, case, found, methods):
        timed[case["T"], case.get("dtype")] = {method.name for method in methods({**case, "B": 1, "D": 1}, found[0])}

    monkeypatch.setattr(speed, "libraries", lambda there: [library("numpy")])
    monkeypatch.setattr(speed, "IN_TURN", (("numpy",),))
    monkeypatch.setattr(speed, "LOOPS", {"loop over steps, in place": 16384})
    monkeypatch.setattr(speed, "_rows", rows)
    for part in speed.scan(There(tmp_path, device.origin(rehearse=True), rehearse=False, deadline=0.0, end=0.0)):
        part.run()
    plain = {T: names for (T, dtype), names in timed.items() if dtype != "bfloat16"}
    assert {T for T, names in plain.items() if "loop over steps, in place" in names} == {256, 1024, 4096, 16384}
    assert all("hbp" in names for names in plain.values())


def test_what_is_missing_for_tables_is_one_sentence(monkeypatch, capsys):
    def missing(module):
        raise ModuleNotFoundError(module, name="matplotlib" if module == "benchmarks.report" else module)

    monkeypatch.setattr(everything, "import_module", missing)
    assert everything.main(["report", "folder"]) == 2
    assert capsys.readouterr().err == "benchmarks: matplotlib is not installed; pip install matplotlib rich\n"
    with pytest.raises(ModuleNotFoundError):
        everything.main(["gpu"])
