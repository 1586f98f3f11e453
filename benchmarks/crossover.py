"""Where the exact adjoint, Highway-BP and PyTorch's own layer win: few methods over a grid of T, B and H."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import rnn
from benchmarks.measure import Library, Method
from benchmarks.rnn import CHECK, product_flops, reference

__all__ = ["CASES", "CHECK", "GPU_CASES", "methods", "product_flops", "reference"]

EXACT = ("iterations=None", "exact adjoint")
STEPS, BATCHES, SIZES = (256, 1024), (1, 4, 16), (64, 256, 1024, 2048)
CASES = {
    "quick": [case | {"inputs": True} for case in rnn.grid(rnn.BOTH, (256,), (1, 4), (64, 256))],
    "full": [case | {"inputs": True} for case in rnn.grid(rnn.BOTH, STEPS, BATCHES, SIZES)],
}
GPU_CASES = rnn.grid(rnn.BOTH, (256, 1024, 4096, 16384), (1, 8, 32, 128), (128, 512), 1.4e11)


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """PyTorch's own layer, exact backprop as `iterations=None` does it, Highway-BP at k = 1 and 3; `jax.lax.scan`."""
    for one in rnn.methods(case, lib) if lib.name in ("torch", "jax") else ():
        which = kind(one.name, one.k, one.chunk)
        pinned = one.name == "exact adjoint" and not lib.on_gpu  # `iterations=None` takes it where it is the fastest
        if which == "scan" or (which and lib.name == "torch" and not pinned):
            yield one


def kind(name: str, k: int | None, chunk: int | None) -> str | None:
    """Which of those that are compared a method belongs to."""
    if name in ("Highway-BP", "Highway-BP (kernels)") and k in (1, 3) and chunk == 1:
        return "highway"
    if name == "jax.lax.scan":
        return "scan"
    return "exact" if name in EXACT else "library" if name.startswith("torch.nn") else None
