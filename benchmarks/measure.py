"""What every table shares: libraries, methods, and timing in interleaved rounds."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np

from hbp.backends.numpy import backend
from hbp.core.registry import load
from hbp.diagnosis.agreement import Agreement

BATCH_MS = 20.0
"""Of the calls that are timed together on a device, where a single one takes less."""


@dataclass(frozen=True)
class Library:
    """An array library: the way to and from NumPy, and how to wait for its device."""

    name: str
    front_end: Any
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    wait: Callable[[Any], Any]
    """Returns when the arrays given, and all before them, are computed."""
    on_gpu: bool = False
    cast: Callable[[Any, str], Any] = lambda x, dtype: x.astype(dtype)
    """An array in a dtype of this name."""

    def vector(self, parts: Sequence[Any]) -> Any:
        """All arrays' numbers as one float64 vector: on the device, where PyTorch has it too, else NumPy's.

        A host would take seconds to compare what a device computes in milliseconds.
        """
        torch: Any = sys.modules.get("torch") if self.on_gpu else None
        if torch is None or not torch.cuda.is_available():
            return np.concatenate([np.asarray(self.numpy(part), np.float64).ravel() for part in parts])
        return torch.cat([torch.from_dlpack(part).double().ravel() for part in parts])


def library(name: str) -> Library:
    """One of hbp's backends with arrays on its default device; raises as `hbp.use` does."""
    front_end = load(name)
    if name == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is float32
        return Library(
            name,
            front_end,
            lambda x: torch.from_numpy(x).to(device),
            lambda x: (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy(),
            lambda _: torch.cuda.synchronize() if device == "cuda" else None,
            device == "cuda",
            lambda x, dtype: x.to(getattr(torch, dtype)),
        )
    if name == "jax":
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_default_matmul_precision", "highest")
        return Library(name, front_end, jnp.asarray, np.asarray, jax.block_until_ready, jax.default_backend() == "gpu")
    if name == "cupy":
        import cupy

        stream = cupy.cuda.get_current_stream()
        return Library(name, front_end, cupy.asarray, cupy.asnumpy, lambda _: stream.synchronize(), True)
    return Library(name, front_end, np.asarray, np.asarray, lambda _: None)


@dataclass(frozen=True)
class Method:
    """One way to compute a case: ``backward(forward())``, or one pass alone."""

    name: str
    library: Library
    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None
    k: int | None = None
    chunk: int | None = None
    ours: bool = False
    exact: bool = True
    finish: Callable[[Any], Any] = lambda found: found
    """What a check does to the result first; not timed."""
    yardstick: bool = False
    """It computes something else, to compare times with."""
    products: str | None = None
    """The dtype of what its products multiply, where that is another than the arrays'."""

    def run(self, calls: int = 1) -> tuple[float, float, Any]:
        """Seconds of the forward and of the backward pass, and the result; the mean of some calls without a backward.

        A device works on one call while the next is prepared: only the last is waited for.
        """
        start = perf_counter()
        for _ in range(calls - 1):
            self.forward()
        state = self.forward()
        self.library.wait(state)
        if self.backward is None:
            return (perf_counter() - start) / calls, 0.0, state
        middle = perf_counter()
        found = self.backward(state)
        self.library.wait(found)
        return middle - start, perf_counter() - middle, found

    def result(self, found: Any) -> Any:
        """All arrays found as one float64 vector, as `Library.vector` makes it."""
        found = self.finish(found)
        return self.library.vector(found if isinstance(found, tuple | list) else [found])


@dataclass
class Row:
    """A method's result on a case, as it is written to the JSON; times are [median, lower, upper quartile]."""

    table: str
    case: dict[str, Any]
    method: str
    library: str
    k: int | None
    chunk: int | None
    ours: bool
    exact: bool
    check: float | None = None
    """The relative error of the test before: against the same method's definition in float64."""
    error: float | None = None
    """The relative error of the gradient, against exact backprop in float64."""
    cosine: float | None = None
    first_ms: float | None = None
    """The first call at this size, with what is compiled for it."""
    forward_ms: list[float] | None = None
    backward_ms: list[float] | None = None
    whole_ms: list[float] | None = None
    copy_fraction: float | None = None
    """Of the measured copy bandwidth, for the bytes that must move."""
    product_fraction: float | None = None
    """Of the measured matrix-product rate, for the products the backward pass must compute."""
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    failed: str | None = None
    """Why there is nothing else."""

    @classmethod
    def of(cls, table: str, case: dict[str, Any], method: Method) -> Row:
        """An empty row."""
        return cls(table, case, method.name, method.library.name, method.k, method.chunk, method.ours, method.exact)


def agreement(found: Any, expected: Any) -> Agreement:
    """Of two gradients, as `Method.result` gives them; compared where the first one is."""
    if isinstance(found, np.ndarray):
        return Agreement.of(found, expected if isinstance(expected, np.ndarray) else expected.cpu().numpy(), backend)
    import torch

    return Agreement.of(found, torch.as_tensor(expected, device=found.device), load("torch").backend)


def kept(problem: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """The last two problems stay: every method, library and reference of a case asks for the same numbers."""
    drawn = lru_cache(maxsize=2)(lambda case: problem(json.loads(case)))
    return lambda case: drawn(json.dumps(case))


def first_calls(pairs: list[tuple[Row, Method]]) -> Iterator[tuple[Row, Method, Any]]:
    """Run each method once, with what it compiles for this size; yields each with its result."""
    for row, method in pairs:
        try:
            forward, backward, found = method.run()
            row.first_ms = 1e3 * (forward + backward)
            found = None if method.yardstick else method.result(found)
        except Exception as error:
            row.failed = f"{type(error).__name__}: {error}"
            continue
        if found is not None:
            yield row, method, found
        del found


def time_all(pairs: list[tuple[Row, Method]], rounds: int, advance: Callable[[], None]) -> None:
    """Fill in the times of methods that ran once, from interleaved rounds, every other one in reverse order.

    In a round a library's methods follow one another, after an untimed call that wakes its threads and lets those of
    the library before fall asleep.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in pairs]
    order = list(enumerate(pairs))
    calls = [_calls(*pair) for pair in pairs]
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for _, group in groupby(order[::-1] if turn % 2 else order, key=lambda item: item[1][1].library.name):
                members = list(group)
                members[0][1][1].run()
                for index, (_, method) in members:
                    times[index].append(method.run(calls[index])[:2])
                    advance()
            gc.collect()
    finally:
        gc.enable()
    for (row, method), found in zip(pairs, times, strict=True):
        row.whole_ms = milliseconds(sum(both) for both in found)
        if method.backward is not None:
            row.forward_ms, row.backward_ms = (milliseconds(part) for part in zip(*found, strict=True))


def _calls(row: Row, method: Method) -> int:
    """How many calls of one pass a time on a device is the mean of: waiting for it takes as long as a short one."""
    if not method.library.on_gpu or method.backward is not None:
        return 1
    return max(1, min(100, int(BATCH_MS / max(row.first_ms or BATCH_MS, BATCH_MS / 100))))


def per_call(lib: Library, call: Callable[[], Any]) -> float:
    """Seconds of a call that ran before: the median over batches, of which only the last call is waited for."""

    def batch(count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            found = call()
        lib.wait(found)
        return (perf_counter() - start) / count

    count = max(1, min(1000, int(BATCH_MS / 1e3 / max(batch(1), 1e-6))))
    return median(batch(count) for _ in range(5))


def milliseconds(seconds: Iterable[float]) -> list[float]:
    """The median and both quartiles."""
    values = [1e3 * value for value in seconds]
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [median(values), low, high]
