"""What an experiment is: pieces of work whose records do not depend on one another, and a view of those records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

Record: TypeAlias = dict[str, Any]
"""What a piece of work leaves behind, as JSON."""


@dataclass(frozen=True)
class Request:
    """What the command line asks of every experiment.

    Args:
        preset: the paper's sizes and data, or what two cores do in minutes on data that every machine has.
        backend: the front end that trains.
        seeds: how many, from 0.
        threads: CPU threads of each piece of work.
        steps: at most so many training steps, where given.
        data: a folder with the data sets of the paper.
    """

    preset: Literal["laptop", "paper"] = "laptop"
    backend: Literal["torch", "jax"] = "torch"
    seeds: int = 3
    threads: int = 1
    steps: int | None = None
    data: Path | None = None

    @property
    def identity(self) -> Record:
        """What must be equal for records to belong together; more seeds may come later."""
        return {"preset": self.preset, "backend": self.backend, "threads": self.threads, "steps": self.steps}


class Context(Protocol):
    """Where a piece of work is performed."""

    checkpoint: Path
    """A file that is its own, gone once the record is written."""
    earlier: float
    """To be set by a piece of work that goes on from there: the seconds that it took until that was written."""

    def advance(self, done: int, total: int, text: str = "") -> None:
        """Show how far it is; a piece of work calls this often, since it may be told to end there."""


class Work(Protocol):
    """A piece of work: a frozen, picklable value that says all about what is done, and so names its record."""

    @property
    def key(self) -> str:
        """Unique among all experiments, of letters, digits and ``. = + -``."""

    @property
    def what(self) -> str:
        """What is done, without the seed: equal for work that takes equally long."""

    @property
    def alone(self) -> bool:
        """Whether it measures time, so that nothing else may run beside it."""

    def check(self) -> int:
        """The bytes that its checkpoint takes; ValueError, OSError or ImportError where it could not be done at all."""

    def estimate(self) -> Record:
        """``seconds``, and ``how`` they were estimated; of a training also ``parameters``, ``steps`` and ``bytes``."""

    def perform(self, context: Context) -> Record:
        """Do it, going on from the context's checkpoint where that exists."""


@dataclass(frozen=True)
class Claim:
    """What is claimed, what was measured here, and whether both agree by a rule.

    Args:
        paper: the claim, the paper's unless it says otherwise.
        measured: in figures.
        rule: by which ``agrees`` was found.
        agrees: None where it cannot be told.
        limit: whether the claim says where the method does not work.
    """

    paper: str
    measured: str
    rule: str
    agrees: bool | None
    limit: bool = False


@dataclass(frozen=True)
class Section:
    """What a page shows of an experiment.

    Args:
        claims: one or more, computed from the records.
        text: Markdown.
        figures: by the name of the file, without ending.
    """

    claims: Sequence[Claim] = ()
    text: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A figure or table: its work, and the section made from the records of that work alone.

    Args:
        name: on the command line.
        title: on the page.
        work: what a request needs; pieces with equal keys are done once for all experiments.
        section: made from the records there are, by key; called with one at least.
    """

    name: str
    title: str
    work: Callable[[Request], Sequence[Work]]
    section: Callable[[Request, Mapping[str, Record]], Section]
