"""What is recorded of a training while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from experiments.experiment import Record
from experiments.methods import block_steps


@dataclass(frozen=True)
class Step:
    """What a training step did.

    Args:
        loss: before it.
        rounds: of each backward pass through layers; None: exact.
        measured: likewise, of what was pulled back to choose how.
    """

    loss: float
    rounds: list[int | None]
    measured: list[int | None]


@dataclass
class History:
    """What is recorded, up to some step."""

    step: int = 0
    seconds: float = 0.0
    performed: float = 0.0
    """Seconds of all that was done, validation and probes too, up to the last checkpoint."""
    block_steps: int = 0
    rounds: int = 0
    passes: int = 0
    """Backward passes by Highway-BP, and their rounds in all."""
    pending: list[float] = field(default_factory=list)
    """The losses since the last point."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    validation: dict[str, list[float | None]] = field(default_factory=dict)
    probes: list[Record] = field(default_factory=list)

    def count(self, done: Step, length: int, chunk: int, sources: bool) -> None:
        """Add a step's loss, rounds and block steps."""
        self.pending.append(done.loss)
        self.block_steps += sum(block_steps(length, k, chunk, sources) for k in (*done.rounds, *done.measured))
        counted = [k for k in done.rounds if k is not None]
        self.rounds += sum(counted)
        self.passes += len(counted)

    def point(self, target: dict[str, list[Any]], **values: float) -> None:
        """Add values to a curve, with the step and both clocks."""
        clocks = {"step": self.step, "seconds": round(self.seconds, 4), "block_steps": self.block_steps}
        for name, value in {**clocks, **values}.items():
            kept = value if isinstance(value, int) else float(f"{value:.7g}")
            target.setdefault(name, []).append(kept if math.isfinite(kept) else None)


def due(step: int, steps: int, times: int) -> bool:
    """Whether one of so many evenly spread moments of a training comes after this step."""
    return step * min(times, steps) // steps > (step - 1) * min(times, steps) // steps
