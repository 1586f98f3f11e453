"""Strong directions in the residual path, at weights that have such, against the exact adjoint: backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import rnn
from benchmarks.measure import Library, Method
from benchmarks.rnn import product_flops, reference

__all__ = ["CASES", "CHECK", "GPU_CASES", "methods", "product_flops", "reference"]

STRONG = {"strong": 12}
CASES = {
    "quick": [case | STRONG for case in rnn.grid(("gru",), (256,), (1, 4), (1024,))],
    "full": [case | STRONG for case in rnn.grid(rnn.BOTH, (256, 1024), (1, 4), (1024,), 5e9)],
}
GPU_CASES = [case | STRONG for case in rnn.grid(rnn.BOTH, (1024, 4096), (1, 16), (512,), 1.4e11)]
CHECK = {"T": 60, "B": 2, "H": 24, "strong": 4}


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """PyTorch's own layer, the exact adjoint, and Highway-BP along the gates alone and along strong directions too."""
    for one in rnn.methods(case, lib) if lib.name == "torch" else ():
        if not one.yardstick and "keep" not in one.name:
            yield one
