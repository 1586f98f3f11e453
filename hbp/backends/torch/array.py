"""PyTorch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbp.backends._array import ArrayBackend
from hbp.backends._kernels import CPU, CUDA_TORCH
from hbp.backends._measured import Place
from hbp.backends.torch.autograd import transformed
from hbp.core.backend import Array, Pullback
from hbp.core.operator import Dense, LinearOperator, Scalar
from hbp.core.scan import hillis_steele, sequential

ROW = 4096
"""Numbers in a state up to which the scan on a CPU is cut into pieces."""
SCANS = ("suffix_scan", "low_rank_scan")
"""Compiled functions that return a NumPy array."""


class TorchBackend(ArrayBackend):
    """PyTorch behind the protocol; the pullbacks are `torch.func.vjp`'s.

    The suffix scan is one in-place loop on a CPU and Hillis-Steele's elsewhere; where a gradient through the scan
    itself is recorded, or `torch.func` transforms it, it is the loop without in-place writes.
    """

    def __init__(self) -> None:
        super().__init__("torch", torch)

    def device(self) -> str:
        return f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"

    def kernel_state(self) -> str:
        return f"{CPU.state()}; cuda: {CUDA_TORCH.state()}" if torch.cuda.is_available() else CPU.state()

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        return torch.cat(tuple(arrays), axis)

    def cast(self, x: Array, like: Array) -> Array:
        return x.to(like.dtype)

    def widened(self, x: Array) -> Array:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def constant(self, x: Array) -> Array:
        return x.detach()

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        y, pullback = torch.func.vjp(fn, x)
        return y, lambda cotangent: pullback(cotangent)[0]

    def kernel(self, name: str, *arrays: Tensor) -> Callable[..., Any] | None:
        if _traced(*arrays) or not {type(array) for array in arrays} <= {Tensor, torch.nn.Parameter}:
            return None
        kinds, devices = {array.dtype for array in arrays}, {array.device.type for array in arrays}
        if devices == {"cuda"}:
            return CUDA_TORCH.find(name, partial(place, arrays[0]))
        if name not in ("suffix_scan", "suffix_scan_") and torch.is_autocast_enabled("cpu"):
            return None  # those with products are of one precision
        module = CPU.load() if len(kinds) == 1 and kinds <= {torch.float32, torch.float64} else None
        if module is None or devices != {"cpu"} or not hasattr(module, name):
            return None
        from hbp.backends.torch.threads import torch_threads  # needs Numba

        found = partial(getattr(module, name), threads=torch_threads())
        return found if name not in SCANS else lambda *given: torch.from_numpy(found(*given))

    def add_product(self, sums: Array, rows: Array, weight: Array) -> None:
        sums.addmm_(rows, weight)

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        if c.device.type != "cpu":
            return hillis_steele(operator, c, self)
        if _traced(c, *operator.arrays) or isinstance(operator, Dense):
            return sequential(operator, c, self)
        g = c.clone(memory_format=torch.contiguous_format)
        if isinstance(operator, Scalar) and not operator.arrays:
            states = g.unbind(0)
            for i in range(len(c) - 2, -1, -1):
                states[i].add_(states[i + 1], alpha=operator.value)
            return g
        suffix_scan_(operator.arrays[0], g)
        return g

    def norm(self, x: Array) -> float:
        return super().norm(x.detach())


def place(x: Tensor) -> Place:
    """Where a kernel on a scan of states like ``x``, (L+1, ...), would run."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    return Place(f"sm_{major}{minor}", str(x.dtype).removeprefix("torch."), len(x), x[:1].numel())


def _traced(*tensors: Tensor) -> bool:
    """Whether somebody looks on: autograd, a transform, the compiler, or a dispatch mode."""
    if transformed() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def suffix_scan_(values: Tensor, g: Tensor) -> None:
    """``g[i] += values[i] * g[i+1]`` from the end on, in place: values (L, ...) as they broadcast, g (L+1, ...)."""
    length = len(values)
    size = math.isqrt(length)
    if size < 8 or g[0].numel() > ROW or values.shape[1:] != g.shape[1:]:
        states = g.unbind(0)
        for i, value in reversed(list(enumerate(values.unbind(0)))):
            states[i].addcmul_(value, states[i + 1])
        return
    # Rows so short that a step costs more than its arithmetic: pieces of sqrt(L) steps, all pieces at once, then
    # what enters each piece at its end, times the product of the values from there on.
    cut = length - length % size
    suffix_scan_(values[cut:], g[cut:])
    products = values[:cut].reshape(cut // size, size, *values.shape[1:]).transpose(0, 1).clone().contiguous()
    pieces = g[:cut].view(cut // size, size, *g.shape[1:]).transpose(0, 1)
    rows, factors = pieces.unbind(0), products.unbind(0)
    for i in range(size - 2, -1, -1):
        rows[i].addcmul_(factors[i], rows[i + 1])
        factors[i].mul_(factors[i + 1])
    entering = g[size : cut + 1 : size].clone()
    suffix_scan_(factors[0][1:], entering)
    pieces.addcmul_(products, entering[None])
