"""Pre-LN transformer blocks of GPT-2-small's width at batch 1: the gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library, Method, kept, library
from benchmarks.stack import WAYS

CASES = {
    "quick": [{"L": 8, "d": 128, "heads": 4, "T": 64}],
    "full": [{"L": 12, "d": 768, "heads": 12, "T": T} for T in (64, 256)],
}
GPU_CASES = [{"L": L, "d": 768, "heads": 12, "T": T} for L, T in ((12, 128), (48, 128), (12, 1024))]
CHECK = {"L": 5, "d": 8, "heads": 2, "T": 6}
ITERATIONS = (1, 3)
SHAPES = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
"""A block's matrices, in widths; the norms have no parameters."""


@kept
def problem(case: dict[str, Any]) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """The matrices, (L, rows, columns) each, drawn as GPT-2's; input and cotangent (T, d); float32."""
    rng, (length, d) = np.random.default_rng(0), (case["L"], case["d"])
    scale = {"qkv": 1.0, "up": 1.0, "out": (2 * length) ** -0.5, "down": (2 * length) ** -0.5}
    weights = tuple(
        (rng.standard_normal((length, m * d, n * d)) * scale[name] / np.sqrt(n * d)).astype(np.float32)
        for name, (m, n) in SHAPES.items()
    )
    x, dy = rng.standard_normal((2, case["T"], d)).astype(np.float32)
    return weights, x, dy


def _torch_block(weights: Any, x: Any, heads: int) -> Any:
    """x (T, d) through causal attention and a perceptron, each after a norm and beside the residual path."""
    from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

    qkv, out, up, down = weights
    size = x.shape[-1]
    q, k, v = (layer_norm(x, (size,)) @ qkv.T).view(-1, 3, heads, size // heads).permute(1, 2, 0, 3)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + mixed.transpose(0, 1).reshape(-1, size) @ out.T
    return x + gelu(layer_norm(x, (size,)) @ up.T) @ down.T


def reference(case: dict[str, Any], method: Method | None = None, lib: Library | None = None) -> Any:
    """The gradient in float64, exact or a method's own iterate, by PyTorch's vjp of each block and hbp's core."""
    import torch

    weights, x, dy = problem(case)
    if lib is None or lib.name != "torch":
        lib = replace(library("torch"), array=torch.from_numpy, on_gpu=False)
    wide = [lib.array(w.astype(np.float64)) for w in weights]
    layers = [[w[i] for w in wide] for i in range(case["L"])]

    def run(own: Any) -> Callable[[Any], Any]:
        return lambda x: torch.func.vjp(lambda x: _torch_block(own, x, case["heads"]), x)

    def layer(own: Any) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            y, pull = run(own)(x)
            return y, lambda g: pull(g)[0]

        return call

    states = [lib.array(x.astype(np.float64))]
    for own in layers:
        states.append(_torch_block(own, states[-1], case["heads"]))
    _, chain = hbp.linearize_layers([layer(own) for own in layers], states[0], residual=hbp.Identity())
    cotangent = lib.array(dy.astype(np.float64))
    if method is None or method.k is None:
        g = hbp.backprop(chain, cotangent)
    else:
        g = hbp.highway(chain, cotangent, iterations=method.k, chunk=method.chunk or 1)
    found = []
    for own, state, row in zip(layers, states, g[1:], strict=False):
        pull = torch.func.vjp(lambda *own, state=state: _torch_block(own, state, case["heads"]), *own)[1]
        found.append(pull(row))
    return lib.vector([torch.stack(of_all) for of_all in zip(*found, strict=True)])


def product_flops(case: dict[str, Any], method: Method) -> int:
    """Of the matrices' products that a backward pass must compute; the attention's own are not counted."""
    count = 2 if method.k is None else 1 + method.k + 1 + 2 * ((method.chunk or 1) > 1)
    return 2 * case["L"] * case["T"] * 12 * case["d"] ** 2 * count


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """Autodiff of the loop over blocks, and Highway-BP with and without chunks."""
    weights, x, dy = problem(case)
    arrays = tuple(lib.array(w) for w in weights), lib.array(x), lib.array(dy)
    if lib.name in ("torch", "jax"):
        yield from (_torch if lib.name == "torch" else _jax)(case, lib, *arrays)


def _torch(case: dict[str, Any], lib: Library, weights: Any, x: Any, dy: Any) -> Iterator[Method]:
    import torch

    class Block(torch.nn.Module):
        def __init__(self, own: Any) -> None:
            super().__init__()
            self.own = torch.nn.ParameterList([w.clone() for w in own])

        def forward(self, x: Any) -> Any:
            return _torch_block(list(self.own), x, case["heads"])

    def by_matrix(found: Any) -> Any:
        return [torch.stack(found[i :: len(SHAPES)]) for i in range(len(SHAPES))]

    def method(name: str, stack: Any, **what: Any) -> Method:
        own = list(stack.parameters())
        backward = lambda y: torch.autograd.grad(y, own, dy)  # noqa: E731
        return Method(name, lib, lambda: stack(x), backward, finish=by_matrix, **what)

    layers = [Block([w[i] for w in weights]) for i in range(case["L"])]
    yield method("torch autograd", torch.nn.Sequential(*layers))
    for k, chunk in [(k, 1) for k in ITERATIONS] + [(1, 4)]:
        for way, stacked in WAYS[lib.on_gpu].items():
            stack = lib.front_end.Sequential(*layers, iterations=k, chunk=chunk, stacked=stacked)
            yield method(f"Highway-BP{way}", stack, k=k, chunk=chunk, ours=True, exact=False)


def _jax(case: dict[str, Any], lib: Library, weights: Any, x: Any, dy: Any) -> Iterator[Method]:
    import jax
    import jax.numpy as jnp

    heads, size = case["heads"], case["d"]

    def norm(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def layer(own: Any, x: Any) -> Any:
        qkv, out, up, down = own
        q, k, v = (norm(x) @ qkv.T).reshape(-1, 3, heads, size // heads).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(size // heads)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
        x = x + (jax.nn.softmax(scores) @ v).transpose(1, 0, 2).reshape(-1, size) @ out.T
        return x + jax.nn.gelu(norm(x) @ up.T, approximate=False) @ down.T

    def method(name: str, run: Any, **what: Any) -> Method:
        forward = jax.jit(lambda weights, x: jax.vjp(lambda weights: run(weights, x), weights))
        backward = jax.jit(lambda pull, dy: pull(dy)[0])
        return Method(name, lib, lambda: forward(weights, x), lambda state: backward(state[1], dy), **what)

    yield method("jax.lax.scan", lambda w, x: jax.lax.scan(lambda x, own: (layer(own, x), None), x, w)[0])
    for k, chunk in [(k, 1) for k in ITERATIONS] + [(1, 4)]:
        run = lambda w, x, k=k, chunk=chunk: lib.front_end.sequential(layer, w, x, iterations=k, chunk=chunk)  # noqa: E731
        yield method("Highway-BP", run, k=k, chunk=chunk, ours=True, exact=False)
