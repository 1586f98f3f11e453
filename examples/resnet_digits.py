"""Train a post-activation ResNet-20 on scikit-learn's digits, with exact backprop and with Highway-BP.

All layers act on one stream of full resolution: `Downsampled` blocks average rows and fold columns into channels,
and the residual map of a layer is its ReLU's mask. Needs: pip install "hbp[torch,demo]"

    python examples/resnet_digits.py --iterations 1 2 4
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import nn

import hbp.backends.torch as hb

TEST = 360
BATCH = 64


def conv(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]


def build(width: int, blocks: int = 3) -> nn.Sequential:
    """Stem, three stages of ``blocks`` residual layers, head: 6 * blocks + 2 layers with weights."""
    layers = []
    for factor in (1, 2, 4):
        for _ in range(blocks):
            block = nn.Sequential(*conv(factor * width), nn.ReLU(), *conv(factor * width))
            layers.append(hb.Residual(hb.Downsampled(block, factor), torch.relu))
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, hb.Sequential(*layers), Pooled(), nn.Linear(4 * width, 10))


class Pooled(hb.Downsampled):
    """The stream at the last stage's resolution, (B, 4 C, H / 4, W / 4), averaged over its pixels."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), 4)

    def forward(self, x: Any) -> Any:
        return self.down(x).mean((2, 3))


def data() -> tuple[Any, Any]:
    """Images (N, 1, 8, 8) in [0, 1] and labels, shuffled once."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return images[order], torch.tensor(labels)[order]


def train(iterations: int | None, seed: int, epochs: int, width: int, advance: Any) -> tuple[float, float]:
    """Test accuracy and the mean loss of the last epoch."""
    images, labels = data()
    torch.manual_seed(seed)
    model = build(width)
    hb.set_iterations(model, iterations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = epochs * ((len(labels) - TEST) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        losses = []
        for batch in (TEST + torch.randperm(len(labels) - TEST)).split(BATCH):
            if len(batch) < BATCH:
                continue
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance()
    model.eval()
    with torch.no_grad():
        correct = model(images[:TEST]).argmax(-1) == labels[:TEST]
    return correct.float().mean().item(), fmean(losses)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, nargs="+", default=[4], help="Highway-BP's k")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16, help="channels of the stream")
    given = parser.parse_args(arguments)
    rows = []
    runs = (1 + len(given.iterations)) * given.seeds
    steps = given.epochs * ((1797 - TEST) // BATCH)
    with Progress() as progress:
        task = progress.add_task("training", total=runs * steps)
        for k in (None, *given.iterations):
            found = [
                train(k, seed, given.epochs, given.width, lambda: progress.advance(task)) for seed in range(given.seeds)
            ]
            accuracies = [accuracy for accuracy, _ in found]
            rows.append({"k": k, "accuracy": fmean(accuracies), "of seeds": accuracies, "loss": found[-1][1]})
    for row in rows:
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    main()
