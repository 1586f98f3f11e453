"""The models that have a version in JAX: recurrent ones and the residual MLP.

ResNets and transformers have none: their stages or sub-layers differ in shape, and a stack of `hbp.backends.jax` has
layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.data.examples import IGNORED, Array, Task
from experiments.models import sizes as s
from experiments.models.jax import recurrent, residual


class Model(NamedTuple):
    """A model as two functions."""

    init: Callable[[int], Any]
    """From a seed to parameters, a pytree of float32."""
    apply: Callable[..., Any]
    """``apply(params, *batch.inputs, solver=hbp.Solver(...))`` to logits or numbers; the solver is static.

    Recurrent models take ``rank=``, too, or ``residual=``, another residual map than hbp's own.
    """


def build(sizes: s.Sizes) -> Model:
    """The model of these sizes.

    Raises:
        ValueError: there is none in JAX.
    """
    modules: dict[type, Any] = {
        s.RecurrentLM: recurrent.language_model,
        s.RecurrentClassifier: recurrent.classifier,
        s.ResidualMLP: residual.mlp,
    }
    if type(sizes) not in modules:
        known = ", ".join(kind.__name__ for kind in modules)
        raise ValueError(f"{type(sizes).__name__} has no version in JAX, only {known} have; give backend='torch'")
    return Model(*(partial(part, sizes) for part in modules[type(sizes)]))


def trained(params: Any) -> int:
    """How many parameters there are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def loss(task: Task, outputs: Array, targets: Array) -> Array:
    """The task's loss, a mean over all targets that count."""
    if task.loss == "squared error":
        return ((outputs - targets) ** 2).mean()
    counted = targets != IGNORED
    chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, chosen, 0).sum() / counted.sum()


def validate(task: Task, apply: Callable[..., Any], params: Any, batches: Any) -> dict[str, float]:
    """Mean loss over all targets of the batches, and the task's metric; ``apply`` may be compiled."""
    total, correct, count = 0.0, 0, 0
    for inputs, targets in batches:
        outputs = apply(params, *inputs)
        counted = targets.size if task.loss == "squared error" else int((targets != IGNORED).sum())
        total += float(loss(task, outputs, targets)) * counted
        correct += int((outputs.argmax(-1) == targets).sum()) if task.metric == "accuracy" else 0
        count += counted
    mean = total / count
    found = {"accuracy": correct / count, "perplexity": float(jnp.exp(mean)), "loss": mean}
    return {"loss": mean, task.metric: found[task.metric]}
