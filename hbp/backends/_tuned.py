"""Times measured at a few sizes, by the way to do one thing, and their files: what ``hbp tune`` writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile

VARIABLE = "HBP_TUNED"
MARGIN = 0.95
"""The part of the first way's time that another must stay below to be taken instead."""


@dataclass(frozen=True)
class Timing:
    """What the ways to do one thing took at one size."""

    task: str
    """As "gru forward"."""
    library: str
    """Whose arrays and products: "numpy" or "torch"; "torch, plain" is without compiled loops."""
    rows: int
    """The batch size; of a stack, the numbers in a state."""
    width: int
    """The hidden size; of a stack, a layer's parameters."""
    seconds: Mapping[str, float]
    """By the way: those of one step, in float32."""
    once: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each call beside its steps', by the way, where they are known apart."""
    source: str = ""
    """Whose they are, where not its file's."""

    def per_step(self, way: str, steps: float = math.inf) -> float:
        """The seconds of each of so many steps."""
        return self.seconds[way] + self.once.get(way, 0.0) / max(steps, 1)

    def best(self, among: tuple[str, ...], steps: float = math.inf) -> str:
        """The fastest of those of some ways that were measured, where it saves enough; else the first of them."""
        times = {way: self.per_step(way, steps) for way in among if way in self.seconds}
        first, way = next(iter(times)), min(times, key=times.__getitem__)
        return way if times[way] < MARGIN * times[first] else first


@dataclass(frozen=True)
class Timings:
    """All times of a file."""

    source: str
    """For people: whose they are, where a row does not say."""
    rows: tuple[Timing, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Whose the rows are, each once."""
        return tuple(dict.fromkeys(row.source or self.source for row in self.rows))

    def nearest(self, task: str, library: str, rows: int, width: int) -> Timing | None:
        """The times at the size nearest to this one, by its ratios; None where the task was not measured."""

        def distance(row: Timing) -> float:
            return math.hypot(math.log(row.rows / max(rows, 1)), math.log(row.width / max(width, 1)))

        return min((row for row in self.rows if (row.task, row.library) == (task, library)), key=distance, default=None)


def read(path: Path) -> Timings:
    """Times from a file.

    Raises:
        ValueError, OSError: it is none that ``hbp tune`` writes, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Timing(**row) for row in found["rows"])
        sound = all(
            row.seconds
            and all(n > 0 for n in (row.rows, row.width, *row.seconds.values()))
            and all(n >= 0 for n in row.once.values())
            for row in rows
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of hbp tune ({error}); delete it, or run hbp tune again") from error
    except OSError as error:
        raise OSError(
            f"the times in {str(path)!r} cannot be read: {error.strerror}; give {VARIABLE} a file that hbp tune "
            "--output wrote, or 'shipped'"
        ) from error
    if not sound:
        raise ValueError(f"{path} has sizes or times that are not above 0; delete it, or run hbp tune again")
    return Timings(str(found.get("source", path)), rows)


def check_writable(path: Path) -> None:
    """Make the folder of a file to be written.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror}; give another file with --output") from error


def write(path: Path, found: Timings) -> None:
    """Times to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(_said(row, found.source)) for row in found.rows)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(f'{{"source": {json.dumps(found.source)}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    beside.replace(path)


def _said(row: Timing, source: str) -> dict[str, object]:
    """A row as JSON: times to three digits, without a source that is its file's."""
    said = {**asdict(row), "seconds": _short(row.seconds), "once": _short(row.once)}
    own = row.source not in ("", source)
    return said if own else {name: value for name, value in said.items() if name != "source"}


def _short(seconds: Mapping[str, float]) -> dict[str, float]:
    return {way: float(f"{time:.3g}") for way, time in seconds.items()}
