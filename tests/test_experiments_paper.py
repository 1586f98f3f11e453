"""The ``paper`` preset: each of its nine problems starts, trains and stops, by the command, on files in real formats.

Shrunk are, beside the data: all batches, to 2 examples; RoBERTa, whose sizes are those of the pre-trained model that
lies in the folder; and the values of k, to one. All other models have the paper's sizes, texts and images theirs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import data_sets
import pytest

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib")
pytest.importorskip("rich", reason="the experiments show their progress with rich")
pytest.importorskip("threadpoolctl", reason="the experiments limit threads with threadpoolctl")
pytest.importorskip("torch", reason="the paper's preset trains with PyTorch")
pytest.importorskip("transformers", reason="RoBERTa is that of transformers")

from experiments import fig2, fig4, settings, training
from experiments.__main__ import main
from experiments.settings import PAPER, Problem

FIGURES: Any = {"fig2": fig2, "fig4": fig4}
LENGTHS = {
    "resnet32": 15, "resnet110": 54, "resnet56": 27, "gpt2": 24, "roberta": 4,
    "lstm": 256, "gru": 256, "gru3": 256, "pixels": 1024,
}  # fmt: skip
"""L of table 2, and of the small RoBERTa."""
K = 1


def in_pairs(made: Any) -> Problem:
    """The problem at a batch of 2."""
    return replace(made(), training=replace(made().training, batch=2))


@pytest.fixture
def folder(hub, rng, monkeypatch):
    """All data sets of the paper, and a training of each that costs little."""
    data_sets.cifar10(hub, rng)
    data_sets.imagenet32(hub, rng)
    data_sets.wikitext(hub, times=8)
    data_sets.roberta(hub, positions=130)
    data_sets.mnli(hub)
    monkeypatch.setattr(settings, "PAPER", {name: partial(in_pairs, made) for name, made in PAPER.items()})
    monkeypatch.setattr(training, "PROBED", (0, K))
    for module in FIGURES.values():
        monkeypatch.setitem(module.AXES, "paper", dict.fromkeys(module.CLAIMS, ((K,), ())))
    for cached in (training._data, training._parameters):
        cached.cache_clear()
    yield hub
    for cached in (training._data, training._parameters):
        cached.cache_clear()


def test_there_are_no_others():
    assert {*fig2.CLAIMS, *fig4.CLAIMS} == set(PAPER)


@pytest.mark.parametrize("name", FIGURES)
def test_the_papers_problems_start_train_and_stop(folder, tmp_path, capsys, name):
    out = tmp_path / "out"
    given = ["--preset", "paper", "--steps", "2", "--seeds", "1", "--data", str(folder), "--out", str(out)]
    assert main([name, *given]) == 0, capsys.readouterr().err
    for task in FIGURES[name].CLAIMS:
        problem = PAPER[task]()
        layers = problem.sizes.layers if name == "fig4" else 1  # recurrent ones, one after another
        for method, steps in (("exact", LENGTHS[task]), (f"highway.k={K}", K + 1)):
            record = json.loads((out / "records" / f"{task}+{method}+0.json").read_text())
            assert record["finished"], task
            assert record["curve"]["step"] == [1, 2], task
            assert record["validation"]["step"] == [0, 1, 2], task
            assert None not in (*record["curve"]["loss"], *record["validation"]["loss"]), task
            assert (record["data"], record["length"]) == (problem.task.title, LENGTHS[task])
            assert record["block_steps"] == 2 * layers * steps, task


def test_made_up_examples_are_like_the_tasks_own(folder):
    for name, made in PAPER.items():
        task = made().task
        own, likewise = (next(data.train.batches(2, 0)) for data in (task.load(folder), task.made_up(3)))
        pairs = list(zip((*own.inputs, own.targets), (*likewise.inputs, likewise.targets), strict=True))
        assert [(x.shape, x.dtype) for x, _ in pairs] == [(x.shape, x.dtype) for _, x in pairs], name
        assert likewise.targets.min() >= 0, name
        assert likewise.targets.max() < task.outputs, name
