"""PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hbp.backends._array import ArrayBackend
from hbp.core.backend import Array, Pullback
from hbp.core.operator import Dense, LinearOperator, Scalar
from hbp.core.scan import hillis_steele, sequential


class TorchBackend(ArrayBackend):
    """PyTorch behind the protocol; the pullbacks are `torch.func.vjp`'s.

    The suffix scan is one in-place loop on a CPU and Hillis-Steele's elsewhere; where a gradient through the scan
    itself is recorded, or `torch.func` transforms it, it is the loop without in-place writes.
    """

    def __init__(self) -> None:
        super().__init__("torch", torch)

    def device(self) -> str:
        return f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        return torch.cat(tuple(arrays), axis)

    def cast(self, x: Array, like: Array) -> Array:
        return x.to(like.dtype)

    def widened(self, x: Array) -> Array:
        return x.float()

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        y, pullback = torch.func.vjp(fn, x)
        return y, lambda cotangent: pullback(cotangent)[0]

    def suffix_scan(self, operator: LinearOperator, c: Array) -> Array:
        arrays = (c, *operator.arrays)
        recorded = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
        transformed = any(map(torch._C._functorch.is_functorch_wrapped_tensor, arrays))
        if c.device.type != "cpu":
            return hillis_steele(operator, c, self)
        if recorded or transformed or isinstance(operator, Dense):
            return sequential(operator, c, self)
        g = c.clone(memory_format=torch.contiguous_format)
        states = g.unbind(0)
        if isinstance(operator, Scalar) and not operator.arrays:
            for i in range(len(c) - 2, -1, -1):
                states[i].add_(states[i + 1], alpha=operator.value)
            return g
        values = operator.arrays[0].unbind(0)
        for i in range(len(c) - 2, -1, -1):
            states[i].addcmul_(values[i], states[i + 1])
        return g

    def norm(self, x: Array) -> float:
        return super().norm(x.detach())
