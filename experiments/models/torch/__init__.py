"""The models for PyTorch, their losses, and what validation counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data.examples import IGNORED, Batch, Task
from experiments.models import sizes as s
from experiments.models.torch.recurrent import RecurrentClassifier, RecurrentLM
from experiments.models.torch.residual import ResidualMLP, ResNet


def build(sizes: s.Sizes, folder: Path | None = None) -> nn.Module:
    """The module of these sizes; ``folder`` is where pre-trained weights are looked for first."""
    simple: dict[type, Any] = {
        s.ResNet: ResNet, s.ResidualMLP: ResidualMLP,
        s.RecurrentLM: RecurrentLM, s.RecurrentClassifier: RecurrentClassifier,
    }  # fmt: skip
    if type(sizes) in simple:
        return simple[type(sizes)](sizes)
    from experiments.models.torch import transformer  # of which some parts need the library transformers

    return transformer.build(sizes, folder)


def trained(model: nn.Module) -> int:
    """How many parameters training changes, the number of the paper's table 2."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tensors(batch: Batch, device: Any = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch's inputs and targets."""
    inputs, targets = batch
    return tuple(torch.from_numpy(x).to(device) for x in inputs), torch.from_numpy(np.asarray(targets)).to(device)


def loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The task's loss, a mean over all targets that count."""
    if task.loss == "squared error":
        return nn.functional.mse_loss(outputs, targets)
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validate(task: Task, model: nn.Module, batches: Any, device: Any = None) -> dict[str, float]:
    """Mean loss over all targets of the batches, and the task's metric; in evaluation mode, which ends with it."""
    was, model = model.training, model.eval()
    total, correct, count = 0.0, 0, 0
    for batch in batches:
        inputs, targets = tensors(batch, device)
        outputs = model(*inputs)
        counted = targets.numel() if task.loss == "squared error" else int((targets != IGNORED).sum())
        total += float(loss(task, outputs, targets)) * counted
        correct += int((outputs.argmax(-1) == targets).sum()) if task.metric == "accuracy" else 0
        count += counted
    model.train(was)
    mean = total / count
    with np.errstate(over="ignore"):  # of a model that has not learned to normalise, the loss may be any number
        found = {"accuracy": correct / count, "perplexity": float(np.exp(mean)), "loss": mean}
    return {"loss": mean, task.metric: found[task.metric]}
