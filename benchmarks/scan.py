"""The suffix scan alone: g[i] = a[i] g[i+1] + c[i], on devices with few directions beside the diagonal too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library, Method, kept
from hbp.backends._array import ArrayBackend
from hbp.core.registry import load
from hbp.core.scan import hillis_steele

CASES = {
    "quick": [{"T": T, "B": 8, "D": 128} for T in (1024, 4096, 16384)],
    "full": [{"T": T, "B": B, "D": D} for B, D in ((1, 64), (1, 1024), (8, 128)) for T in (256, 1024, 4096, 16384)],
}
GPU_CASES = [
    *({"T": T, "B": 8, "D": 512, "dtype": dtype} for T in (16384, 1024) for dtype in ("float32", "bfloat16")),
    *({"T": T, "B": 1, "D": 64, "dtype": dtype} for T in (2**20, 16384) for dtype in ("float32", "bfloat16")),
    {"T": 16384, "B": 8, "D": 512, "maps": "identity"},
    {"T": 1024, "B": 8, "D": 512, "maps": "low rank"},
    *({"T": T, "B": 1, "D": 64} for T in (1024, 4096, 2**17)),
    *({"T": T, "B": 32, "D": 1024} for T in (256, 4096)),
]
CHECK = {"T": 37, "B": 2, "D": 5}
RANK = 16


@kept
def problem(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random gates in (0, 1), (T, B, D), or ones, and cotangents, (T+1, B, D): float32 in the case's precision."""
    rng, shape = np.random.default_rng(0), (case["B"], case["D"])
    gates = rng.random((case["T"], *shape), dtype=np.float32)
    c = rng.standard_normal((case["T"] + 1, *shape), dtype=np.float32)
    if case.get("maps") == "identity":
        gates[:] = 1
    if case.get("dtype") == "bfloat16":
        gates, c = ((x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for x in (gates, c))
    return gates, c


@kept
def factors(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of random directions, (T, B, D, r) and (1, r, D), whose products are about as large as the gates'."""
    rng, size = np.random.default_rng(1), case["D"]
    shapes = (case["T"], case["B"], size, RANK), (1, RANK, size)
    left, right = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return left / np.float32(2 * size), right / np.float32(RANK)


def reference(case: dict[str, Any], method: Method | None = None, lib: Library | None = None) -> Any:
    """The scan in float64: step by step, or on a device in sweeps, where so many steps would take too long."""
    gates, c = problem(case)
    if case.get("maps") == "low rank":
        g, (left, right) = c.astype(np.float64), factors(case)
        for i in range(len(gates) - 1, -1, -1):
            g[i] += gates[i] * g[i + 1] + (right[0].T @ (left[i].swapaxes(1, 2) @ g[i + 1][..., None]))[..., 0]
        return g.ravel()
    if lib is not None:
        wide = [lib.array(x.astype(np.float64)) for x in (gates, c)]
        swept = hillis_steele(hbp.Diagonal(wide[0]), wide[1], Parallel(lib.name, lib.front_end.backend.xp))
        return lib.vector([swept])
    g = c.astype(np.float64)
    for i in range(len(gates) - 1, -1, -1):
        g[i] += gates[i] * g[i + 1]
    return g.ravel()


def moved_bytes(case: dict[str, Any]) -> int:
    """The inputs read and the result written, once."""
    arrays = {"identity": 2, "low rank": 3 + RANK}.get(case.get("maps"), 3)
    size = 2 if case.get("dtype") == "bfloat16" else 4
    return size * arrays * case["T"] * case["B"] * case["D"]


class Parallel(ArrayBackend):
    """A backend whose scan is Hillis-Steele's, the paper's."""

    def suffix_scan(self, operator: Any, c: Any) -> Any:
        return hillis_steele(operator, c, self)

    def cast(self, x: Any, like: Any) -> Any:
        return x.to(like.dtype) if self.name == "torch" else super().cast(x, like)

    def widened(self, x: Any) -> Any:
        return x.float() if self.name == "torch" and x.itemsize == 2 else super().widened(x)

    def concat(self, arrays: Any, axis: int = 0) -> Any:
        return self.xp.cat(tuple(arrays), axis) if self.name == "torch" else super().concat(arrays, axis)


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """hbp's scan in a library, Hillis-Steele's, the loop step by step, and what others ship."""
    dtype, identity = case.get("dtype", "float32"), case.get("maps") == "identity"
    if dtype == "bfloat16" and lib.name not in ("torch", "jax"):
        return  # NumPy and CuPy have none
    gates, c = (lib.array(x) if dtype == "float32" else lib.cast(lib.array(x), dtype) for x in problem(case))
    operator: Any = hbp.Identity() if identity else hbp.Diagonal(gates)
    if case.get("maps") == "low rank":
        yield from _low_rank(operator, c, case, lib)
        return
    parallel = Parallel(lib.name, lib.front_end.backend.xp)
    ours, hillis = (lib.front_end.jit(f) for f in (lib.front_end.backend.propagate, parallel.propagate))
    yield Method("hbp", lib, lambda: ours(operator, c), None, ours=True)
    plain = "the library's cumsum, reversed" if identity else "Hillis-Steele (the paper's)"
    yield Method(plain, lib, lambda: hillis(operator, c), None)
    others: Any = _torch_sums if identity and lib.name == "torch" else _OTHERS.get(lib.name, lambda *_: ())
    for name, run, finish in others(gates, c):
        yield Method(name, lib, run, None, ours="hbp" in name, finish=finish, yardstick="no scan" in name)


def _low_rank(diagonal: Any, c: Any, case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """As on the way back through a recurrent net: directions of each step follow those that all share."""
    own = lib.front_end.backend
    operator = (diagonal + hbp.LowRank(*map(lib.array, factors(case)))).T.bind(case["T"], c[-1], own)
    yield Method("hbp", lib, lambda: own.propagate(operator, c), None, ours=True)
    yield Method("loop over steps", lib, lambda: own.sequential(operator, c), None)


Other = tuple[str, Callable[[], Any], Callable[[Any], Any]]


def _numpy_others(gates: np.ndarray, c: np.ndarray) -> Iterator[Other]:
    def loop() -> np.ndarray:
        g, carried = c.copy(), np.empty_like(c[0])
        for i in range(len(gates) - 1, -1, -1):
            np.multiply(gates[i], g[i + 1], out=carried)
            g[i] += carried
        return g

    yield "loop over steps, in place", loop, lambda g: g
    operator, third = hbp.Diagonal(gates), np.empty_like(c)
    kernel = load("numpy").backend.kernel("suffix_scan", c, gates)
    if kernel is not None:
        yield "hbp's kernel into a third array", lambda: kernel(operator, c, out=third), lambda g: g
    a, b, out = gates, gates.copy(), np.empty_like(gates)
    yield "a * b into a third array (no scan)", lambda: np.multiply(a, b, out=out), lambda _: None


def _torch_sums(_gates: Any, c: Any) -> Iterator[Other]:
    """What torch ships for identities, forward in time; reversing its direction is not timed."""
    turned = c.flip(0).contiguous()
    yield "torch.cumsum (its direction)", lambda: turned.cumsum(0), lambda h: h.flip(0)


def _torch_others(gates: Any, c: Any) -> Iterator[Other]:
    """Loops, and packages whose scans run forward in time from a zero state, best over a power of two of steps.

    For these time is reversed, the last state folded into the step before it, and all laid out, untimed.
    """
    import torch

    def loop() -> Any:
        rows = list(c.unbind(0))
        g = [rows.pop()]
        for gate, row in zip(reversed(gates.unbind(0)), reversed(rows), strict=True):
            g.append(torch.addcmul(row, gate, g[-1]))
        return torch.stack(g[::-1])

    yield "loop over steps", loop, lambda g: g
    a, x = gates.flip(0), c[:-1].flip(0).clone()
    x[0] += gates[-1] * c[-1]

    def finish(h: Any) -> Any:
        return torch.cat([h.flip(0), c[-1:]])

    if find_spec("mambapy"):
        scan = import_module("mambapy.pscan").pscan
        own = [v.transpose(0, 1)[..., None].contiguous() for v in (a, x)]  # (B, T, D, 1)
        yield "mambapy pscan (its layout)", lambda: scan(*own), lambda h: finish(h[..., 0].transpose(0, 1))
    if find_spec("accelerated_scan"):
        kind = "warp" if c.device.type == "cuda" else "ref"
        accelerated = import_module(f"accelerated_scan.{kind}").scan
        extra = (1 << (len(a) - 1).bit_length()) - len(a)
        rows = [torch.nn.functional.pad(v.permute(1, 2, 0), (0, extra)).contiguous() for v in (a, x)]
        length = len(a)
        yield (
            f"accelerated-scan {kind} (its layout)",
            lambda: accelerated(*rows),
            lambda h: finish(h[..., :length].permute(2, 0, 1)),
        )


def _jax_others(gates: Any, c: Any) -> Iterator[Other]:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def tree(gates: Any, c: Any) -> Any:
        def combine(later: Any, earlier: Any) -> Any:  # in a reverse scan the later element comes first
            return later[0] * earlier[0], earlier[0] * later[1] + earlier[1]

        filled = jnp.concatenate([gates, jnp.zeros_like(gates[:1])])
        return jax.lax.associative_scan(combine, (filled, c), reverse=True)[1]

    @jax.jit
    def loop(gates: Any, c: Any) -> Any:
        def step(g: Any, row: Any) -> Any:
            g = row[0] * g + row[1]
            return g, g

        states = jax.lax.scan(step, c[-1], (gates, c[:-1]), reverse=True)[1]
        return jnp.concatenate([states, c[-1:]])

    yield "jax.lax.associative_scan", lambda: tree(gates, c), lambda g: g
    yield "jax.lax.scan", lambda: loop(gates, c), lambda g: g


_OTHERS: dict[str, Callable[[Any, Any], Iterator[Other]]] = {
    "numpy": _numpy_others,
    "torch": _torch_others,
    "jax": _jax_others,
}
