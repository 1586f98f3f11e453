"""Training steps in JAX, of recurrent models; each solver is a program of its own, compiled in its first step."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hbp
from experiments.checkpoints import compare, identity
from experiments.data import Data
from experiments.experiment import Record
from experiments.history import Step
from experiments.methods import Backward, Diagnosed
from experiments.models import RecurrentClassifier, RecurrentLM, build
from experiments.models import jax as models
from experiments.settings import Training
from experiments.training import Run
from hbp.core.registry import load
from hbp.diagnosis import Agreement


def check(run: Run) -> None:
    """ValueError where PyTorch alone can do it."""
    if not isinstance(run.problem.sizes, RecurrentLM | RecurrentClassifier):
        raise ValueError(f"{run.task} is a model of depth, which only PyTorch trains here; give --backend torch")
    method = run.method
    if isinstance(method.iterations, Diagnosed) or method.rank == "auto":
        raise ValueError(
            f"{run.task} by {method.label} needs numbers in the middle of a step, which JAX has compiled; "
            "give --backend torch"
        )


class Trainer:
    """A recurrent model in training; what all steps share."""

    def __init__(self, run: Run, data: Data) -> None:
        self.problem, self.method, self.steps = run.problem, run.method, run.length_of_training
        self.model = build(self.problem.sizes, "jax")
        self._run, self._data = run, data
        self._params = self.model.init(run.seed)
        self._optimizer = _optimizer(self.problem.training)
        self._state = self._optimizer.init(self._params)
        self._reports: list[Any] = []
        self._how = _how(self.method)
        self._batches = data.train.batches(self.problem.training.batch, run.seed)
        self._program = jax.jit(self._stepped, static_argnames="solver")
        self._gradient = jax.jit(jax.grad(self._loss), static_argnames="solver")
        self._apply = jax.jit(partial(self.model.apply, solver=hbp.Solver()))

    @property
    def parameters(self) -> int:
        return models.trained(self._params)

    @cached_property
    def length(self) -> int:
        """Steps of a sequence."""
        return int(next(self._data.train.batches(1, self._run.seed)).inputs[0].shape[1])

    def fetch(self) -> None:
        """Make the next batch."""
        self._batch = next(self._batches)

    def step(self, step: int) -> Step:
        """Train on the batch that was fetched."""
        solver, rate = self.method.solver(step, self.steps), np.float32(self.problem.training.rate_at(step))
        if solver.tolerance is not None:
            solver = replace(solver, watch=self._reports.append)  # equal at each step, so that it is compiled once
        found = self._program(self._params, self._state, tuple(self._batch), rate, solver=solver)
        self._params, self._state, loss = jax.block_until_ready(found)
        jax.effects_barrier()
        rounds: list[Any] = [len(report.increments) - 1 for report in self._reports]
        self._reports.clear()
        sizes: Any = self.problem.sizes
        return Step(float(loss), rounds or [solver.iterations] * sizes.layers, [])

    def _stepped(self, params: Any, state: Any, batch: Any, rate: Any, solver: hbp.Solver) -> tuple[Any, Any, Any]:
        loss, gradient = jax.value_and_grad(self._loss)(params, batch, solver)
        found, state = self._optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, found), state, loss

    def _loss(self, params: Any, batch: Any, solver: hbp.Solver) -> Any:
        inputs, targets = batch
        return models.loss(self.problem.task, self.model.apply(params, *inputs, solver=solver, **self._how), targets)

    def validate(self) -> Mapping[str, float]:
        batches = self._data.validation.first(self._run.validated).once(max(self.problem.training.batch, 64))
        return models.validate(self.problem.task, self._apply, self._params, batches)

    def probe(self, iterations: tuple[int, ...]) -> Record:
        """On one batch, the same all through training."""
        batch = tuple(next(self._data.train.batches(self.problem.training.batch, 10_000 + self._run.seed)))
        *few, most = iterations
        solvers = hbp.Solver(), *map(hbp.Solver, few), hbp.Solver(most, watch=self._reports.append)
        exact, *others = jax.device_get([self._gradient(self._params, batch, solver=solver) for solver in solvers])
        jax.effects_barrier()
        shares = max((report.shares for report in self._reports), key=lambda shares: shares[-1])
        self._reports.clear()
        pairs = [(_agreement(found, exact), _agreement(found["layers"], exact["layers"])) for found in others]
        return {
            "k": list(iterations),
            "cosine": [_short(whole.cosine) for whole, _ in pairs],
            "error": [_short(whole.error) for whole, _ in pairs],
            "cosine_of_layers": [_short(inside.cosine) for _, inside in pairs],
            "increments": [_short(share) for share in shares],
        }

    def notes(self) -> Record:
        return {}

    @property
    def _identity(self) -> Record:
        leaves = jax.tree_util.tree_leaves_with_path(self._params)
        return identity(self._run, {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves})

    def save(self, path: Path, extra: Any) -> None:
        state = {"of": self._identity, "extra": extra, "model": jax.device_get((self._params, self._state))}
        path.write_bytes(pickle.dumps(state))

    def load(self, path: Path) -> Any:
        state = pickle.loads(path.read_bytes())
        compare(path, state.get("of", {}), self._identity)
        self._params, self._state = state["model"]
        extra = state["extra"]
        self._batches = self._data.train.batches(self.problem.training.batch, self._run.seed, extra.step)
        return extra


def _how(method: Backward) -> dict[str, Any]:
    """The split, as the models take it."""
    return {"residual": hbp.Zero()} if method.kind == "fixed-point" else {"rank": method.rank} if method.rank else {}


def _optimizer(how: Training) -> optax.GradientTransformation:
    """As PyTorch's; the rate is a factor of what it gives."""
    decay = optax.add_decayed_weights(how.weight_decay)
    adam = optax.scale_by_adam(how.momentum, how.beta2)
    parts = {"sgd": (decay, optax.trace(how.momentum)), "adam": (adam,), "adamw": (adam, decay)}[how.optimizer]
    clip = () if how.clip is None else (optax.clip_by_global_norm(how.clip),)
    return optax.chain(*clip, *parts)


def _agreement(found: Any, exact: Any) -> Agreement:
    return Agreement.of(jax.tree.leaves(found), jax.tree.leaves(exact), load("numpy").backend)


def _short(value: float) -> float:
    return float(f"{value:.7g}")
