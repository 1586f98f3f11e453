"""Training runs: what is recorded, that an interrupted one goes on bit for bit, and the sections made of them."""

from __future__ import annotations

import itertools
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib")
pytest.importorskip("rich", reason="the experiments show their progress with rich")
pytest.importorskip("threadpoolctl", reason="the experiments limit threads with threadpoolctl")
pytest.importorskip("sklearn", reason="the experiments learn scikit-learn's digits")

from experiments import catalog, estimates, folder, performing, settings, training
from experiments.__main__ import main
from experiments.data import Adding, Digits
from experiments.experiment import Experiment, Request, Section
from experiments.methods import EXACT, LIBRARY, Backward, Diagnosed, Estimated, Phases, block_steps
from experiments.models import RecurrentClassifier, ResidualMLP, ResNet
from experiments.settings import Problem, Training
from experiments.training import Run
from hbp.demo.threads import limited

BACKEND = pytest.mark.parametrize("backend", ["torch"])
STEPS = 12
COUNT = itertools.count()
TINY = {
    "rnn": Problem(
        "rnn", Adding(20, examples=64), RecurrentClassifier("gru", 2, 1, 8), Training("adam", 1e-2, STEPS, 4)
    ),
    "mlp": Problem("mlp", Digits(), ResidualMLP(3, 8), Training("sgd", 0.1, STEPS, 8, clip=1.0)),
    "resnet": Problem("resnet", Digits(), ResNet(1, True, 2, 1), Training("adamw", 1e-2, STEPS, 8)),
}
METHODS = [
    ("rnn", EXACT),
    ("rnn", LIBRARY),
    ("rnn", Backward("highway", Phases((0, 2, None)))),
    ("rnn", Backward("highway", 20, tolerance=0.3, rank="auto")),
    ("rnn", Backward("highway", Diagnosed(0.2))),
    ("mlp", Backward("highway", 1, damping=Estimated(per_layer=True))),
    ("mlp", Backward("highway", 1, damping=0.3)),
    ("resnet", Backward("fixed-point", 2)),
]


class Place:
    """Where work is done, until it is killed."""

    def __init__(self, checkpoint: Path, killed_at: int | None = None) -> None:
        checkpoint.parent.mkdir(exist_ok=True)
        self.checkpoint, self.killed_at = checkpoint, killed_at

    def advance(self, done: int, total: int, text: str = "") -> None:
        if done == self.killed_at:
            raise KeyboardInterrupt


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(settings, "LAPTOP", {name: partial(replace, one) for name, one in TINY.items()})
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    for cached in (training._data, training._parameters):
        cached.cache_clear()
    yield
    for cached in (training._data, training._parameters):
        cached.cache_clear()


def numbers(record: Any) -> Any:
    """A record without its times."""
    if isinstance(record, dict):
        return {name: numbers(value) for name, value in record.items() if name != "seconds"}
    return [numbers(one) for one in record] if isinstance(record, list) else record


