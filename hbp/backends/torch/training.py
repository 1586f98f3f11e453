"""What all layers of this front end share: iterations that a schedule may change from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hbp.core.backend import check_count
from hbp.core.increments import Report
from hbp.core.schedule import Schedule


class Scheduled:
    """Highway-BP's ``iterations`` (a number, a `Schedule`, or None for exact) and ``chunk``, as plain attributes."""

    iterations: int | Schedule | None = None
    chunk: int = 1
    training_step: int = 0
    reports: list[Report] | None = None
    """Where a list, each backward pass appends the report on its increments."""

    def current(self) -> tuple[int | None, int]:
        """The iterations at this training step, and the chunk, checked.

        Raises:
            TypeError, ValueError: they are no non-negative and positive integers.
        """
        k = self.iterations(self.training_step) if isinstance(self.iterations, Schedule) else self.iterations
        return None if k is None else check_count("iterations", k, 0), check_count("chunk", self.chunk, 1)

    def watch(self) -> Callable[[Report], None] | None:
        """What takes the reports, where somebody wants them."""
        return None if self.reports is None else self.reports.append


def set_iterations(module: nn.Module, iterations: int | Schedule | None) -> None:
    """Set ``iterations`` on all of this library's layers and converted stacks inside a module.

    Raises:
        ValueError: there is none.
    """
    for layers in scheduled(module).values():
        layers.iterations = iterations
        layers.current()


def step(module: nn.Module) -> None:
    """Advance the schedules of all of this library's layers inside a module by one training step."""
    for layers in scheduled(module).values():
        layers.training_step += 1


def follow(optimizer: torch.optim.Optimizer, module: nn.Module) -> Any:
    """Let each ``optimizer.step()`` call `step` on the module, instead of calling it by hand.

    Returns:
        A handle whose ``remove()`` ends this.

    >>> import hbp, hbp.backends.torch as hb
    >>> layer = hb.GRU(2, 2, iterations=hbp.Schedule({0: 1, 2: 3}))
    >>> optimizer = torch.optim.SGD(layer.parameters())
    >>> handle = follow(optimizer, layer)
    >>> optimizer.step(), optimizer.step(), layer.current()[0]
    (None, None, 3)
    """
    scheduled(module)
    return optimizer.register_step_post_hook(lambda *_: step(module))


def scheduled(module: nn.Module) -> dict[str, Scheduled]:
    """All of this library's layers and converted stacks inside a module, by the name of the first module of each.

    Raises:
        ValueError: there is none.
    """
    found: dict[int, tuple[str, Scheduled]] = {}
    for name, part in module.named_modules():
        # A converted layer's forward is a callable that knows its stack (hbp.backends.torch.conversion).
        layers = part if isinstance(part, Scheduled) else getattr(part.__dict__.get("forward"), "stack", None)
        if isinstance(layers, Scheduled):
            found.setdefault(id(layers), (name, layers))
    if not found:
        raise ValueError(
            f"a {type(module).__name__} without any of hbp's layers; build it with those of hbp, or use convert"
        )
    return dict(found.values())
