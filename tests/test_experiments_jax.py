"""The experiments' models in JAX."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hbp
from experiments import settings, training
from experiments.checkpoints import CheckpointError
from experiments.data import Adding, Batch, Digits, StandardLibrary
from experiments.methods import EXACT, Backward, Diagnosed, Phases
from experiments.models import RecurrentClassifier, RecurrentLM, ResidualMLP, build
from experiments.settings import Problem, Training, problem
from experiments.training import Run

jax = pytest.importorskip("jax")
pytest.importorskip("optax", reason="the experiments train with optax")
jnp = jax.numpy

from experiments.models import jax as models  # noqa: E402 - needs jax


@pytest.mark.parametrize(("name", "count"), [("gru", 1.8e6), ("lstm", 2.3e6), ("gru3", 21.1e6), ("pixels", 29.8e3)])
def test_parameters_of_table_2(name, count):
    model = build(problem(name, "paper").sizes, "jax")
    found = models.trained(jax.eval_shape(lambda: model.init(0)))
    assert found == pytest.approx(count, abs=0.5e-1 * (1e6 if count > 1e6 else 1e3))


SYMBOLS = np.arange(4 * 12).reshape(4, 12) % 17
SMALL = [
    (ResidualMLP(6, 8, inputs=5), (4, 5), 6),
    (RecurrentLM("gru", 20, 8, 2), None, 12),
    (RecurrentLM("lstm", 20, 8, 2), None, 12),
    (RecurrentClassifier("gru", 2, 3, 8), (4, 12, 2), 12),
]


@pytest.mark.parametrize(("sizes", "shape", "length"), SMALL)
def test_gradients_are_exact_from_the_number_of_layers_on(sizes, shape, length, rng):
    model = build(sizes, "jax")
    x = SYMBOLS if shape is None else rng.standard_normal(shape)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(0))

    def gradient(k: int | None) -> Any:
        grads = jax.grad(lambda params: (model.apply(params, x, solver=hbp.Solver(k)) ** 2).sum())(params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    exact = gradient(None)
    errors = [float(jnp.linalg.norm(gradient(k) - exact) / jnp.linalg.norm(exact)) for k in (length, 2, 0)]
    assert errors[0] < 1e-12
    assert errors[1] > 1e-6
    assert errors[2] > errors[1]


def test_an_lstm_may_start_out_to_remember():
    """As in PyTorch: for 2 to T steps, evenly."""
    params = build(RecurrentClassifier("lstm", 2, 1, 400, remembers=50), "jax").init(0)
    enters, forgets = params["layers"][0]["bias_ih"][:800].reshape(2, 400)
    kept = 1 / (1 - jax.nn.sigmoid(forgets))
    assert 2 <= kept.min() < 4 < 48 < kept.max() <= 50.001
    assert abs(kept.mean() - 26) < 3
    assert (enters == -forgets).all()


@pytest.mark.parametrize("name", ["gpt2", "resnet32", "roberta", "llama"])
def test_models_without_a_version_in_jax(name):
    with pytest.raises(ValueError, match=r"has no version in JAX, only RecurrentLM, .* have; give backend='torch'$"):
        build(problem(name).sizes, "jax")


def test_losses_and_metrics():
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], np.float32))
    batches = [Batch((logits,), np.array([[0, -100]])), Batch((logits,), np.array([[1, 1]]))]
    mean, given = -np.log([0.5, 0.25, 0.8]).mean(), lambda params, x: x
    found = partial(models.validate, apply=given, params=None)
    assert found(StandardLibrary(vocabulary=3), batches=batches) == pytest.approx(
        {"loss": mean, "perplexity": np.exp(mean)}
    )
    assert found(Digits(), batches=batches) == pytest.approx({"loss": mean, "accuracy": 2 / 3})
    numbers = [Batch((np.array([[1.0], [2.0]]),), np.array([[1.0], [5.0]]))]
    assert found(Adding(), batches=numbers) == {"loss": 4.5}


TINY = Problem("tiny", Adding(12, examples=32), RecurrentClassifier("gru", 2, 1, 4), Training("adam", 1e-2, 6, 4, 2))


@pytest.fixture
def tiny(monkeypatch):
    """A task of this name, for which each solver takes a second to compile."""
    monkeypatch.setitem(settings.LAPTOP, "tiny", lambda: TINY)
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    return lambda method=EXACT, **what: Run("tiny", method, 0, backend="jax", **what)


class Place:
    """Where work is done, until it is killed."""

    def __init__(self, checkpoint: Path, killed_at: int | None = None) -> None:
        self.checkpoint, self.killed_at = checkpoint, killed_at

    def advance(self, done: int, total: int, text: str = "") -> None:
        if done == self.killed_at:
            raise KeyboardInterrupt


def plain_loss(params: Any, x: Any, targets: Any) -> Any:
    """The tiny model as one writes it with `jax.lax.scan`."""
    (layer,), (weight, bias) = params["layers"], params["embed"]

    def step(h: Any, a: Any) -> Any:
        a, b = a @ layer["weight_ih"].T + layer["bias_ih"], h @ layer["weight_hh"].T
        r, z = jax.nn.sigmoid(a[:, :4] + b[:, :4]), jax.nn.sigmoid(a[:, 4:8] + b[:, 4:8])
        return (1 - z) * jnp.tanh(a[:, 8:] + r * b[:, 8:]) + z * h, None

    h, _ = jax.lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1) @ weight.T + bias)
    (first, shift), (second, last) = params["head"]
    return ((jnp.maximum(h @ first.T + shift, 0) @ second.T + last - targets) ** 2).mean()


def adam(t: int, rate: float, p: Any, m: Any, v: Any) -> Any:
    """Parameters after step t, from both moments."""
    return p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def test_training_is_that_of_a_plain_program(tiny, tmp_path):
    """Same start and batches, autograd's own gradient, and Adam written out."""
    run = tiny()
    params, data = build(TINY.sizes, "jax").init(0), TINY.task.load()
    program, batches = jax.jit(jax.value_and_grad(plain_loss)), data.train.batches(4, 0)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    losses = []
    for step in range(6):
        (x,), targets = next(batches)
        loss, gradient = program(params, x, targets)
        losses.append(float(loss))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        params = jax.tree.map(partial(adam, step + 1, TINY.training.rate_at(step)), params, first, second)
    record = run.perform(Place(tmp_path / "none"))
    np.testing.assert_allclose(record["curve"]["loss"], losses, rtol=1e-5)
    assert record["finished"]
    assert (record["length"], record["block_steps"]) == (12, 6 * 12)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name != "seconds"}
    return [without_times(one) for one in value] if isinstance(value, list) else value


