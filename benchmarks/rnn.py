"""Recurrent layers: forward, backward and whole step, from a loss at every step.

The gradients are those of all parameters and, in cases with ``inputs``, of the inputs, as layers above the first need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library, Method, kept
from benchmarks.scan import Parallel
from hbp.backends._array import NumpyLike

ITERATIONS = (0, 1, 3, 5, 10)
CHUNK = 8


def grid(cells: tuple[str, ...], steps: Any, batches: Any, sizes: Any, most: float = 2.2e9) -> list[dict[str, Any]]:
    """All cases but those whose states times weights are more than ``most``, too many to wait for."""
    return [
        {"cell": cell, "T": T, "B": B, "H": H, "weights": 1.0}
        for cell, H, B, T in product(cells, sizes, batches, steps)
        if most >= T * B * H * H
    ]


PAPER = {"cell": "gru", "T": 256, "B": 128, "H": 512, "weights": 1.0, "setting": "paper"}
"""The shape of the paper's table 6 (one GRU layer), where its setting, a loop over steps, is a row too."""
BOTH = ("gru", "lstm")
CASES = {
    "quick": [
        *grid(BOTH, (1024,), (1, 16), (64,)),
        *grid(BOTH, (1024,), (16,), (256,)),
        {"cell": "gru", "T": 1024, "B": 16, "H": 64, "weights": 3.0},
    ],
    "full": [*grid(BOTH, (256, 1024, 4096), (1, 8, 32), (64, 256)), PAPER],
}
GPU_CASES = [*grid(BOTH, (256, 1024, 4096, 16384), (1, 8, 32, 128), (128, 512), 1.4e11), PAPER]
CHECK = {"T": 240, "B": 2, "H": 5, "weights": 10.0}
"""Weights so large that no two iterates without chunks are alike."""
RANKED, TOLERANT = "Highway-BP, rank 16", "Highway-BP, rank 16, tolerance 0.1"
SPLITS: dict[str, dict[str, Any]] = {
    "fixed point": {"residual": hbp.Zero()},
    RANKED: {"rank": 16},
    TOLERANT: {"rank": 16, "tolerance": 0.1},
}
"""What a method asks for beside k and chunk, by its name."""


