"""What all layers of this front end share: iterations that a schedule may change from step to step."""

from __future__ import annotations

import torch

from hbp.core.backend import check_count
from hbp.core.schedule import Schedule


class Scheduled(torch.nn.Module):
    """A module with Highway-BP's ``iterations`` (a number, a `Schedule`, or None for exact) and ``chunk``."""

    iterations: int | Schedule | None = None
    chunk: int = 1
    training_step: int = 0

    def current(self) -> tuple[int | None, int]:
        """The iterations at this training step, and the chunk, checked.

        Raises:
            TypeError, ValueError: they are no non-negative and positive integers.
        """
        k = self.iterations(self.training_step) if isinstance(self.iterations, Schedule) else self.iterations
        return None if k is None else check_count("iterations", k, 0), check_count("chunk", self.chunk, 1)


def set_iterations(module: torch.nn.Module, iterations: int | Schedule | None) -> None:
    """Set ``iterations`` on all of this library's layers inside a module.

    Raises:
        ValueError: there is none.
    """
    for layer in _own_layers(module):
        layer.iterations = iterations
        layer.current()


def step(module: torch.nn.Module) -> None:
    """Advance the schedules of all of this library's layers inside a module by one training step."""
    for layer in _own_layers(module):
        layer.training_step += 1


def _own_layers(module: torch.nn.Module) -> list[Scheduled]:
    found = [layer for layer in module.modules() if isinstance(layer, Scheduled)]
    if not found:
        raise ValueError(f"a {type(module).__name__} without any of hbp's layers; build it with those of hbp")
    return found
