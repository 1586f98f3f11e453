"""Training steps in PyTorch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hbp
import hbp.backends.torch as hb
from experiments.checkpoints import compare, identity
from experiments.data import Data
from experiments.experiment import Record
from experiments.history import Step, due
from experiments.methods import Diagnosed, Estimated
from experiments.models import build
from experiments.models import torch as models
from experiments.settings import Training
from experiments.training import Run
from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.diagnosis import Steps, undisturbed
from hbp.backends.torch.options import Scheduled, scheduled
from hbp.backends.torch.stack.options import Stack
from hbp.diagnosis import Agreement, Settings, compared

SAMPLES = 4
"""Random vectors of an estimate of the damping."""
torch.set_flush_denormal(True)  # cotangents that vanish over hundreds of steps would slow all products down


def check(run: Run) -> None:
    """PyTorch trains them all."""


class Trainer:
    """A model in training; what all steps share."""

    def __init__(self, run: Run, data: Data) -> None:
        torch.manual_seed(run.seed)
        self.problem, self.method, self.steps = run.problem, run.method, run.length_of_training
        self.model: nn.Module = build(self.problem.sizes, "torch", folder=run.data)
        self._run, self._data = run, data
        self._layers: list[Scheduled] = list(scheduled(self.model).values())
        self._optimizer = _optimizer(self.problem.training, self.model)
        self._chosen = self.method.solver(0, self.steps)
        self._notes: Record = {}
        self._configure()
        self._batches = data.train.batches(self.problem.training.batch, run.seed)

    @property
    def parameters(self) -> int:
        return models.trained(self.model)

    @property
    def passes(self) -> int:
        """Stacks or recurrent layers, through which a backward pass goes one after another."""
        return len(self._layers)

    @cached_property
    def length(self) -> int:
        """Layers of a stack, or steps of a sequence."""
        (first, *_) = self._layers
        batch = next(self._data.train.batches(1, self._run.seed))
        return len(list(first.members())) if isinstance(first, Stack) else batch.inputs[0].shape[1]

    def _configure(self) -> None:
        """Let the layers be solved by this method."""
        hb.configure(self.model, self._chosen)
        for layer in self._layers:
            layer.reports = [] if self._chosen.tolerance is not None else None
            if self.method.kind == "fixed-point":
                layer.residual = hbp.Zero()
            if isinstance(layer, Stack):
                damping = self.method.damping
                layer.damping = damping if isinstance(damping, float | int) else layer.damping
            elif isinstance(layer, hb.GRU | hb.LSTM):
                layer.rank = self.method.rank
                if self.method.kind == "library":
                    layer.exact, layer.compiled = "library", False

    def fetch(self) -> None:
        """Make the next batch."""
        self._batch = models.tensors(next(self._batches))

    def step(self, step: int) -> Step:
        """Train on the batch that was fetched."""
        extra = self._adapt(step)
        for group in self._optimizer.param_groups:
            group["lr"] = self.problem.training.rate_at(step)
        loss = self._loss(self.model, self._batch)
        self._optimizer.zero_grad()
        loss.backward()
        if self.problem.training.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.problem.training.clip)
        self._optimizer.step()
        return Step(loss.item(), [self._rounds(layer) for layer in self._layers], extra)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return models.loss(self.problem.task, model(*inputs), targets)

    def _rounds(self, layer: Scheduled) -> int | None:
        """Of the last backward pass; None for exact backprop."""
        if not layer.reports:
            return layer.solver.iterations
        report = layer.reports[-1]
        layer.reports.clear()
        return len(report.increments) - 1

    def _adapt(self, step: int) -> list[int | None]:
        """Change k or the damping where it is time to; the rounds of what was pulled back for it."""
        method, before = self.method, self._chosen
        if isinstance(method.iterations, Diagnosed):
            if step == 0 or due(step, self.steps, method.iterations.times):
                return self._diagnose(method.iterations, step)
            return []
        self._chosen = method.solver(step, self.steps)
        if self._chosen != before:
            self._configure()
        if isinstance(method.damping, Estimated) and (step == 0 or due(step, self.steps, method.damping.times)):
            return self._estimate(method.damping, step)
        return []

    def _diagnose(self, how: Diagnosed, step: int) -> list[int | None]:
        with redirect_stdout(io.StringIO()):
            found = hb.diagnose(
                self.model,
                self._loss,
                self._batch,
                iterations=how.iterations,
                chunks=(self.method.chunk,),
                target=how.target,
            )
        self._chosen = (*found.within, found.exact)[0].solver  # by k: what is fastest differs from machine to machine
        self._configure()
        self._notes.setdefault("chosen", []).append([step, self._chosen.iterations])
        return [None, *how.iterations]

    def _estimate(self, how: Estimated, step: int) -> list[int | None]:
        gammas = hb.estimate_damping(self.model, self._batch[0], samples=SAMPLES)
        mean = sum(gammas) / len(gammas)
        for layer in self._layers:
            layer.damping = gammas if how.per_layer else mean
        self._notes.setdefault("damping", []).append([step, *(round(gamma, 4) for gamma in gammas)])
        return [0]  # all layers and samples at once

    def validate(self) -> Mapping[str, float]:
        batches = self._data.validation.first(self._run.validated).once(max(self.problem.training.batch, 64))
        return models.validate(self.problem.task, self.model, batches)

    def probe(self, iterations: tuple[int, ...]) -> Record:
        """On one batch, the same all through training."""
        batch = models.tensors(next(self._data.train.batches(self.problem.training.batch, 10_000 + self._run.seed)))
        layers = scheduled(self.model)
        steps = Steps.of(self.model, self._loss, batch, layers)
        with undisturbed(self.model, layers.values()), redirect_stdout(io.StringIO()):
            rows = compared(Settings(iterations, (1,), 0.05, None), TorchBackend(), steps.gradient)[1:]
        inside = [sum((one for name, one in row.layers.items() if name != "rest"), Agreement()) for row in rows]
        increments = max(rows[-1].reports.values(), key=lambda report: report.shares[-1]).shares
        return {
            "k": list(iterations),
            "cosine": [_short(row.overall.cosine) for row in rows],
            "error": [_short(row.overall.error) for row in rows],
            "cosine_of_layers": [_short(one.cosine) for one in inside],
            "increments": [_short(share) for share in increments],
        }

    def notes(self) -> Record:
        taken = [
            found.rank for layer in self._layers for found in getattr(layer, "directions", []) if found is not None
        ]
        return {**self._notes, **({"directions": taken} if taken else {})}

    def save(self, path: Path, extra: Any) -> None:
        state = {"of": self._identity, "extra": extra}
        state |= {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "chosen": self._chosen, "notes": self._notes}
        state["dampings"] = [getattr(layer, "damping", 0) for layer in self._layers]
        state["directions"] = [getattr(layer, "directions", []) for layer in self._layers]
        torch.save(state, path)

    @property
    def _identity(self) -> Record:
        return identity(self._run, {name: value.shape for name, value in self.model.state_dict().items()})

    def load(self, path: Path) -> Any:
        state = torch.load(path, weights_only=False)
        compare(path, state.get("of", {}), self._identity)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self._chosen, self._notes = state["chosen"], state["notes"]
        self._configure()
        for layer, damping, found in zip(self._layers, state["dampings"], state["directions"], strict=True):
            if isinstance(layer, Stack):
                layer.damping = damping
            for followed, latest in zip(getattr(layer, "followed", ()), found, strict=True):
                followed.latest = latest  # where the next step of subspace iteration starts from
        extra = state["extra"]
        self._batches = self._data.train.batches(self.problem.training.batch, self._run.seed, extra.step)
        return extra


def _optimizer(how: Training, model: nn.Module) -> torch.optim.Optimizer:
    own: Any = [p for p in model.parameters() if p.requires_grad]
    if how.optimizer == "sgd":
        return torch.optim.SGD(own, how.rate, momentum=how.momentum, weight_decay=how.weight_decay)
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[how.optimizer]
    return kind(own, how.rate, betas=(how.momentum, how.beta2), weight_decay=how.weight_decay)


def _short(value: float) -> float:
    return float(f"{value:.7g}")
