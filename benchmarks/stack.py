"""Stacks of small residual layers: x + tanh(x U) W, the gradients of all parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library, Method, kept
from benchmarks.rnn import CHUNK, ITERATIONS
from hbp.backends._array import NumpyLike

CASES = {
    "quick": [{"L": 64, "d": d, "B": B} for d, B in ((32, 4), (128, 32))],
    "full": [{"L": L, "d": d, "B": B} for L in (64, 256) for d in (32, 128) for B in (4, 32)],
}
GPU_CASES = [{"L": L, "d": d, "B": B} for d, B in ((64, 4), (256, 4), (256, 32)) for L in (64, 256, 512)]
CHECK = {"L": 160, "d": 4, "B": 3}


WAYS = {False: {"": None}, True: {"": True, ", layer by layer": False}}
"""How PyTorch pulls layers back, by whether it is on a GPU: as hbp chooses, or all at once and one by one."""


@kept
def problem(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """U and W, (L, d, d), the input and the cotangent of the output, (B, d), float32."""
    rng, (length, size) = np.random.default_rng(0), (case["L"], case["d"])
    weights = rng.standard_normal((2, length, size, size)) / np.sqrt(size) * [[[[1.0]]], [[[0.3]]]]
    x, dy = rng.standard_normal((2, case["B"], size))
    return tuple(np.ascontiguousarray(a, dtype=np.float32) for a in (*weights, x, dy))  # type: ignore[return-value]


def _blocks(u: Any, w: Any) -> list[Any]:
    """The blocks for hbp's core: x -> (y, pullback)."""

    def block(u: Any, w: Any) -> Any:
        def run(x: Any) -> Any:
            t = np.tanh(x @ u)
            return t @ w, lambda g: ((g @ w.T) * (1 - t * t)) @ u.T

        return run

    return [block(*pair) for pair in zip(u, w, strict=True)]


def _gradients(u: Any, w: Any, states: list[Any], g: Any) -> list[np.ndarray]:
    """Of each layer's U and W, from its input and the cotangent of its output."""
    found = []
    for own_u, own_w, x, dy in zip(u, w, states, g, strict=True):
        t = np.tanh(x @ own_u)
        found += [x.T @ ((dy @ own_w.T) * (1 - t * t)), t.T @ dy]
    return found


def _pull(u: Any, w: Any, x: Any, dy: Any, how: dict[str, Any], residual: Any, backend: Any = None) -> Any:
    states = [x]
    for own_u, own_w in zip(u, w, strict=True):
        states.append(states[-1] + np.tanh(states[-1] @ own_u) @ own_w)
    _, chain = hbp.linearize(_blocks(u, w), x, residual=hbp.Identity(), backend=backend)
    if residual is not None:
        chain = chain.resplit(residual)
    exact = how["iterations"] is None
    g = hbp.backprop(chain, dy, backend=backend) if exact else hbp.highway(chain, dy, backend=backend, **how)
    return _gradients(u, w, states[:-1], g[1:])


def reference(case: dict[str, Any], method: Method | None = None, lib: Library | None = None) -> np.ndarray:
    """The gradient in float64 by the core on NumPy arrays: exact, or a method's own iterate."""
    how = {"iterations": method.k if method else None, "chunk": (method.chunk if method else None) or 1}
    residual = hbp.Zero() if method is not None and "fixed point" in method.name else None
    arrays = [a.astype(np.float64) for a in problem(case)]
    return np.concatenate([d.ravel() for d in _pull(*arrays, how, residual, NumpyLike("numpy", np))])


def product_flops(case: dict[str, Any], method: Method) -> int:
    """Of the products a backward pass must compute: both weights' gradients, and the pullbacks of each round."""
    count = 4 if method.k is None else 3 + 2 * (method.k + 2 * ((method.chunk or 1) > 1))
    return 2 * case["L"] * case["B"] * case["d"] ** 2 * count


def _variants() -> Iterator[tuple[str, int | None, int, Any]]:
    for chunk in (1, CHUNK):
        for k in ITERATIONS:
            yield "Highway-BP", k, chunk, None
    for k in (1, 3, 10):
        yield "fixed point", k, 1, hbp.Zero()


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """Every way to the gradient in a library: autodiff of the loop over layers, Highway-BP and the fixed point."""
    arrays = [lib.array(a) for a in problem(case)]
    if lib.name in ("torch", "jax"):
        yield from (_torch if lib.name == "torch" else _jax)(case, lib, *arrays)


def _torch(case: dict[str, Any], lib: Library, u: Any, w: Any, x: Any, dy: Any) -> Iterator[Method]:
    import torch

    class Layer(torch.nn.Module):
        def __init__(self, u: Any, w: Any) -> None:
            super().__init__()
            self.u, self.w = torch.nn.Parameter(u.clone()), torch.nn.Parameter(w.clone())

        def forward(self, x: Any) -> Any:
            return x + torch.tanh(x @ self.u) @ self.w

    def method(name: str, stack: Any, run: Any = None, **what: Any) -> Method:
        own = list(stack.parameters())
        return Method(name, lib, run or (lambda: stack(x)), lambda y: torch.autograd.grad(y, own, dy), **what)

    layers = [Layer(*pair) for pair in zip(u, w, strict=True)]
    plain = torch.nn.Sequential(*layers)
    yield method("torch autograd", plain)
    for name, k, chunk, residual in _variants():
        for way, stacked in WAYS[lib.on_gpu].items():
            stack = lib.front_end.Sequential(*layers, iterations=k, chunk=chunk, residual=residual, stacked=stacked)
            yield method(name + way, stack, k=k, chunk=chunk, ours=residual is None, exact=False)


def _jax(case: dict[str, Any], lib: Library, u: Any, w: Any, x: Any, dy: Any) -> Iterator[Method]:
    import jax
    import jax.numpy as jnp

    def layer(params: Any, x: Any) -> Any:
        return x + jnp.tanh(x @ params[0]) @ params[1]

    def method(name: str, run: Any, **what: Any) -> Method:
        forward = jax.jit(lambda params, x: jax.vjp(lambda params: run(params, x), params))
        backward = jax.jit(lambda pull, dy: pull(dy)[0])

        def by_layer(found: Any) -> Any:
            return [part for pair in zip(*found, strict=True) for part in pair]

        start = ((u, w), x)
        return Method(name, lib, lambda: forward(*start), lambda s: backward(s[1], dy), finish=by_layer, **what)

    yield method("jax.lax.scan", lambda params, x: jax.lax.scan(lambda x, p: (layer(p, x), None), x, params)[0])
    for name, k, chunk, residual in _variants():
        extra = {} if residual is None else {"residual": residual}
        run = lambda params, x, k=k, chunk=chunk, extra=extra: lib.front_end.sequential(  # noqa: E731
            layer, params, x, iterations=k, chunk=chunk, **extra
        )
        yield method(name, run, k=k, chunk=chunk, ours=residual is None, exact=False)
