"""A folder of records: what belongs together, written so that a kill at any moment leaves whole files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.measure import library
from experiments.experiment import Record, Request, Work

DOCUMENT = "experiments.json"
SPARE = 32 << 20
"""Bytes that a disk must have left beside what the checkpoints need."""


@dataclass(frozen=True)
class Folder:
    """The records of one request's experiments, with where they come from."""

    path: Path

    def open(self, request: Request, needed: int = 0) -> None:
        """Make the folder, or see that it belongs to this request.

        Args:
            request: whose records it holds.
            needed: bytes that the checkpoints take at a time.

        Raises:
            ValueError, OSError: it holds something else, cannot be written, or the disk is full.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file; give a folder")
        document = self.document()
        if document is None and self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"--out {self.path} holds other things than experiments; give a new or an empty folder")
        if document is not None and document["request"] != request.identity:
            old, new = document["request"], request.identity
            others = ", ".join(
                f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]
            )
            raise ValueError(f"--out {self.path} belongs to other settings ({others}); give another folder")
        for part in ("records", "checkpoints"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed + SPARE:
            raise OSError(
                f"the disk of --out {self.path} has {free / 1e6:.0f} MB left and {(needed + SPARE) / 1e6:.0f} MB are "
                "needed; make room or give another folder"
            )
        if document is None:
            there = environment([library(request.backend)], with_limits=False)
            write(self.path / DOCUMENT, {"request": request.identity, "environment": there})

    def document(self) -> Record | None:
        """The request and the environment; None where there is none.

        Raises:
            ValueError: the file is no such document.
        """
        return _read(self.path / DOCUMENT) if (self.path / DOCUMENT).exists() else None

    def has(self, work: Work) -> bool:
        """Whether this work is done; a record of work beside others does not count where a time is wanted."""
        path = self.record(work.key)
        return path.exists() and (not work.alone or _read(path)["alone"])

    def record(self, key: str) -> Path:
        """The file of a record."""
        return self.path / "records" / f"{key}.json"

    def checkpoint(self, key: str) -> Path:
        """The file of a checkpoint."""
        return self.path / "checkpoints" / key

    def records(self) -> dict[str, Record]:
        """All there are, by key.

        Raises:
            ValueError: one is no record.
        """
        return {path.stem: _read(path) for path in sorted((self.path / "records").glob("*.json"))}


def write(path: Path, value: Any) -> None:
    """Write JSON to a file that is whole at every moment."""
    text = json.dumps(value, indent=None, separators=(",", ":"), allow_nan=False)
    replace(path, lambda target: target.write_text(text + "\n"))


def replace(path: Path, save: Any) -> None:
    """Let ``save`` write a file beside, and put that in place of ``path`` once it lies on the disk."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> Record:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no record of experiments: {error}; remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no record of experiments; remove it")
    return found
