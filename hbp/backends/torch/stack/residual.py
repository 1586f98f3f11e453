"""Residual layers that know their residual map, to be stacked in `Sequential`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hbp.core.backend import check_count
from hbp.core.operator import Diagonal, Identity, LinearOperator

RELUS = (torch.relu, nn.functional.relu)


class Residual(nn.Module):
    """``activation(x + block(x))``: pre-activation residual layers without, the original ResNet's with a ReLU.

    The residual map is the identity, or the ReLU's mask (table 1 of the paper).

    Args:
        block: any module that keeps its input's shape; further arguments of a call go to it.
        activation: None, `torch.relu` or `torch.nn.ReLU`.

    >>> Residual(nn.Linear(3, 3), torch.relu)(torch.randn(2, 3)).min() >= 0
    tensor(True)
    """

    def __init__(self, block: nn.Module, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        _check_block(block)
        if activation is not None and activation not in RELUS and not isinstance(activation, nn.ReLU):
            raise ValueError(f"activation={activation!r}; give None, torch.relu or torch.nn.ReLU()")
        self.block = block
        self.rectified = activation is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = x + self.block(x, *args, **kwargs)
        return torch.relu(y) if self.rectified else y

    def residual_map(self, x: Tensor, y: Tensor) -> LinearOperator:
        """The residual map of the call that took x to y."""
        return Diagonal((y > 0).to(y.dtype)) if self.rectified else Identity()


class PostNorm(nn.Module):
    """``norm(x + block(x))``: the original transformer's layers.

    The residual map is diag(alpha / sigma), one sigma per token (equations 18 to 22 of the paper).

    Args:
        block: any module that keeps its input's shape; further arguments of a call go to it.
        norm: a `torch.nn.LayerNorm` over the last axis.

    >>> PostNorm(nn.Linear(4, 4), nn.LayerNorm(4))(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, block: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        _check_block(block)
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            raise ValueError(f"norm is {norm!r}; give a torch.nn.LayerNorm over the last axis")
        self.block = block
        self.norm = norm
        self._sum: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = x + self.block(x, *args, **kwargs)
        self._sum = total.detach() if torch.is_grad_enabled() else None
        return self.norm(total)

    def residual_map(self, x: Tensor, y: Tensor) -> LinearOperator:
        """The residual map of the last call."""
        assert self._sum is not None
        sigma = (self._sum.var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        alpha = torch.ones_like(sigma) if self.norm.weight is None else self.norm.weight.detach()
        self._sum = None
        return Diagonal((alpha / sigma).expand_as(y))


class Downsampled(nn.Module):
    """``Up(block(Down(x)))`` for use inside `Residual`: a block at lower resolution, on a stream that keeps its own.

    Down averages ``factor`` rows and folds ``factor`` columns into channels; Up unfolds the columns and repeats the
    rows, so that Down(Up(x)) = x and the stream's residual map stays the identity (appendix G of the paper). The
    factor counts from the stream's full resolution.

    Args:
        block: a module on images (B, factor C, H / factor, W / factor).
        factor: 1, 2, 4, ...

    >>> layer = Residual(Downsampled(nn.Conv2d(8, 8, 3, padding=1), 2))
    >>> layer(torch.randn(5, 4, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(self, block: nn.Module, factor: int) -> None:
        super().__init__()
        _check_block(block)
        factor = check_count("factor", factor, 1)
        if factor & (factor - 1):
            raise ValueError(f"factor={factor}; give a power of two")
        self.block = block
        self.factor = factor

    def down(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, factor C, H / factor, W / factor)."""
        b, c, h, w = x.shape
        if h % self.factor or w % self.factor:
            raise ValueError(f"an image of {h} x {w} cannot be divided by factor={self.factor}")
        s = self.factor
        rows = x.reshape(b, c, h // s, s, w // s, s).mean(3)
        return rows.permute(0, 1, 4, 2, 3).reshape(b, c * s, h // s, w // s)

    def up(self, x: Tensor) -> Tensor:
        """(B, factor C, H / factor, W / factor) -> (B, C, H, W)."""
        b, c, h, w = x.shape
        s = self.factor
        columns = x.reshape(b, c // s, s, h, w).permute(0, 1, 3, 4, 2).reshape(b, c // s, h, w * s)
        return columns.repeat_interleave(s, 2)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.up(self.block(self.down(x), *args, **kwargs))


def _check_block(block: Any) -> None:
    if not isinstance(block, nn.Module):
        raise TypeError(f"block is a {type(block).__name__}; give a torch.nn.Module")
