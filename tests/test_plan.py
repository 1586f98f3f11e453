"""hbp plan: its formulas against an event simulation, its advice, its table and its picture."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from typing import Any

import pipelines
import pytest

from hbp import cli
from hbp.planning import Costs, Link, Plan, Settings, Step

SIZES = list(product((1, 2, 3, 5, 8), (1, 2, 3, 5, 8, 13)))
TABLE = {  # GPipe, best exact, Highway-BP with k = 1 and with k = 3, where F = Bi = Bw = 1
    (8, 1): (24, 16.5, 11, 13),
    (8, 2): (13.5, 8.8, 7.5, 9.5),
    (8, 4): (8.3, 4.9, 5.8, 7.8),
    (8, 8): (5.6, 3.4, 4.9, 6.9),
    (16, 1): (48, 32.5, 19, 21),
    (16, 2): (25.5, 16.8, 11.5, 13.5),
    (16, 4): (14.3, 8.9, 7.8, 9.8),
    (16, 8): (8.6, 4.9, 5.9, 7.9),
    (64, 1): (192, 128.5, 67, 69),
    (64, 2): (97.5, 64.8, 35.5, 37.5),
    (64, 4): (50.3, 32.9, 19.8, 21.8),
    (64, 8): (26.6, 16.9, 11.9, 13.9),
}
UNIT = Costs(1, 1, 1)
FREE = Link(1, 0)
drawn = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


def interleaved(P: int, M: int, pieces: int) -> pipelines.Lists:
    schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    return pipelines.of_torch(schedules.ScheduleInterleavedZeroBubble, P, M, pieces)


def durations(costs: Costs, M: int, pieces: int = 1) -> dict[str, float]:
    f, b, w = (cost / (M * pieces) for cost in (costs.forward, costs.pull, costs.weights))
    return {"F": f, "I": b, "W": w, "B": b + w}


def in_rounds(costs: Costs, M: int, exchange: float = 0.0) -> dict[str, float]:
    """Of Highway-BP: only the forward goes in microbatches."""
    return {"F": costs.forward / M, "X": exchange, "P": costs.pull, "W": costs.weights}


@pytest.mark.parametrize(("P", "M"), TABLE)
def test_the_table_of_unit_costs(P, M):
    gpipe, best, *highway = TABLE[P, M]
    step = Step(UNIT, FREE, P, M)
    assert (
        step.gpipe()
        == pipelines.simulated(pipelines.gpipe(P, M), durations(UNIT, M))
        == pytest.approx(gpipe, abs=0.051)
    )
    assert step.zero_bubble() == pytest.approx(best, abs=0.051)
    assert step.zero_bubble() <= min(step.gpipe(), step.one_f_one_b(), step.put_off())
    for k, expected in zip((1, 3), highway, strict=True):
        assert step.highway(k) == pytest.approx(expected, abs=0.051)
        assert step.highway(k) == pipelines.simulated(pipelines.highway(P, M, k), in_rounds(UNIT, M))


@pytest.mark.parametrize(("P", "M"), TABLE)
def test_the_best_exact_schedule_of_the_table_is_torchs(P, M):
    found = pipelines.simulated(interleaved(P, M, 2), durations(UNIT, M, 2))
    assert found == pytest.approx(TABLE[P, M][1], abs=0.051)
    assert Step(UNIT, FREE, P, M).zero_bubble() == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("latency", [0.0, 0.3])
def test_formulas_are_what_a_simulation_takes(latency, rng):
    for P, M in SIZES:
        costs = Costs(*rng.uniform(0.5, 2, 3), state_bytes=600.0, outside=rng.uniform(0, 2))
        step = Step(costs, Link(2000.0, latency), P, M)
        hop, exchange = latency + 600 / M / 2000, min(latency + 0.3 * (P - 1), 2 * latency + 0.6 * (P - 1) / P)
        expected = {
            Step.gpipe: pipelines.simulated(pipelines.gpipe(P, M), durations(costs, M), hop),
            Step.put_off: pipelines.simulated(pipelines.gpipe(P, M, "IW"), durations(costs, M), hop),
            Step.one_f_one_b: pipelines.simulated(pipelines.one_f_one_b(P, M), durations(costs, M), hop),
        }
        if M < P:  # PyTorch refuses it
            assert step.one_f_one_b() == math.inf
            del expected[Step.one_f_one_b]
        for schedule, time in expected.items():
            assert schedule(step) == pytest.approx(time + costs.outside, rel=1e-12)
        for k in range(P + 1):
            time = pipelines.simulated(pipelines.highway(P, M, k), in_rounds(costs, M, exchange if P > 1 else 0), hop)
            assert step.highway(k) == pytest.approx(time + costs.outside, rel=1e-12)
        assert step.highway(P + 5) == step.highway(P)


@pytest.mark.parametrize("pieces", [1, 2])
def test_zero_bubble_is_torchs_action_list_replayed(pieces, rng):
    for P, M in SIZES:
        if P == 1 or M % max(1, M // P):
            continue  # PyTorch asks for whole rounds
        for small in (True, False):
            f, b = rng.uniform(0.8, 2, 2)
            w = min(f, b) * rng.uniform(0.3, 1) if small else max(f, b)
            costs, lists = Costs(f, b, w, pieces=pieces), interleaved(P, M, pieces)
            found, replayed = (
                Step(costs, FREE, P, M).zero_bubble(),
                pipelines.simulated(lists, durations(costs, M, pieces)),
            )
            if small or pieces == 1:
                assert found == pytest.approx(replayed, rel=1e-12)
            assert replayed / 1.1 < found <= replayed * (1 + 1e-12)
            if small:  # a hop hides behind weight gradients at best
                hop = 0.1 * f / M
                delayed = Step(costs, Link(1, hop), P, M).zero_bubble()
                assert found < delayed <= pipelines.simulated(lists, durations(costs, M, pieces), hop) * (1 + 1e-12)
    H1 = Costs(1.5, 2, 1, pieces=1)
    assert Step(H1, FREE, 4, 8).zero_bubble() == pytest.approx(1.5 + 2 + 1 + 3 * (1.5 + 2 - 1) / 8)  # 2401.10241


def test_one_stage_is_one_process():
    step = Step(Costs(2, 3, 1, state_bytes=10), Link(1, 5), 1, 4)
    assert {step.gpipe(), step.one_f_one_b(), step.put_off(), step.zero_bubble(), step.highway(0)} == {6}


def test_our_list_of_1f1b_is_torchs():
    schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    for P, M in ((2, 2), (4, 4), (4, 8), (3, 7)):
        ours, theirs = pipelines.one_f_one_b(P, M), pipelines.of_torch(schedules.Schedule1F1B, P, M, 1)
        for rank in range(P - 1):  # in torch 2.13 the last one's begins with microbatch 1
            assert ours[rank] == theirs[rank]


def test_the_faster_exchange_is_taken():
    assert Link(1e9, 1e-3).exchange(1e3, 8) == pytest.approx(1e-3 + 7e-6)  # all-gather
    assert Link(50e9, 0).exchange(33e6, 16) == pytest.approx(1.2375e-3)  # all-to-all and back
    for size, P in product((1e3, 1e6, 1e9), (2, 3, 4, 16, 64)):
        link = Link(10e9, 20e-6)
        assert link.exchange(size, P) <= math.ceil(math.log2(P)) * link.hop(size)  # Hillis-Steele


# What a plan says


def planned(stages: Any, microbatches: Any, iterations: Any = (1, 3), costs: Costs = UNIT, **options: Any) -> Plan:
    settings = Settings(stages, microbatches, iterations, bandwidth=1, latency=0)
    return Plan(settings, dict.fromkeys(settings.stages, costs), **options)


def test_highway_pays_where_microbatches_are_few():
    for row in planned((4, 8, 16, 32), (1, 2, 4, 8, 16), iterations=(1,)).rows:
        margin = (row.stages - 1) / 2 / row.microbatches  # it wins where M <= (P - 1) / (k + 1)
        if not 0.8 < margin < 1.3:
            assert (row.gain > 1) == (margin > 1), row


def test_many_microbatches_are_told_to_use_1f1b():
    assert planned((2, 4), (16, 32)).advice == "P = 2, 4: use 1F1B or, faster, zero bubble: no k is worth its error."
    assert planned((16,), (8,), iterations=(3,)).advice == "P = 16: use zero bubble: no k is worth its error."


def test_only_a_k_within_the_target_is_advised():
    errors = {(P, k): error for P in (8, 64) for k, error in ((1, 0.2), (3, 0.01))}
    found = planned((8, 64), (1, 2, 8), errors=errors, within=frozenset({(64, 3)})).advice
    assert found == (
        "P = 8: use 1F1B or, faster, zero bubble: no k tried is within the target error; "
        "P = 64: use Highway-BP with k = 3 (up to 1.9 times as fast as the best exact schedule)."
    )
    some = planned((16,), (1, 2, 8), errors={(16, 1): 0.01, (16, 3): 0.0}, within=frozenset({(16, 1), (16, 3)}))
    assert some.advice == (
        "P = 16: use Highway-BP with k = 1 where M = 1, 2 (up to 1.7 times as fast as the best exact schedule), "
        "else zero bubble (with M = 8 the fastest of all)."
    )
    assert "which hb.plan measures" in planned((64,), (1,)).advice


def test_one_stage_needs_no_schedule():
    assert planned((1,), (1, 4)).advice == "P = 1: one device holds all layers, and backprop as ever is the fastest."


def test_a_gain_too_small_is_no_advice():
    """At P = 16, M = 4 and k = 1: 8.875 by zero bubble, 7.75 by Highway-BP, and much more outside of the stages."""
    found = planned((16,), (4,), iterations=(1,), costs=Costs(1, 1, 1, outside=18))
    assert 1 < found.rows[0].gain < 1.05
    assert "no k is worth" in found.advice


def test_the_table_shows_every_time_and_error():
    errors = {(8, 1): 0.25, (8, 3): 0.013}
    lines = str(planned((8,), (1, 8), errors=errors, within=frozenset({(8, 3)}))).splitlines()
    assert lines[0].split() == ["P", "M", "GPipe", "1F1B", "put", "off", "zero", "bubble", "k", "=", "1", "k", "=", "3"]
    assert lines[1].split() == ["8", "1", "24", "-", "17", "16.5", "11", "13*"]
    assert lines[2].split() == ["8", "8", "5.625", "5.625", "4.75", "3.438*", "4.875", "6.875"]
    assert lines[3].split() == ["8", "error", "0.25", "0.013"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1].startswith("P = 8: ")


@drawn
def test_a_plot_is_written(tmp_path):
    planned((2, 4), (1, 8)).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"stages": (0, 2)}, ValueError, "stages=0 is too small; give an integer of at least 1"),
        ({"stages": 4}, TypeError, r"stages=4; give several integers of at least 1, as \(2, 4, 8\)"),
        ({"stages": (2.5,)}, TypeError, "stages=2.5 is a float; give an integer"),
        ({"microbatches": (0,)}, ValueError, "microbatches=0 is too small"),
        ({"microbatches": ()}, ValueError, "microbatches is empty; give at least one"),
        ({"iterations": (-1,)}, ValueError, "iterations=-1 is too small; give an integer of at least 0"),
        ({"bandwidth": 0}, ValueError, "bandwidth=0; give a finite number above 0"),
        ({"bandwidth": math.inf}, ValueError, "bandwidth=inf; give a finite number above 0"),
        ({"latency": -1e-6}, ValueError, "latency=-1e-06; give a finite number of at least 0"),
        ({"latency": "fast"}, ValueError, "latency='fast'; give a finite number"),
        ({"target": math.nan}, ValueError, "target=nan; give a finite number"),
    ],
)
def test_settings_refuse(options, error, said):
    given = {"stages": (2,), "microbatches": (1,), "iterations": (1,), "bandwidth": 1, "latency": 0} | options
    with pytest.raises(error, match=said):
        Settings(**given)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ((0, 1, 1), "forward=0; give a finite number above 0"),
        ((1, math.nan, 1), "pull=nan; give a finite number above 0"),
        ((1, 1, -1), "weights=-1; give a finite number of at least 0"),
        ((1, 1, True), "weights=True; give a finite number"),
        ((1, 1, 1, math.inf), "state_bytes=inf; give a finite number of at least 0"),
        ((1, 1, 1, 0, 0, 3), "pieces=3; give 1 or 2"),
    ],
)
def test_costs_refuse(costs, said):
    with pytest.raises(ValueError, match=said):
        Costs(*costs)


# The command line


def test_plan_prints_the_table_and_ends_with_the_advice(capsys):
    arguments = ["plan", "--stages", "8", "64", "--microbatches", "1", "8", "--iterations", "1", "3"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{planned((8, 64), (1, 8))}\n"
    arguments += ["--forward", "2", "--pull", "3", "--weights", "1.5", "--state-bytes", "600"]
    assert cli.main([*arguments, "--bandwidth", "2000", "--latency", "0.25"]) == 0
    step = Step(Costs(2, 3, 1.5, 600), Link(2000, 0.25), 8, 8)
    assert f"{step.put_off():.4g}" in capsys.readouterr().out


@drawn
def test_plan_draws(tmp_path, capsys):
    assert cli.main(["plan", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"wrote {tmp_path / 'plan.png'}"
    assert "use " in printed[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "0"], "'0' is not an integer of at least 1"),
        (["--microbatches", "0"], "'0' is not an integer of at least 1"),
        (["--iterations", "-1"], "'-1' is not an integer of at least 0"),
        (["--forward", "0"], "hbp: forward=0.0; give a finite number above 0"),
        (["--pull", "nan"], "hbp: pull=nan; give a finite number above 0"),
        (["--weights", "-1"], "hbp: weights=-1.0; give a finite number of at least 0"),
        (["--weights", "much"], "invalid float value: 'much'"),
        (["--bandwidth", "0"], "hbp: bandwidth=0.0; give a finite number above 0"),
        (["--latency", "inf"], "hbp: latency=inf; give a finite number of at least 0"),
        pytest.param(["--plot", "/nowhere/plan.png"], "there is no folder '/nowhere'", marks=drawn),
    ],
)
def test_plan_refuses_with_status_2(arguments, said, capsys):
    try:
        status = cli.main(["plan", *arguments])
    except SystemExit as end:  # argparse's own
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert said in printed.err


def test_plan_loads_no_other_library():
    code = (
        "import sys; from hbp.cli import main; assert main(['plan']) == 0; "
        "assert not {'torch', 'jax', 'cupy', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
