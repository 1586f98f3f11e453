"""How far Highway-BP's gradients of a model are from exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.depth.piece import Piece
from hbp.backends.torch.options import Ranked, Scheduled, ranked, scheduled
from hbp.backends.torch.recurrent.modules import GRU, LSTM
from hbp.backends.torch.stack.conversion import ConvertedForward
from hbp.backends.torch.stack.sequential import Sequential
from hbp.core.increments import Report
from hbp.core.solver import Solver
from hbp.diagnosis import Diagnosis, Settings, Spectrum, diagnosed
from hbp.directions import Rank

BACKEND = TorchBackend()


def diagnose(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    iterations: Sequence[int] = (0, 1, 2, 3, 5, 8),
    chunks: Sequence[int] = (1,),
    ranks: Sequence[int | Literal["auto"]] = (0,),
    target: float = 0.05,
    plot: str | Path | None = None,
) -> Diagnosis:
    """Compare Highway-BP's gradient of one batch with the exact one, for several k, chunks and ranks.

    All of the model's layers of this library and converted stacks take each setting in turn. Options, gradients,
    random state and buffers are afterwards what they were. Rows are printed as they come; then all settings are timed
    in turns, and the table is printed with the medians, and the spectra of recurrent weights beside the flat edge
    that `hbp.directions` judges them by. A fixed k with a rank now and then amplifies in training: give a tolerance
    beside it.

    Args:
        model: a module with layers of this library or converted ones.
        loss_fn: ``loss_fn(model, batch)``, a scalar tensor.
        batch: what it takes.
        iterations, chunks: the settings to try.
        ranks: of the GRUs and LSTMs, each with every k and chunk; "auto" is what rises above the flat edge and a
            few more.
        target: the relative error of the parameters' gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The figures: ``exact`` and ``rows``; ``within``, the rows within the target; ``recommended``, the fastest of
        those and exact backprop, to hand to `configure`; ``worse``, the rows whose rank is worse than none;
        ``spectra``; ``advice``.

    Raises:
        TypeError, ValueError: no such layers, none that takes a rank, no parameters that need gradients, a loss that is
            no finite scalar, counts or ranks that are none, or a target that is no number.
        ImportError, ValueError, OSError: the picture could not be drawn or written.

    >>> import hbp.backends.torch as hb
    >>> model = hb.Sequential(*(hb.Residual(nn.Linear(4, 4)) for _ in range(3)))
    >>> found = diagnose(model, lambda model, x: model(x).square().mean(), torch.randn(8, 4), iterations=(0, 3))
    ... # doctest: +ELLIPSIS
        k chunk  rank    error  cosine ...
    >>> round(found.rows[1].overall.error, 4), [row.iterations for row in found.within]
    (0.0, [3])
    >>> hb.configure(model, found.recommended)
    """
    layers = scheduled(model)
    check_one_process(layers.values())
    settings = Settings(iterations, chunks, target, plot, ranks)
    taking = ranked(layers, *settings.ranks)
    steps = Steps.of(model, loss_fn, batch, layers)
    with undisturbed(model, layers.values()):
        return diagnosed(settings, BACKEND, steps.gradient, steps.seconds, _spectra(taking))


def check_one_process(layers: Iterable[Scheduled]) -> None:
    """Raise ValueError where layers lie on several ranks."""
    if any(isinstance(part, Piece) for part in layers):
        raise ValueError(
            "the layers lie on several ranks, each of which would measure its own; measure the whole model on one "
            "process before, with the number of layers per rank as its chunk"
        )


def _spectra(layers: Mapping[str, Ranked]) -> dict[str, Spectrum]:
    """Of the recurrent weights of layers that take a rank, by the names of the parameters."""
    found = {}
    for name, layer in layers.items():
        for own in layer.recurrent_weights:
            weight = getattr(layer, own).detach()
            values = torch.linalg.svdvals(BACKEND.widened(weight)).tolist()
            found[f"{name}.{own}" if name else own] = Spectrum(tuple(values), tuple(weight.shape))
    return found


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
    followed: dict[tuple[str, Rank], Any] = field(default_factory=dict)
    """By a layer's name and a rank: what follows its directions, which a later step starts from, as in training."""

    @classmethod
    def of(cls, model: nn.Module, loss_fn: Any, batch: Any, layers: Mapping[str, Scheduled]) -> Steps:
        """Of a model with these layers; ValueError where no parameter needs gradients."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(f"no parameter of this {type(model).__name__} needs gradients")
        return cls(model, loss_fn, batch, layers, parameters, _grouped(model, parameters))

    def gradient(self, solver: Solver, rank: Rank = 0) -> tuple[dict[str, list[Tensor]], dict[str, Report]]:
        """The gradient by layer, and the reports of the backward passes."""
        found = dict(zip(self.parameters, self._run(solver, rank, watched=True)[1], strict=True))
        reports = {
            name: max(p.reports, key=lambda report: report.shares[-1]) for name, p in self.layers.items() if p.reports
        }
        return {group: [found[name] for name in names] for group, names in self.groups.items()}, reports

    def seconds(self, solver: Solver, rank: Rank = 0) -> float:
        """The duration of forward and backward."""
        return self._run(solver, rank, watched=False)[0]  # watching costs norms

    def _run(self, solver: Solver, rank: Rank, watched: bool) -> tuple[float, list[Tensor]]:
        """The duration of forward and backward, and the parameters' gradients."""
        for name, part in self.layers.items():
            part.solver, part.reports = solver, [] if watched else None
            if isinstance(part, Ranked):
                part.followed = self.followed.get((name, rank), ())
                if part.rank != rank:
                    part.rank = rank
                    self.followed[name, rank] = part.followed
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


@contextmanager
def undisturbed(model: nn.Module, layers: Iterable[Scheduled]) -> Iterator[None]:
    """Put the options of layers, the random state and the model's buffers back at the end."""
    names = ("solver", "reports", "verdict", "followed")
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
