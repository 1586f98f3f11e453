"""The steps, in order of worth: what a later one needs, and what decides most, comes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Origin
from benchmarks.gpu.record import Record


@dataclass(frozen=True)
class Step:
    """One of the things to find out."""

    name: str
    parts: str
    """The function that yields its `Part`s, from `There`: "module:function"."""
    seconds: float
    """Its time limit."""
    what: str
    rehearsed: float = 240.0
    """The same in a rehearsal, whose parts are tiny: many times what they take on a slow machine."""

    def limit(self, rehearse: bool) -> float:
        return self.rehearsed if rehearse else self.seconds


@dataclass(frozen=True)
class Part:
    """The smallest piece that is run, written and counted as done."""

    name: str
    run: Callable[[], Any]
    only: str | None = None
    """Why it can run on a device alone; None where it can be rehearsed."""


class WrongError(Exception):
    """A part that came to its end, and found something wrong."""

    def __init__(self, what: str, result: Any) -> None:
        super().__init__(what)
        self.result = result


@dataclass(frozen=True)
class There:
    """What a step is told: where results lie, and whether there is a device."""

    folder: Path
    origin: Origin
    rehearse: bool
    deadline: float
    """When the step ends, by `time.monotonic`."""
    end: float
    """When the call of the command ends."""

    def results(self, step: str) -> dict[str, Any]:
        """What a step before this one found; empty where it did not run."""
        path = self.folder / f"{step}.json"
        return Record.read(path).results() if path.exists() else {}


STEPS = (
    Step("machine", "benchmarks.gpu.machine:parts", 90, "versions, copy bandwidth, product rates"),
    Step("correctness", "benchmarks.gpu.correctness:parts", 300, "tests of the kernels, races, memory errors"),
    Step("search", "benchmarks.gpu.search:parts", 150, "block sizes of the kernels"),
    Step("scan", "benchmarks.gpu.speed:scan", 150, "the suffix scan against copy bandwidth"),
    Step("rnn", "benchmarks.gpu.speed:rnn", 300, "GRU and LSTM against cuDNN"),
    Step("rank", "benchmarks.gpu.speed:rank", 90, "the same with strong directions in the residual path"),
    Step("stack", "benchmarks.gpu.speed:stack", 90, "small residual layers against autograd and lax.scan"),
    Step("blocks", "benchmarks.gpu.speed:blocks", 60, "transformer blocks of GPT-2-small's width"),
    Step("memory", "benchmarks.gpu.speed:memory", 60, "bytes kept for the backward pass, and the peak"),
    Step("training", "benchmarks.gpu.training:parts", 150, "a character model: loss against time"),
    Step("graphs", "benchmarks.gpu.graphs:parts", 60, "whole steps as CUDA graphs"),
)
BY_NAME: Mapping[str, Step] = {step.name: step for step in STEPS}