@pytest.mark.parametrize(("task", "method"), METHODS, ids=lambda value: getattr(value, "key", value))
def test_an_interrupted_run_ends_with_the_same_numbers(tiny, tmp_path, task, method):
    run = Run(task, method, seed=1)
    whole = run.perform(Place(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run.perform(Place(tmp_path / "part", killed_at=7))
    assert (tmp_path / "part").exists()
    assert numbers(run.perform(Place(tmp_path / "part"))) == numbers(whole)
    assert whole["finished"]
    assert whole["curve"]["step"] == list(range(1, STEPS + 1))
    assert whole["validation"]["step"] == list(range(STEPS + 1))
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert numbers(replace(run, seed=2).perform(Place(tmp_path / "other"))) != numbers(whole)


WIDER = replace(TINY["rnn"], sizes=RecurrentClassifier("gru", 2, 1, 9))
FASTER = replace(TINY["rnn"], training=Training("adam", 1.0, STEPS, 4))


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (WIDER, "sizes.hidden 8 instead of 9, embed.weight (8, 2) instead of (9, 2), embed.bias (8,) instead of (9,) "
                "and 7 more"),
        (FASTER, "training.rate 0.01 instead of 1.0"),
        (None, "UnpicklingError: pickle data was truncated"),
    ],
    ids=["sizes", "rate", "broken"],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_one_sentence(tiny, tmp_path, monkeypatch, capsys, now, why):
    run = Run("rnn", EXACT, 0)
    one = Experiment("one", "One", lambda request: [run], lambda request, records: Section())
    monkeypatch.setattr(catalog, "MODULES", ("one",))
    monkeypatch.setitem(sys.modules, "experiments.one", SimpleNamespace(EXPERIMENT=one))
    checkpoint = tmp_path / "out/checkpoints/rnn+exact+0"
    folder.Folder(tmp_path / "out").open(Request())
    with pytest.raises(KeyboardInterrupt):
        run.perform(Place(checkpoint, killed_at=7))
    if now is None:
        checkpoint.write_bytes(pickle.dumps({"extra": 1})[:-3])
    else:
        monkeypatch.setitem(settings.LAPTOP, "rnn", lambda: now)
    before = checkpoint.read_bytes()
    assert main(["one", "--out", str(tmp_path / "out")]) == 1
    told = f"{checkpoint} does not fit this run ({why}); give another --out, or delete that file to begin anew"
    assert capsys.readouterr().err.splitlines()[-1] == f"experiments: {told}"
    assert checkpoint.read_bytes() == before
    checkpoint.unlink()
    assert main(["one", "--out", str(tmp_path / "out")]) == 0


def test_all_parts_of_a_run_are_counted(tiny, tmp_path, monkeypatch):
    clock = itertools.count()  # a second between any two looks
    for module in (training, performing):
        monkeypatch.setattr(module, "perf_counter", lambda: float(next(clock)))
    there, run, parts = folder.Folder(tmp_path), Run("rnn", EXACT, 0), []
    there.open(Request())

    import torch

    def show(key: str, done: int, total: int, text: str) -> None:
        if done in (4, 8) and len(parts) < done / 4:
            parts.append(torch.load(there.checkpoint(run.key), weights_only=False)["extra"].performed)
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            performing.perform(run, there, 1, show)
    began = next(clock)
    performing.perform(run, there, 1, show)
    last = next(clock) - began
    assert 0 < 1.5 * parts[0] < parts[1]
    assert json.loads(there.record(run.key).read_text())["performed_s"] == parts[1] + last - 2  # without my two looks


def test_methods_do_what_they_say(tiny, tmp_path):
    def loss(task: str, method: Backward) -> float:
        return Run(task, method, 0).perform(Place(tmp_path / "unused" / str(next(COUNT))))["validation"]["loss"][-1]

    exact = loss("rnn", EXACT)
    assert loss("rnn", LIBRARY) == pytest.approx(exact, rel=1e-4)
    assert loss("rnn", Backward("highway", 20)) == pytest.approx(exact, rel=1e-4)
    assert loss("rnn", Backward("highway", 0, rank=8)) == pytest.approx(exact, rel=1e-4)  # of H = 8: all there is
    assert loss("rnn", Backward("fixed-point", 20)) == pytest.approx(exact, rel=1e-4)
    assert loss("mlp", Backward("highway", 3, damping=0.7)) == pytest.approx(loss("mlp", EXACT), rel=1e-4)
    different = [
        Backward("highway", 0),
        Backward("fixed-point", 0),
        Backward("highway", 0, chunk=5),
        Backward("highway", 0, rank=2),
    ]
    found = [loss("rnn", method) for method in different]
    assert len({round(value, 6) for value in [exact, *found]}) == 5


def test_what_a_trainer_needs_is_named(tiny, monkeypatch):
    for name in ("jax", "optax"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"training with --backend jax needs (jax|optax): pip install \1$"):
        Run("rnn", EXACT, 0, backend="jax").check()


def test_both_clocks(tiny, tmp_path):
    def record(method: Backward) -> Any:
        return Run("rnn", method, 0).perform(Place(tmp_path / "unused" / str(next(COUNT))))

    assert record(EXACT)["block_steps"] == 20 * STEPS
    assert record(Backward("highway", 3))["block_steps"] == 4 * STEPS
    assert record(Backward("highway", Phases((1, None))))["block_steps"] == 2 * 6 + 20 * 6
    tolerant = record(Backward("highway", 20, tolerance=0.1))
    assert tolerant["block_steps"] == STEPS * (1 + tolerant["rounds_mean"])
    assert 0 < tolerant["rounds_mean"] < 20
    seconds = tolerant["curve"]["seconds"]
    assert seconds == sorted(seconds)
    assert seconds[-1] == tolerant["seconds"] > 0
    assert [block_steps(10, k, 4, True) for k in (0, 1, 3, 9)] == [8, 12, 20, 20]


def test_a_run_that_is_not_finite_ends_there(tiny, tmp_path, monkeypatch):
    wild = replace(TINY["mlp"], training=Training("sgd", 1e30, STEPS, 8))
    monkeypatch.setitem(settings.LAPTOP, "mlp", lambda: wild)
    record = Run("mlp", EXACT, 0).perform(Place(tmp_path / "unused" / str(next(COUNT))))
    assert not record["finished"]
    assert record["curve"]["loss"][-1] is None
    assert len(record["curve"]["step"]) < STEPS
    json.dumps(record, allow_nan=False)


def test_probes_compare_with_the_exact_gradient(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PROBED_TASKS", ("mlp",))
    record = Run("mlp", EXACT, 0).perform(Place(tmp_path / "unused" / str(next(COUNT))))
    assert [probe["share"] for probe in record["probes"]] == [0, 0.25, 0.5, 0.75, 1]
    for probe in record["probes"]:
        assert probe["k"] == list(training.PROBED)
        exact = [error for k, error in zip(probe["k"], probe["error"], strict=True) if k >= 3]
        assert max(exact) < 1e-5 < probe["error"][0]
        assert probe["cosine"][-1] == pytest.approx(1)
    monkeypatch.setattr(training, "PROBED_TASKS", ())
    plain = Run("mlp", EXACT, 0).perform(Place(tmp_path / "unused" / str(next(COUNT))))
    assert numbers(plain["curve"]) == numbers(record["curve"])  # a probe leaves no trace


KILLED = """
import sys
from experiments import training
training.CHECKPOINT_S = 0.0
training.PROBED_TASKS = ()
from experiments.__main__ import main
main(sys.argv[1:])
"""


def test_a_killed_command_goes_on_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(training, "PROBED_TASKS", ())
    arguments = ["chunks", "--seeds", "1", "--steps", "40"]
    there = [*arguments, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *there], cwd=Path(__file__).parents[1])
    checkpoint, deadline = tmp_path / "killed/checkpoints/pixels+exact+0", time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    run = Run("pixels", EXACT, 0, steps=40)
    with limited(1):  # as the command has it: on more threads sums are rounded otherwise
        found = run.perform(Place(checkpoint))
        assert numbers(found) == numbers(run.perform(Place(tmp_path / "unused" / str(next(COUNT)))))


@pytest.fixture
def shrunk(monkeypatch):
    """Every task of the laptop at a size at which nothing is learned."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    small = {"width": 4, "hidden": 8, "heads": 2, "layers": 1, "blocks": 1}

    def shrink(one: Problem) -> Problem:
        sizes = one.sizes
        own = {name: value for name, value in small.items() if hasattr(sizes, name)}
        own |= {"layers": 2} if "layers" in own and getattr(sizes, "layers", 1) > 1 else {}
        text = {"size": 100_000} if hasattr(one.task, "size") else {}
        training = replace(one.training, batch=2)
        return replace(one, task=replace(one.task, **text), sizes=replace(sizes, **own), training=training)

    monkeypatch.setattr(settings, "LAPTOP", {name: partial(shrink, one()) for name, one in settings.LAPTOP.items()})
    monkeypatch.setattr(training, "VALIDATED", {"accuracy": 4, "perplexity": 4, "loss": 4})


def test_all_sections_are_made_from_records_alone(shrunk, tmp_path):
    given = ["--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    names = [
        name for name in catalog.MODULES if all(isinstance(w, Run) for w in catalog.experiment(name).work(Request()))
    ]
    assert main([*names, *given]) == 0
    page = (tmp_path / "README.md").read_text()
    for name in names:
        assert f'<a id="{name}"></a>' in page
        assert catalog.experiment(name).title in page
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {f"{name}.png" for name in names} <= pictures
    assert all(f"]({picture})" in page for picture in pictures)


@pytest.fixture
def unseen():
    """No model has been looked at."""
    estimates.sketched.cache_clear()
    yield
    estimates.sketched.cache_clear()


def test_the_papers_models_are_estimated_by_one_short_look_at_each(unseen, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from experiments.models import build
    from experiments.models.torch import trained

    looks: list[int] = []
    monkeypatch.setattr(estimates, "quickest", lambda trainer, count: looks.append(trainer.parameters) or 2.0)
    rounds = {EXACT: 0, Backward("highway", 3): 3, Backward("highway", Phases((1, None))): 1}
    with torch.device("meta"):
        for name, made in settings.PAPER.items():
            found = [Run(name, method, 0, "paper", steps=1000).estimate() for method in rounds]
            sizes = made().sizes
            count = trained(build(replace(sizes, pretrained=None) if name == "roberta" else sizes))
            assert [one["parameters"] for one in found] == [count] * 3, name
            few = 4 if name in ("lstm", "gru", "gru3", "pixels") else 1
            seconds = 1000 * made().training.batch * 2.0 / few
            assert [one["seconds"] for one in found] == pytest.approx([seconds * (1 + k / 3) for k in rounds.values()])
    assert len(looks) == len(settings.PAPER)


def test_a_dry_run_of_the_papers_preset_needs_no_data(unseen, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(estimates, "quickest", lambda trainer, count: trainer.fetch() or trainer.step(0).loss)
    assert main(["chunks", "--preset", "paper", "--seeds", "1", "--dry-run", "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if "│" in line]
    assert [row[1:5] for row in rows] == [["1", "29834", "2500", "0.48"]] * 8
    assert "8 pieces of work, about" in told
    assert told.endswith(f"seconds are estimated by {estimates.HOW}\n")
    assert not list(tmp_path.iterdir())
