"""Initial parameters as PyTorch draws them, from a generator of NumPy: the same on every device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


class Drawn:
    """Draws arrays, float32."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def uniform(self, bound: float, *shape: int) -> Any:
        return jnp.asarray(self._rng.uniform(-bound, bound, shape), jnp.float32)

    def normal(self, *shape: int) -> Any:
        return jnp.asarray(self._rng.standard_normal(shape), jnp.float32)

    def linear(self, inputs: int, outputs: int, *stacked: int) -> tuple[Any, Any]:
        """Weight (..., outputs, inputs) and bias (..., outputs), of one map or a stack of them."""
        bound = inputs**-0.5
        return self.uniform(bound, *stacked, outputs, inputs), self.uniform(bound, *stacked, outputs)


def linear(params: tuple[Any, Any], x: Any) -> Any:
    """A map from `Drawn.linear`, applied to the last axis."""
    weight, bias = params
    return x @ weight.T + bias
