"""Ways to do a training step of recurrent layers in JAX, where a step loop is compiled: it is the library's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Library, Method
from benchmarks.rnn import jax_step
from experiments.layers import HIGHWAY, ITERATIONS, LAYER, OURS, Case, stacked


def methods(case: Case, lib: Library) -> Iterator[Method]:
    """`jax.lax.scan`, and hbp's layers."""
    given, x, dy = case.problem()
    weights, x, dy = jax.tree.map(jnp.asarray, given), jnp.asarray(x), jnp.asarray(dy)
    zero = jnp.zeros_like(x[0])
    start = zero if case.cell == "gru" else (zero, zero)
    ours = getattr(lib.front_end, case.cell)

    def method(name: str, layer: Callable[[Any, Any], Any], **what: Any) -> Method:
        def run(weights: Any) -> Any:
            y = x
            for params in weights:
                y = stacked(layer(params, y), y, case.layers)
            return y

        forward = jax.jit(lambda weights: jax.vjp(run, weights))
        backward = jax.jit(lambda pull, dy: jax.tree.leaves(pull(dy)))
        return Method(name, lib, lambda: forward(weights), lambda state: backward(state[1], dy), **what)

    def scanned(params: Any, x: Any) -> Any:
        inputs = x @ params.weight_ih.T + params.bias_ih
        return jax.lax.scan(lambda carry, row: jax_step(params, carry, row), start, inputs)[1]

    def layer(k: int | None) -> Callable[[Any, Any], Any]:
        return lambda params, x: ours(params, x, start, iterations=k)[1]

    yield method(LAYER, scanned)
    yield method(OURS, layer(None))
    for k in ITERATIONS:
        yield method(HIGHWAY, layer(k), k=k, exact=False)