@kept
def problem(case: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Parameters as PyTorch draws them, times ``weights``; inputs (T, B, H) and cotangents of all states; float32.

    In cases with ``strong`` directions, so many are added to the recurrent weights, as training on long ranges leaves
    them: half of what a direction gives is along itself, and inputs are smaller.
    """
    rng, size, gates = np.random.default_rng(0), case["H"], 3 if case["cell"] == "gru" else 4
    shapes = ((gates * size, size), (gates * size, size), (gates * size,), (gates * size,))
    bound = case["weights"] / np.sqrt(size)
    params = [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes]
    x, dy = (rng.standard_normal((case["T"], case["B"], size), dtype=np.float32) for _ in range(2))
    if "strong" in case:
        params[1] += _strong(rng, gates * size, size, case["strong"])
        x /= 2
    return params, x, dy


def _strong(rng: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """A weight of some singular values from 6 to 2, where noise as PyTorch draws it ends near 1.6."""
    right, others = (np.linalg.qr(rng.standard_normal((n, count)))[0] for n in (size, rows))
    own = np.zeros((rows, count))
    own[2 * size : 3 * size] = right  # the candidate's rows, of either cell
    found: np.ndarray = ((own + others) * np.geomspace(6, 2, count) / np.sqrt(2)) @ right.T
    return found.astype(np.float32)


def reference(case: dict[str, Any], method: Method | None = None, lib: Library | None = None) -> Any:
    """The gradient in float64, exact or a method's own iterate: by NumPy's plain definitions, or on a GPU."""
    params, x, dy = problem(case)
    plain = NumpyLike("numpy", np) if lib is None else None
    wide = [a.astype(np.float64) if lib is None else lib.array(a.astype(np.float64)) for a in (*params, x, dy)]
    state = 0 * wide[4][0]
    how: dict[str, Any] = {} if method is None else {"iterations": method.k, "chunk": method.chunk or 1}
    how |= SPLITS.get(method.name.removesuffix(" (kernels)"), {}) if method is not None else {}
    if case["cell"] == "gru":
        _, pull = hbp.cells.gru(hbp.cells.GRUParameters(*wide[:4]), wide[4], state, backend=plain)
        found, dx, _ = pull(wide[5], **how)
    else:
        _, pull = hbp.cells.lstm(hbp.cells.LSTMParameters(*wide[:4]), wide[4], (state, state), backend=plain)
        found, dx, _ = pull((wide[5], None), **how)
    found = [*found, dx] if case.get("inputs") else [*found]
    return np.concatenate([d.ravel() for d in found]) if lib is None else lib.vector(found)


def product_flops(case: dict[str, Any], method: Method) -> int:
    """Of the products that a backward pass must compute: for both weights, the inputs, and each round of blocks.

    With a tolerance, of one round, the least that it takes.
    """
    gates = 3 if case["cell"] == "gru" else 4
    rounds = 1 if method.k is None else method.k + 2 * ((method.chunk or 1) > 1)  # stages are filled before and after
    return 2 * case["T"] * case["B"] * gates * case["H"] ** 2 * (2 + rounds + bool(case.get("inputs")))


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """Every way to the gradient in a library: its own layer, the exact adjoint, Highway-BP and the fixed point."""
    params, x, dy = problem(case)
    arrays = [lib.array(a) for a in params], lib.array(x), lib.array(dy)
    yield from {"torch": _torch, "jax": _jax}.get(lib.name, _cells)(case, lib, *arrays)


def _variants(case: dict[str, Any]) -> Iterator[tuple[str, int | None, int]]:
    """Highway-BP with and without chunks, and the fixed point, or with directions: name, k, chunk."""
    yield "exact adjoint", None, 1
    if "strong" in case:
        yield from ((name, k, 1) for k in (0, 1, 2) for name in ("Highway-BP", RANKED))
        yield TOLERANT, None, 1
        return
    yield from (("Highway-BP", k, chunk) for chunk in (1, CHUNK) for k in ITERATIONS)
    yield from (("fixed point", k, 1) for k in (1, 3, 10))


def _cells(case: dict[str, Any], lib: Library, params: list[Any], x: Any, dy: Any) -> Iterator[Method]:
    """hbp's cells on a library's arrays."""
    xp, gru = lib.front_end.backend.xp, case["cell"] == "gru"
    state = xp.zeros_like(x[0])

    def method(name: str, k: int | None, chunk: int, backend: Any = None) -> Method:
        split = SPLITS.get(name, {})

        def forward() -> Any:
            if gru:
                return hbp.cells.gru(hbp.cells.GRUParameters(*params), x, state, backend=backend)[1]
            return hbp.cells.lstm(hbp.cells.LSTMParameters(*params), x, (state, state), backend=backend)[1]

        def backward(pull: Any) -> Any:
            dparams, dx, _ = pull(dy if gru else (dy, None), iterations=k, chunk=chunk, **split)
            return (*dparams, dx) if case.get("inputs") else dparams

        ours = "Hillis" not in name and "residual" not in split
        return Method(name, lib, forward, backward, k, chunk, ours, name == "exact adjoint")

    for variant in _variants(case):
        yield method(*variant)
    yield method("Highway-BP by Hillis-Steele", 3, 1, Parallel(lib.name, xp))


def _torch(case: dict[str, Any], lib: Library, params: list[Any], x: Any, dy: Any) -> Iterator[Method]:
    import torch

    kind = case["cell"].upper()

    def layer(cls: Callable[..., Any], **options: Any) -> Any:
        module = cls(case["H"], case["H"], **options).to(x.device)
        with torch.no_grad():
            for own, given in zip(module.parameters(), params, strict=True):
                own.copy_(given)
        return module

    x = x.requires_grad_(bool(case.get("inputs")))

    def method(name: str, module: Any, **what: Any) -> Method:
        own = [p for p in (*module.parameters(), x) if p.requires_grad]
        return Method(name, lib, lambda: _first(module(x)), lambda y: torch.autograd.grad(y, own, dy), **what)

    cudnn = "cuDNN" if lib.on_gpu else "the library's own"
    yield method(f"torch.nn.{kind} ({cudnn})", layer(getattr(torch.nn, kind)))
    ours = getattr(lib.front_end, kind)
    yield method("iterations=None", layer(ours), ours=True)
    if not lib.on_gpu:
        yield method('iterations=None, keep="states"', layer(ours, keep="states"), ours=True)
    for name, k, chunk in _variants(case):
        split, pinned = SPLITS.get(name, {}), {"exact": "adjoint"} if name == "exact adjoint" else {}
        module = layer(ours, iterations=k, chunk=chunk, **split, **pinned)
        yield method(name, module, k=k, chunk=chunk, ours="residual" not in split, exact=bool(pinned))
    if find_spec("pararnn"):
        import pararnn

        cell = (pararnn.ParaGRU if kind == "GRU" else pararnn.ParaLSTM)(case["H"], case["H"])
        other = pararnn.ParaRNN(cell, batch_first=False).to(x.device)
        yield method(f"pararnn {type(cell).__name__} (another model: diagonal)", other, yardstick=True)
    if "setting" in case:
        from benchmarks.loops import Loop

        cell = getattr(torch.nn, f"{kind}Cell")
        yield method("loop over steps (the paper's setting)", layer(partial(Loop, cell)))


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def _jax(case: dict[str, Any], lib: Library, params: list[Any], x: Any, dy: Any) -> Iterator[Method]:
    import jax
    import jax.numpy as jnp

    gru = case["cell"] == "gru"
    own = (hbp.cells.GRUParameters if gru else hbp.cells.LSTMParameters)(*params)
    zero = jnp.zeros_like(x[0])

    def method(name: str, run: Callable[[Any, Any], Any], **what: Any) -> Method:
        if case.get("inputs"):
            forward = jax.jit(lambda params, x: jax.vjp(run, params, x))
            backward = jax.jit(lambda pull, dy: (lambda dparams, dx: (*dparams, dx))(*pull(dy)))
        else:
            forward = jax.jit(lambda params, x: jax.vjp(lambda params: run(params, x), params))
            backward = jax.jit(lambda pull, dy: pull(dy)[0])
        return Method(name, lib, lambda: forward(own, x), lambda state: backward(state[1], dy), **what)

    def plain(params: Any, x: Any) -> Any:
        inputs = x @ params.weight_ih.T + params.bias_ih
        carry = zero if gru else (zero, zero)
        return jax.lax.scan(lambda carry, row: jax_step(params, carry, row), carry, inputs)[1]

    yield method("jax.lax.scan", plain)
    layer = lib.front_end.gru if gru else lib.front_end.lstm
    for name, k, chunk in _variants(case):
        if name not in SPLITS:
            run = lambda params, x, k=k, chunk=chunk: layer(  # noqa: E731
                params, x, zero if gru else (zero, zero), iterations=k, chunk=chunk
            )[1]
            label = "iterations=None" if k is None else name
            yield method(label, run, k=k, chunk=chunk, ours=True, exact=k is None)


def jax_step(params: Any, carry: Any, row: Any) -> Any:
    """One step of the plain program, as one would write it by hand."""
    import jax
    import jax.numpy as jnp

    if not isinstance(carry, tuple):
        r_x, z_x, n_x = jnp.split(row, 3, -1)
        r_h, z_h, n_h = jnp.split(carry @ params.weight_hh.T + params.bias_hh, 3, -1)
        z, n = jax.nn.sigmoid(z_x + z_h), jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
        h = n + z * (carry - n)
        return h, h
    h, c = carry
    i, f, g, o = jnp.split(row + h @ params.weight_hh.T + params.bias_hh, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h
