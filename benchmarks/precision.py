"""Float32 layers whose products may be computed in bfloat16, by PyTorch's own switch: what that gains, and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks import crossover, rnn
from benchmarks.measure import Library, Method
from benchmarks.rnn import product_flops, reference

__all__ = ["CASES", "CHECK", "GPU_CASES", "LOWER", "methods", "product_flops", "reference"]

LOWER = ", medium"
"""What a method's name ends with under ``torch.set_float32_matmul_precision("medium")``."""
CASES = {
    "quick": [case | {"inputs": True} for case in rnn.grid(("gru",), (256,), (1, 4), (1024,))],
    "full": [case | {"inputs": True} for case in rnn.grid(rnn.BOTH, (256, 1024), (1, 4, 16), (256, 1024), 5e9)],
}
CHECK = {"T": 60, "B": 4, "H": 48, "weights": 3.0}
"""Smaller matrices PyTorch multiplies as they are."""
GPU_CASES: list[dict[str, Any]] = []
"""A GPU's products have a precision of their own between the two, TF32; no layers are measured with it."""


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """Those of the crossover's table, each as PyTorch is by default and at the lower precision.

    On a processor without instructions for bfloat16 both are the same.
    """
    for one in crossover.methods(case, lib) if lib.name == "torch" and not lib.on_gpu else ():
        yield one
        backward = one.backward and _lower(one.backward)
        yield replace(one, name=one.name + LOWER, forward=_lower(one.forward), backward=backward, products="bfloat16")


def _lower(run: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def lowered(*given: Any) -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return run(*given)
        finally:
            torch.set_float32_matmul_precision(before)

    return lowered
