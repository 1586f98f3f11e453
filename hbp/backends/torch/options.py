"""What all layers of this front end share: iterations that a schedule may change from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from hbp.core.increments import Report
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver
from hbp.diagnosis import Row
from hbp.directions import Rank


class _Field:
    """A field of a layer's solver as an attribute of the layer: setting it makes another solver, checked."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Scheduled | None, owner: type) -> Any:
        return self if layer is None else getattr(layer.solver, self.name)

    def __set__(self, layer: Scheduled, value: Any) -> None:
        layer.solver = replace(layer.solver, **{self.name: value})


class Scheduled:
    """A layer or stack with a `Solver`, of which ``iterations`` (a `Schedule` too), ``chunk`` and ``tolerance`` are
    attributes.
    """

    _solver: Solver = Solver()
    iterations = _Field()
    chunk = _Field()
    tolerance = _Field()
    training_step: int = 0
    reports: list[Report] | None = None
    """Where a list, each backward pass appends the report on its increments."""

    @property
    def solver(self) -> Solver:
        """How the backward pass is solved."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        if not isinstance(solver, Solver):
            raise TypeError(f"solver is a {type(solver).__name__}; give an hbp.Solver, as hbp.Solver(iterations=3)")
        self._solver = solver

    def current(self) -> Solver:
        """The solver of this training step."""
        solver = self.solver.at(self.training_step)
        return solver if self.reports is None else solver.watched(self.reports.append)

    def __prepare_scriptable__(self) -> None:  # what torch.jit.script asks a module for first
        raise RuntimeError(
            f"torch.jit.script cannot compile hbp's {type(self).__name__}; load its state_dict into torch's own layer, "
            "or use torch.export with iterations=None"
        )


class Ranked(Scheduled):
    """A layer whose residual path may take strong directions of its weights: ``rank`` is an attribute."""

    rank: Any
    followed: tuple[Any, ...] = ()
    """What follows these directions, where there is a rank."""

    @property
    def recurrent_weights(self) -> list[str]:
        """The names of the parameters of which it takes directions."""
        raise NotImplementedError

    def check_rank(self, rank: Any) -> Rank:
        """The rank, checked for this layer; TypeError or ValueError where it takes none such."""
        raise NotImplementedError


def configure(module: nn.Module, setting: Solver | Row) -> None:
    """Set iterations, chunk and tolerance on all of this library's layers and converted stacks inside a module.

    Args:
        module: a module with such layers.
        setting: all three, as an `hbp.Solver`, which leaves ranks as they are, or a row of a diagnosis, which sets the
            rank too, on the layers that take one.

    Raises:
        TypeError, ValueError: there are no such layers, none that takes a rank where the row has one, or it is no
            setting; nothing is set then.

    >>> import hbp, hbp.backends.torch as hb
    >>> model = nn.Sequential(hb.GRU(2, 2), nn.Linear(2, 2))
    >>> configure(model, hbp.Solver(iterations=3, chunk=8))
    >>> model[0].iterations, model[0].chunk, model[0].tolerance
    (3, 8, None)
    """
    solver: Any = setting.solver if isinstance(setting, Row) else setting
    if not isinstance(solver, Solver):
        kind = type(setting).__name__
        raise TypeError(
            f"setting is a {kind}; give an hbp.Solver, or a row, as diagnose(...).recommended; a number of iterations "
            "or a schedule alone goes to set_iterations"
        )
    found, ranks = scheduled(module), [setting.rank] if isinstance(setting, Row) else []
    taking = ranked(found, *ranks).values()
    for layers in found.values():
        layers.solver = solver
    for layer, rank in product(taking, ranks):
        layer.rank = rank


def ranked(layers: Mapping[str, Scheduled], *ranks: Any) -> dict[str, Ranked]:
    """Those of a module's layers that take a rank, by name, after checking that they take these.

    Raises:
        TypeError, ValueError: there is none, for another rank than 0, or it does not take one of them.
    """
    found = {name: part for name, part in layers.items() if isinstance(part, Ranked)}
    asked = [rank for rank in ranks if rank]
    if asked and not found:
        kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in layers.values()))
        raise ValueError(f"rank={asked[0]!r}: no layer here takes a rank, a GRU or an LSTM would ({kinds}); give 0")
    for part in found.values():
        for rank in ranks:
            part.check_rank(rank)
    return found


def set_iterations(module: nn.Module, iterations: int | Schedule | None) -> None:
    """Set ``iterations`` on all of this library's layers and converted stacks inside a module.

    Raises:
        TypeError, ValueError: there is none, or it is no number of iterations; nothing is set then.

    >>> import hbp.backends.torch as hb
    >>> model = nn.Sequential(hb.GRU(2, 2, chunk=4), nn.Linear(2, 2))
    >>> set_iterations(model, 3)
    >>> model[0].solver
    Solver(iterations=3, chunk=4, tolerance=None)
    """
    found = scheduled(module).values()
    for layers, solver in [(layers, replace(layers.solver, iterations=iterations)) for layers in found]:
        layers.solver = solver


def step(module: nn.Module) -> None:
    """Advance the schedules of all of this library's layers inside a module by one training step.

    Raises:
        TypeError, ValueError: it is no module, or has no such layers.

    >>> import hbp, hbp.backends.torch as hb
    >>> layer = hb.GRU(2, 2, iterations=hbp.Schedule({0: 1, 1: None}))
    >>> step(layer)
    >>> layer.current().exact
    True
    """
    for layers in scheduled(module).values():
        layers.training_step += 1


def follow(optimizer: torch.optim.Optimizer, module: nn.Module) -> Any:
    """Let each ``optimizer.step()`` call `step` on the module, instead of calling it by hand.

    Returns:
        A handle whose ``remove()`` ends this.

    Raises:
        TypeError, ValueError: it is no optimizer, no module, or a module without such layers.

    >>> import hbp, hbp.backends.torch as hb
    >>> layer = hb.GRU(2, 2, iterations=hbp.Schedule({0: 1, 2: 3}))
    >>> optimizer = torch.optim.SGD(layer.parameters())
    >>> handle = follow(optimizer, layer)
    >>> optimizer.step(), optimizer.step(), layer.current().iterations
    (None, None, 3)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    scheduled(module)
    return optimizer.register_step_post_hook(lambda *_: step(module))


def scheduled(module: nn.Module) -> dict[str, Scheduled]:
    """All of this library's layers and converted stacks inside a module, by the name of the first module of each.

    Raises:
        TypeError, ValueError: it is no module, or there is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; give a torch.nn.Module with layers of hbp")
    found: dict[int, tuple[str, Scheduled]] = {}
    for name, part in module.named_modules():
        # A converted layer's forward is a callable that knows its stack (hbp.backends.torch.stack.conversion).
        layers = part if isinstance(part, Scheduled) else getattr(part.__dict__.get("forward"), "stack", None)
        if isinstance(layers, Scheduled):
            found.setdefault(id(layers), (name, layers))
    if not found:
        raise ValueError(
            f"a {type(module).__name__} without any of hbp's layers; build it with those of hbp, or use convert (scan "
            "is a function, which takes its solver= at each call)"
        )
    return dict(found.values())
