"""Train a residual net of many small layers on scikit-learn's digits in JAX, with optax, for several k.

All layers' parameters are stacked on axis 0, and `hb.sequential` runs them; k is static, so each compiles once.
Needs: pip install "hbp[jax,demo]" optax

    python examples/digits_jax.py --layers 24 --iterations 1 2 4
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import hbp.backends.jax as hb

TEST, BATCH, WIDTH = 360, 64, 32


def start(key: Any, layers: int) -> dict[str, Any]:
    keys = jax.random.split(key, 4)
    scale = {"into": (64, WIDTH), "up": (layers, WIDTH, WIDTH), "down": (layers, WIDTH, WIDTH), "out": (WIDTH, 10)}
    return {
        name: jax.random.normal(k, size) / size[-2] ** 0.5 for k, (name, size) in zip(keys, scale.items(), strict=True)
    }


def layer(own: dict[str, Any], x: Any) -> Any:
    """One layer, skip included: pre-norm, two products."""
    normed = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
    return x + 0.3 * jax.nn.relu(normed @ own["up"]) @ own["down"]


def logits(params: dict[str, Any], images: Any, iterations: int | None) -> Any:
    stacked = {name: params[name] for name in ("up", "down")}
    return hb.sequential(layer, stacked, images @ params["into"], iterations=iterations) @ params["out"]


def loss(params: dict[str, Any], images: Any, labels: Any, iterations: int | None) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images, iterations), labels).mean()


def train(iterations: int | None, layers: int, epochs: int) -> tuple[float, float]:
    """The test accuracy and the mean loss of the last epoch."""
    images, labels = (jnp.asarray(array) for array in load_digits(return_X_y=True))
    images = (images / 16).astype(jnp.float32)
    params, optimiser = start(jax.random.key(0), layers), optax.adam(1e-3)
    state = optimiser.init(params)

    @jax.jit
    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradient = jax.value_and_grad(partial(loss, iterations=iterations))(params, images, labels)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    for epoch in range(epochs):
        order = TEST + jax.random.permutation(jax.random.key(epoch), len(labels) - TEST)
        batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        losses = []
        for batch in batches:
            params, state, value = step(params, state, images[batch], labels[batch])
            losses.append(float(value))
    correct = logits(params, images[:TEST], None).argmax(-1) == labels[:TEST]
    return float(correct.mean()), sum(losses) / len(losses)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 4], help="Highway-BP's k")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args(arguments)
    rows = []
    for k in (None, *given.iterations):
        accuracy, last = train(k, given.layers, given.epochs)
        rows.append({"k": k, "accuracy": round(accuracy, 4), "loss": last})
        print(json.dumps(rows[-1]))
    return rows


if __name__ == "__main__":
    main()
