"""Where the exact adjoint, Highway-BP and PyTorch's own layer win: few methods over a grid of T, B and H."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import rnn
from benchmarks.measure import Library, Method
from benchmarks.rnn import CHECK, product_flops, reference

__all__ = ["CASES", "CHECK", "GPU_CASES", "methods", "product_flops", "reference"]

CASES = {
    "quick": rnn.grid(rnn.BOTH, (256, 1024, 4096), (1, 8, 32), (64, 256)),
    "full": rnn.grid(rnn.BOTH, (256, 1024, 4096, 16384), (1, 4, 16, 64), (64, 128, 256, 512)),
}
GPU_CASES = rnn.grid(rnn.BOTH, (256, 1024, 4096, 16384), (1, 8, 32, 128), (128, 512), 1.4e11)


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """PyTorch's own layer, the exact adjoint, and Highway-BP at k = 1 and 3; nothing for other libraries."""
    if lib.name == "torch":
        yield from (method for method in rnn.methods(case, lib) if kind(method.name, method.k, method.chunk))


def kind(name: str, k: int | None, chunk: int | None) -> str | None:
    """Which of the three that are compared a method belongs to."""
    if name in ("Highway-BP", "Highway-BP (kernels)") and k in (1, 3) and chunk == 1:
        return "highway"
    return "exact" if name == "exact adjoint" else "library" if name.startswith("torch.nn") else None
