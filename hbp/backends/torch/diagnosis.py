"""How far Highway-BP's gradients of a model are from exact, and which damping suits its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.depth.piece import Piece
from hbp.backends.torch.options import Scheduled, scheduled
from hbp.backends.torch.recurrent.modules import GRU, LSTM
from hbp.backends.torch.stack.conversion import ConvertedForward
from hbp.backends.torch.stack.graphs import Call
from hbp.backends.torch.stack.options import Stack
from hbp.backends.torch.stack.run import recorded
from hbp.backends.torch.stack.sequential import Sequential
from hbp.core.backend import check_count
from hbp.core.increments import Report
from hbp.core.solver import Solver
from hbp.diagnosis import Diagnosis, Settings, diagnosed

BACKEND = TorchBackend()


def diagnose(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    iterations: Sequence[int] = (0, 1, 2, 3, 5, 8),
    chunks: Sequence[int] = (1,),
    target: float = 0.05,
    plot: str | Path | None = None,
) -> Diagnosis:
    """Compare Highway-BP's gradient of one batch with the exact one, for several k and chunks.

    All of the model's layers of this library and converted stacks take each setting in turn. Options, gradients,
    random state and buffers are afterwards what they were. Rows are printed as they come; then all settings are timed
    in turns, and the table is printed with the medians.

    Args:
        model: a module with layers of this library or converted ones.
        loss_fn: ``loss_fn(model, batch)``, a scalar tensor.
        batch: what it takes.
        iterations, chunks: the settings to try.
        target: the relative error of the parameters' gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The figures: ``exact`` and ``rows``; ``within``, the rows within the target; ``recommended``, the fastest of
        those and exact backprop, to hand to `configure`; ``advice``.

    Raises:
        ValueError: no such layers, no parameters that need gradients, a loss that is no finite scalar, counts that are
            none, or a target that is no number.
        ImportError, ValueError, OSError: the picture could not be drawn or written.

    >>> import hbp.backends.torch as hb
    >>> model = hb.Sequential(*(hb.Residual(nn.Linear(4, 4)) for _ in range(3)))
    >>> found = diagnose(model, lambda model, x: model(x).square().mean(), torch.randn(8, 4), iterations=(0, 3))
    ... # doctest: +ELLIPSIS
        k  chunk     error   cosine ...
    >>> round(found.rows[1].overall.error, 4), [row.iterations for row in found.within]
    (0.0, [3])
    >>> hb.configure(model, found.recommended)
    """
    layers = scheduled(model)
    check_one_process(layers.values())
    settings = Settings(iterations, chunks, target, plot)
    steps = Steps.of(model, loss_fn, batch, layers)
    with undisturbed(model, layers.values()):
        return diagnosed(settings, BACKEND, steps.gradient, steps.seconds)


def check_one_process(layers: Iterable[Scheduled]) -> None:
    """Raise ValueError where layers lie on several ranks."""
    if any(isinstance(part, Piece) for part in layers):
        raise ValueError(
            "the layers lie on several ranks, each of which would measure its own; measure the whole model on one "
            "process before, with the number of layers per rank as its chunk"
        )


def estimate_damping(stack: nn.Module, batch: Any, *, samples: int = 8, assign: bool = False) -> list[float]:
    """Estimate each layer's damping gamma, which brings the residual map (1 - gamma) R nearest to its Jacobian.

    The least-squares choice is 1 - gamma = <R, J> / <R, R>, whose inner products of matrices are estimated by pulling
    random signs back (Hutchinson). For R = I that is gamma = -tr(B) / d with the block B = J - I.

    Args:
        stack: a `Sequential`, or a module with one converted stack; its residual maps count undamped.
        batch: the module's input: a tensor, or a tuple or mapping of arguments.
        samples: random vectors per layer.
        assign: set the stack's ``damping`` to the result.

    Returns:
        gamma of each layer.

    Raises:
        ValueError: no stack, or several; nothing that needs gradients.

    >>> import hbp.backends.torch as hb
    >>> halving = nn.Linear(4, 4, bias=False)
    >>> halving.weight = nn.Parameter(0.5 * torch.eye(4))  # the whole layer: J = I / 2
    >>> estimate_damping(hb.Sequential(halving, halving), torch.ones(3, 4))
    [0.5, 0.5]
    """
    check_count("samples", samples, 1)
    layers = one_stack(stack, "give a module with one")
    check_one_process([layers])

    def run() -> None:
        if isinstance(batch, Mapping):
            stack(**batch)
        else:
            stack(*batch) if isinstance(batch, tuple | list) else stack(batch)

    with undisturbed(stack, [layers]), torch.enable_grad():
        calls = calls_of(layers, run)
        first = calls[0].start
        residual = layers.residual_maps(calls, first, damped=False)
        generator = torch.Generator(first.device).manual_seed(0)
        gammas = []
        for i, call in enumerate(calls):
            inner = size = 0.0
            for _ in range(samples):
                signs = torch.randint(0, 2, first.shape, generator=generator, device=first.device)
                v = (2 * signs - 1).to(first.dtype)
                along = residual[i].T.mv(v)
                options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                (pulled,) = torch.autograd.grad(call.ends[0], call.start, v, **options)
                inner += float((along * pulled).sum())
                size += float(along.square().sum())
            gammas.append(1 - inner / size if size else 0.0)
    if assign:
        layers.damping = gammas
    return gammas


@dataclass(frozen=True)
class Steps:
    """Forward and backward passes of a model on one batch, with one solver or another in all of its layers."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any
    layers: Mapping[str, Scheduled]
    parameters: Mapping[str, Tensor]
    groups: Mapping[str, Sequence[str]]
    """The parameters' names by layer."""

    @classmethod
    def of(cls, model: nn.Module, loss_fn: Any, batch: Any, layers: Mapping[str, Scheduled]) -> Steps:
        """Of a model with these layers; ValueError where no parameter needs gradients."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(f"no parameter of this {type(model).__name__} needs gradients")
        return cls(model, loss_fn, batch, layers, parameters, _grouped(model, parameters))

    def gradient(self, solver: Solver) -> tuple[dict[str, list[Tensor]], dict[str, Report]]:
        """The gradient by layer, and the reports of the backward passes."""
        found = dict(zip(self.parameters, self._run(solver, watched=True)[1], strict=True))
        reports = {
            name: max(p.reports, key=lambda report: report.shares[-1]) for name, p in self.layers.items() if p.reports
        }
        return {group: [found[name] for name in names] for group, names in self.groups.items()}, reports

    def seconds(self, solver: Solver) -> float:
        """The duration of forward and backward."""
        return self._run(solver, watched=False)[0]  # watching costs norms

    def _run(self, solver: Solver, watched: bool) -> tuple[float, list[Tensor]]:
        """The duration of forward and backward, and the parameters' gradients."""
        for part in self.layers.values():
            part.solver, part.reports = solver, [] if watched else None
        with _restored(self.model), torch.enable_grad():
            start = time.perf_counter()
            loss = self.loss_fn(self.model, self.batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                kind = type(loss).__name__
                raise ValueError(f"loss_fn returned a {kind}; give a function of (model, batch) -> scalar")
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()}; a diagnosis needs a finite one")
            given = list(self.parameters.values())
            found = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
            float(found[0].sum())  # waits for the device
            return time.perf_counter() - start, list(found)


