"""The experiments' models in JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import hbp
from experiments.data import Adding, Batch, Digits, StandardLibrary
from experiments.models import RecurrentClassifier, RecurrentLM, ResidualMLP, build
from experiments.settings import problem

jax = pytest.importorskip("jax")
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