METHODS = {
    Backward("highway", 12, tolerance=0.3): lambda record: 0 < record["rounds_mean"] < 12,
    Backward("fixed-point", Phases((0, None))): lambda record: record["block_steps"] == 3 * 1 + 3 * 12,
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_an_interrupted_run_ends_with_the_same_numbers(tiny, tmp_path, method):
    whole = tiny(method).perform(Place(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        tiny(method).perform(Place(tmp_path / "part", killed_at=3))
    assert without_times(tiny(method).perform(Place(tmp_path / "part"))) == without_times(whole)
    assert METHODS[method](whole)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_a_probe_compares_with_the_exact_gradient(tiny):
    found = tiny().trainer().probe((0, 12))
    assert found["error"][1] < 1e-5 < 1e-3 < found["error"][0]
    assert found["cosine"][0] < found["cosine_of_layers"][1] == pytest.approx(1)
    assert len(found["increments"]) == 13


def test_a_checkpoint_of_another_model_is_one_sentence(tiny, tmp_path, monkeypatch):
    trainer = tiny().trainer()
    trainer.save(tmp_path / "saved", None)
    monkeypatch.setitem(settings.LAPTOP, "tiny", lambda: replace(TINY, sizes=RecurrentClassifier("gru", 2, 1, 5)))
    with pytest.raises(CheckpointError, match=r"saved does not fit this run \(sizes.hidden 4 instead of 5, "):
        tiny().perform(Place(tmp_path / "saved"))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_fixed_point_is_exact_after_all_steps_and_not_before(cell, rng):
    model, x = build(RecurrentClassifier(cell, 2, 3, 4), "jax"), rng.standard_normal((2, 5, 2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(0))

    def gradient(k: int | None, **how: Any) -> Any:
        grads = jax.grad(lambda params: (model.apply(params, x, solver=hbp.Solver(k), **how) ** 2).sum())(params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    exact = gradient(None)
    errors = [float(jnp.linalg.norm(gradient(k, residual=hbp.Zero()) - exact)) for k in (5, 3)]
    assert errors[0] / float(jnp.linalg.norm(exact)) < 1e-12 < 1e-6 < errors[1]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_optimizers_are_pytorchs(kind):
    """By the formulas of its documentation, in NumPy."""
    from experiments.jax_trainer import _optimizer

    own = _optimizer(Training(kind, 0.1, 3, 1, momentum=0.8, beta2=0.9, weight_decay=0.3, clip=1.0))
    p, q, m, v = np.array([1.0, -2.0]), jnp.array([1.0, -2.0]), 0.0, 0.0
    state = own.init(q)
    for t, given in enumerate(([3.0, 4.0], [0.1, -0.2], [1.0, 0.5]), 1):
        found, state = own.update(jnp.array(given), state, q)
        q = q - 0.1 * found
        g = np.array(given) / max(1, np.linalg.norm(given))
        if kind == "sgd":
            m = 0.8 * m + g + 0.3 * p
            p = p - 0.1 * m
        else:
            p = p * (1 - 0.1 * 0.3) if kind == "adamw" else p
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            p = p - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
        np.testing.assert_allclose(q, p, rtol=1e-5)


def test_methods_are_the_splits_they_name():
    from experiments.jax_trainer import _how

    found = [_how(Backward(*given)) for given in (("highway", 1), ("fixed-point", 1), ("highway", 1, 1, None, 8))]
    assert str(found) == "[{}, {'residual': Zero()}, {'rank': 8}]"


def test_what_pytorch_alone_trains_is_one_sentence():
    def refused(task: str, method: Backward = EXACT) -> str:
        with pytest.raises(ValueError, match="give --backend torch") as info:
            Run(task, method, 0, backend="jax").check()
        return str(info.value)

    assert refused("mlp") == "mlp is a model of depth, which only PyTorch trains here; give --backend torch"
    assert refused("gpt2", Backward("highway", 1)).startswith("gpt2 is a model of depth, ")
    for method in (Backward("highway", Diagnosed(0.1)), Backward("highway", 3, rank="auto")):
        assert "needs numbers in the middle of a step" in refused("pixels", method)
