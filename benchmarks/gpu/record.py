"""A step's results: one JSON, written anew after each part, so that what a process did before it ended is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.gpu.device import Origin

COMPLETE = "complete"
OUT_OF_TIME = "out of time"


@dataclass
class Record:
    """What is known of a step; `parts` by their names, in the order they ran."""

    path: Path
    origin: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None
    """The part at work, of which nothing is known yet."""
    since: float = 0.0
    """When it began, by `time.monotonic`, which all processes share."""
    ended: str | None = None
    """How its last process ended; None while one runs."""
    seconds: float = 0.0
    """Of all its processes."""

    @classmethod
    def of(cls, folder: Path, step: str, origin: Origin) -> Record:
        """What the folder holds of a step, or nothing yet.

        Raises:
            ValueError: it is of another device, commit or code, or no record.
        """
        path = folder / f"{step}.json"
        if not path.exists():
            return cls(path, asdict(origin))
        found = cls.read(path)
        if (other := origin.differs(found.origin)) is not None:
            raise ValueError(f"{path} holds results of {other}; give another --out")
        return found

    @classmethod
    def read(cls, path: Path) -> Record:
        """A record as it was written.

        Raises:
            ValueError: the file is no record.
        """
        try:
            found = json.loads(path.read_text())
            return cls(path, *(found[name] for name in ("origin", "parts", "running", "since", "ended", "seconds")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a step ({error}); give another --out") from None

    def write(self) -> None:
        """Replace the file at once, so that no reader sees half of it."""
        document = {name: value for name, value in vars(self).items() if name != "path"}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1) + "\n")
        new.replace(self.path)

    def begin(self, part: str) -> None:
        self.running, self.since = part, monotonic()
        self.write()

    def end(self, **found: Any) -> None:
        """Of the part at work: ``result``, ``failed`` with the reason, or ``skipped`` with the reason."""
        assert self.running is not None
        self.parts[self.running] = {"seconds": self._spent(), **found}
        self.running = None
        self.write()

    def cut_off(self, reason: str) -> None:
        """The process ended without a word: the part at work has failed."""
        if self.running is not None:
            self.parts[self.running] = {"seconds": self._spent(), "failed": reason, "cut": True}
            self.running = None
        self.ended = reason
        self.write()

    def retry(self, seconds: float) -> None:
        """Forget the parts that were cut off in less than so many seconds: they may only have begun late."""
        self.parts = {
            name: part for name, part in self.parts.items() if not part.get("cut") or part["seconds"] >= seconds
        }

    def _spent(self) -> float:
        return round(monotonic() - self.since, 2)

    def results(self) -> dict[str, Any]:
        """What the parts that worked returned."""
        return {name: part["result"] for name, part in self.parts.items() if "result" in part}

    def reasons(self, kind: str) -> dict[str, str]:
        """Of the parts that ``failed`` or were ``skipped``."""
        return {name: part[kind] for name, part in self.parts.items() if kind in part}

    @property
    def failed(self) -> bool:
        """Whether a part failed, or the last process ended otherwise than it should."""
        return bool(self.reasons("failed")) or self.ended not in (None, COMPLETE, OUT_OF_TIME)

    @property
    def complete(self) -> bool:
        """Whether every part has an end, good or not."""
        return self.ended == COMPLETE
