"""Whole training steps in JAX: the plain program, what ``iterations=None`` takes, and Highway-BP.

Run ``python benchmarks/jax_steps.py gru`` (or stack, compile). Milliseconds of a compiled gradient, medians of
interleaved runs after compilation, with the cosine between Highway-BP's gradient and the exact one.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

import hbp
import hbp.backends.jax as hb

KS = (None, 1, 3, 5)


def interleaved(programs: dict[Any, Any], given: tuple[Any, ...], runs: int) -> tuple[dict[Any, float], dict[Any, Any]]:
    """Median milliseconds of each program, and what it returns."""
    found = {name: jax.block_until_ready(program(*given)) for name, program in programs.items()}
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            start = perf_counter()
            jax.block_until_ready(program(*given))
            times[name].append(1e3 * (perf_counter() - start))
    return {name: median(own) for name, own in times.items()}, found


def cosine(a: Any, b: Any) -> float:
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def row(name: str, programs: dict[Any, Any], given: tuple[Any, ...], runs: int) -> None:
    ms, found = interleaved(programs, given, runs)
    cells = [f"{ms[k]:.1f} ({cosine(found[k], found['plain']):.3f})" for k in KS]
    print(f"| {name} | {ms['plain']:.1f} | {' | '.join(cells)} |", flush=True)


def gru(runs: int) -> None:
    for steps, batch, hidden in product((1024, 4096), (1, 8), (64, 256)):
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = ((3 * hidden, hidden), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
        scale = hidden**-0.5
        params = hbp.cells.GRUParameters(
            *(
                jax.random.uniform(key, shape, minval=-scale, maxval=scale)
                for key, shape in zip(keys[:4], shapes, strict=True)
            )
        )
        xs = jax.random.normal(keys[4], (steps, batch, hidden))

        def plain(params: Any, xs: Any) -> Any:
            inputs = xs @ params.weight_ih.T + params.bias_ih

            def step(h: Any, a: Any) -> Any:
                b = h @ params.weight_hh.T + params.bias_hh
                (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
                r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
                n = jnp.tanh(an + r * bn)
                h = n + z * (h - n)
                return h, h

            h = jax.lax.scan(step, jnp.zeros((xs.shape[1], xs.shape[2])), inputs)[1]
            return jnp.square(h).mean()

        def ours(params: Any, xs: Any, k: int | None) -> Any:
            h = hb.gru(params, xs, jnp.zeros((xs.shape[1], xs.shape[2])), iterations=k)[1]
            return jnp.square(h).mean()

        programs = {"plain": jax.jit(jax.grad(plain)), **{k: jax.jit(jax.grad(partial(ours, k=k))) for k in KS}}
        row(f"T = {steps}, B = {batch}, H = {hidden}", programs, (params, xs), runs)


def block(own: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ own["in"]) @ own["out"]


def layers(length: int, width: int) -> Any:
    keys = jax.random.split(jax.random.key(0))
    shape = (length, width, width)
    return {name: jax.random.normal(key, shape) / width for name, key in zip(("in", "out"), keys, strict=True)}


def stack(runs: int) -> None:
    for length, width, batch in product((64, 128), (32, 64), (4, 32)):
        params, x = layers(length, width), jax.random.normal(jax.random.key(1), (batch, width))

        def plain(params: Any, x: Any) -> Any:
            return jnp.square(jax.lax.scan(lambda x, own: (block(own, x), None), x, params)[0]).mean()

        def ours(params: Any, x: Any, k: int | None) -> Any:
            return jnp.square(hb.sequential(block, params, x, iterations=k)).mean()

        programs = {"plain": jax.jit(jax.grad(plain)), **{k: jax.jit(jax.grad(partial(ours, k=k))) for k in KS}}
        row(f"L = {length}, d = {width}, B = {batch}", programs, (params, x), 10 * runs)


def compilation(_: int) -> None:
    """Seconds to trace and compile a gradient, against depth, k and chunk."""

    def loss(params: Any, x: Any, k: int | None, chunk: int) -> Any:
        return jnp.square(hb.sequential(block, params, x, iterations=k, chunk=chunk)).sum()

    cases = ((64, None, 1), (64, 1, 1), (1024, 1, 1), (64, 5, 1), (64, 10, 1), (64, 40, 1), (1024, 3, 4), (1024, 3, 32))
    for length, k, chunk in cases:
        start = perf_counter()
        gradient = jax.jit(jax.grad(partial(loss, k=k, chunk=chunk)))
        gradient.lower(layers(length, 32), jnp.ones((4, 32))).compile()
        print(f"| L = {length}, k = {k}, chunk = {chunk} | {perf_counter() - start:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["gru", "stack", "compile"])
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, ms (cosine)")
    print("| | plain | None | k = 1 | k = 3 | k = 5 |\n|---|---:|---:|---:|---:|---:|")
    {"gru": gru, "stack": stack, "compile": compilation}[given.what](given.runs)


if __name__ == "__main__":
    main()
