"""What a checkpoint was written of, so that a run goes on from its own alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.experiment import Record

SHOWN = 3
"""At most so many differences are told."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be gone on from: one sentence for the person at the command line."""

    @classmethod
    def of(cls, path: Path, why: str) -> CheckpointError:
        """What is wrong with this file, and what to do."""
        return cls(f"{path} does not fit this run ({why}); give another --out, or delete that file to begin anew")


def identity(run: Any, shapes: Mapping[str, Any]) -> Record:
    """What must be equal for a training to go on: settings, and the shapes of all that is trained."""
    parts = {"task": run.problem.task, "sizes": run.problem.sizes, "training": run.problem.training}
    found = {f"{part}.{name}": value for part, of in parts.items() for name, value in asdict(of).items()}
    kinds = {part: type(of).__name__ for part, of in parts.items()}
    return {**kinds, **found, "steps": run.length_of_training, **{name: tuple(shape) for name, shape in shapes.items()}}


def compare(path: Path, saved: Record, own: Record) -> None:
    """CheckpointError where a checkpoint was written of something else than what is to go on."""
    names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    told = [f"{name} {saved.get(name)} instead of {own.get(name)}" for name in names[:SHOWN]]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise CheckpointError.of(path, ", ".join(told) + more)
