"""Whole steps recorded as CUDA graphs: what is left of a time when nothing is launched one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks import rnn as recurrent
from benchmarks.gpu.correctness import passed
from benchmarks.gpu.machine import libraries
from benchmarks.gpu.speed import ROUNDS, under
from benchmarks.gpu.steps import Part, There
from benchmarks.measure import Method, Row, agreement, first_calls, time_all

CASES = [{"cell": cell, "T": T, "B": 1, "H": 512, "weights": 1.0} for T in (1024, 4096) for cell in recurrent.BOTH]
TINY = {"cell": "gru", "T": 20, "B": 2, "H": 4, "weights": 1.0}


def parts(there: There) -> Iterator[Part]:
    """One for each case."""
    for case in [TINY] if there.rehearse else CASES:
        title = " ".join(f"{name}={case[name]}" for name in ("cell", "T", "B", "H"))
        yield Part(title, partial(_rows, there, case), "a CPU has no graphs of launches")


def _rows(there: There, case: dict[str, Any]) -> list[dict[str, Any]]:
    lib = next(lib for lib in libraries(there) if lib.name == "torch")
    names = ",".join(name for name in passed(there) if name.startswith("torch.")) or "off"
    exact = recurrent.reference(case, lib=lib)
    pairs = []
    for method in recurrent.methods(case, lib):
        if method.name.startswith(("torch.nn", "Highway-BP")) and (method.chunk, method.k) in (
            (None, None),
            (1, 1),
            (1, 3),
        ):
            value = "off" if method.k is None else names
            for name, one in ((method.name, method), (f"{method.name}, CUDA graph", recorded(method))):
                row = Row.of("rnn", case, method)
                row.method = name
                pairs.append((row, under(value, one)))
    alive = []
    for row, method, found in first_calls(pairs):
        row.error, row.cosine = (agreed := agreement(found, exact)).error, agreed.cosine
        alive.append((row, method))
    time_all(alive, ROUNDS[there.rehearse], lambda: None)
    return [asdict(row) for row, _ in pairs]


def recorded(method: Method) -> Method:
    """The whole step as one graph, recorded in the first call after warm-up on a stream of its own."""
    import torch

    state: dict[str, Any] = {}

    def step() -> Any:
        assert method.backward is not None
        return method.backward(method.forward())

    def replay() -> Any:
        if not state:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                state["found"] = step()
            state["graph"] = graph
        state["graph"].replay()
        return state["found"]

    return replace(method, forward=replay, backward=None)
