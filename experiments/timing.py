"""Times of several ways to one result, in interleaved rounds, each beside the error of what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from benchmarks.measure import Method, Row, agreement, first_calls, time_all
from experiments.experiment import Record

KEPT = ("method", "k", "chunk", "exact", "error", "cosine", "forward_ms", "backward_ms", "whole_ms")
"""What a record holds of each way; times are [median, lower, upper quartile]."""
TOLERANCE = 1e-3
"""The largest relative error of a way that is exact, in float32."""


@dataclass(frozen=True)
class Measurement:
    """A piece of work that measures this machine with one model, and has it to itself; there is nothing to go on from.

    Args:
        name: the model's, on the page.
        backend: what runs.
    """

    kind: ClassVar[str]
    alone: ClassVar[bool] = True
    name: str
    backend: str

    @property
    def what(self) -> str:
        return f"{self.kind}-{self.name.lower().replace(', ', '-').replace(' ', '-')}"

    @property
    def key(self) -> str:
        return self.what

    def check(self) -> int:
        return 0


def timed(methods: Sequence[Method], exact: Any, rounds: int, advance: Callable[[int, int], None]) -> list[Record]:
    """Each way's error against the exact result, and its times; no times without rounds.

    Raises:
        RuntimeError: a way failed, or one that is exact is not.
    """
    pairs = [(Row.of("", {}, method), method) for method in methods]
    done, total = 0, len(pairs) * (rounds + 1)

    def step() -> None:
        nonlocal done
        done += 1
        advance(done, total)

    for row, _, found in first_calls(pairs):
        agreed = agreement(found, exact)
        row.error, row.cosine = agreed.error, agreed.cosine
        if row.exact and not agreed.error < TOLERANCE:
            row.failed = f"relative error {agreed.error:.1e}"
        step()
    if failed := [f"{row.method}: {row.failed}" for row, _ in pairs if row.failed]:
        raise RuntimeError("; ".join(failed))
    if rounds:
        time_all(pairs, rounds, step)
    return [{name: value for name, value in asdict(row).items() if name in KEPT} for row, _ in pairs]


def pick(rows: Sequence[Record], method: str, k: int | None = None) -> Record:
    """The row of a way."""
    return next(row for row in rows if row["method"] == method and row["k"] == k)
