"""The residual MLP on hbp's stack for JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import hbp
import hbp.backends.jax as hb
from experiments.models import sizes as s
from experiments.models.jax.drawing import Drawn, linear


def _norm(x: Any, params: tuple[Any, Any]) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale, shift = params
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def _norm_params(*shape: int) -> tuple[Any, Any]:
    return jnp.ones(shape), jnp.zeros(shape)


def _layer(params: Any, x: Any) -> Any:
    norm, first, second = params
    return x + linear(second, jax.nn.relu(linear(first, _norm(x, norm))))


def _init(sizes: s.ResidualMLP, seed: int) -> Any:
    drawn, width, count = Drawn(seed), sizes.width, sizes.blocks
    maps = (drawn.linear(width, width, count) for _ in range(2))
    return {
        "stem": drawn.linear(sizes.inputs, width),
        "layers": (_norm_params(count, width), *maps),
        "head": (_norm_params(width), drawn.linear(width, sizes.classes)),
    }


def _apply(sizes: s.ResidualMLP, params: Any, x: Any, solver: hbp.Solver) -> Any:
    flat = linear(params["stem"], x.reshape(len(x), sizes.inputs))
    norm, last = params["head"]
    return linear(last, _norm(hb.sequential(_layer, params["layers"], flat, solver=solver), norm))


mlp = _init, _apply