def one_stack(model: nn.Module, cure: str) -> Stack:
    """The stack inside a model; ValueError unless there is one."""
    found = [layers for layers in scheduled(model).values() if isinstance(layers, Stack)]
    if len(found) != 1:
        raise ValueError(f"this {type(model).__name__} has {len(found)} stacks; {cure}")
    return found[0]


def calls_of(layers: Stack, run: Callable[[], Any]) -> list[Call]:
    """The calls of a stack's layers while something runs, each with its graph; ValueError where there are none."""
    layers.solver = Solver(0)
    with recorded() as seen:
        run()
    calls = [call for owner, call in seen if owner is layers]
    if not calls:
        raise ValueError("no layer of the stack ran with gradients; let a parameter or the input need them")
    return calls


@contextmanager
def undisturbed(model: nn.Module, layers: Iterable[Scheduled]) -> Iterator[None]:
    """Put the options of layers, the random state and the model's buffers back at the end."""
    names = ("solver", "reports", "verdict")
    before = [(part, {name: getattr(part, name) for name in names if hasattr(part, name)}) for part in layers]
    try:
        with _restored(model):
            yield
    finally:
        for part, options in before:
            for name, value in options.items():
                setattr(part, name, value)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put the random state and the model's buffers back at the end."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def _grouped(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The parameters' names by the layer they belong to, those outside of all layers under "rest"."""
    names = []
    for name, part in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, Sequential):
            names += [prefix + child for child, _ in part.named_children()]
        elif isinstance(part, GRU | LSTM) or isinstance(part.__dict__.get("forward"), ConvertedForward):
            names.append(name)
    groups: dict[str, list[str]] = {}
    for parameter in parameters:
        owners = [name for name in names if not name or parameter.startswith(f"{name}.")]
        groups.setdefault(max(owners, key=len, default="rest"), []).append(parameter)
    return groups
