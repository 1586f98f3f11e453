"""Residual networks on a stream of full resolution, and residual layers on vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hbp.backends.torch as hb
from experiments.models import sizes as s


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def pre_activated(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Normalisation and ReLU before each convolution (He et al., 2016b)."""
    first = (nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs, stride))
    return nn.Sequential(*first, nn.BatchNorm2d(outputs), nn.ReLU(), conv(outputs, outputs))


def post_activated(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Normalisation after each convolution; the ReLU after the sum is the layer's (He et al., 2016a)."""
    first = (conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(*first, conv(outputs, outputs), nn.BatchNorm2d(outputs))


class Entering(nn.Module):
    """``Up_s(block(Down_{s/2}(x)))``: a stage's first block, which halves its images and doubles their channels.

    The paper's counts (464k, 1.7M, 917k) are those of He et al.: the first convolution of a stage reads the channels
    of the stage before.
    """

    def __init__(self, block: nn.Module, factor: int) -> None:
        super().__init__()
        self.block = block
        self.before, self.after = (hb.Downsampled(nn.Identity(), f) for f in (factor // 2, factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.after.up(self.block(self.before.down(x)))


def residual_layer(sizes: s.ResNet, factor: int, enters: bool) -> hb.Residual:
    """One layer of the stack; ``factor`` is that of its stage."""
    made = pre_activated if sizes.preactivation else post_activated
    channels = factor * sizes.width
    block: nn.Module
    if enters and factor > 1:
        block = Entering(made(channels // 2, channels, 2), factor)
    else:
        block = hb.Downsampled(made(channels, channels, 1), factor)
    return hb.Residual(block, None if sizes.preactivation else torch.relu)


class ResNet(nn.Module):
    """Images (B, C, H, W) to logits (B, classes)."""

    def __init__(self, sizes: s.ResNet) -> None:
        super().__init__()
        stem, last = conv(sizes.channels, sizes.width), 4 * sizes.width
        self.stem = stem if sizes.preactivation else nn.Sequential(stem, nn.BatchNorm2d(sizes.width), nn.ReLU())
        self.stack = hb.Sequential(
            *(residual_layer(sizes, factor, i == 0) for factor in (1, 2, 4) for i in range(sizes.blocks))
        )
        self.down = hb.Downsampled(nn.Identity(), 4)
        self.norm = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU()) if sizes.preactivation else nn.Identity()
        self.head = nn.Linear(last, sizes.classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        last = self.norm(self.down.down(self.stack(self.stem(images))))
        return self.head(last.mean((2, 3)))


class ResidualMLP(nn.Module):
    """Examples (B, ...) to logits (B, classes)."""

    def __init__(self, sizes: s.ResidualMLP) -> None:
        super().__init__()
        width = sizes.width
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(sizes.inputs, width))
        blocks = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(sizes.blocks)
        )
        self.stack = hb.Sequential(*map(hb.Residual, blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sizes.classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.stem(x)))
