"""How the kernels are compiled, and how they are spread over threads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numba
import numpy as np
from numba import types

from hbp.backends._kernels import LOG

Argument: TypeAlias = Callable[[types.Type], types.Type]
"""A parameter's type, from that of the numbers."""

SMALL = 1 << 18
"""Multiplications that one core does in about the time in which another thread is woken."""


def as_numpy(array: Any) -> np.ndarray:
    """A NumPy array, or a PyTorch tensor on a CPU, as a NumPy array on the same memory."""
    return array.detach().resolve_neg().numpy() if hasattr(array, "detach") else np.asarray(array)


def reads(axes: int) -> Argument:
    """An array that is read, in any layout: one compilation serves them all; a loop over a row wants it `packed`."""
    return lambda dtype: types.Array(dtype, axes, "A", readonly=True)


def contiguous(axes: int) -> Argument:
    """A contiguous array that is read."""
    return lambda dtype: types.Array(dtype, axes, "C", readonly=True)


def writes(axes: int) -> Argument:
    """A contiguous array that is written."""
    return lambda dtype: types.Array(dtype, axes, "C")


def doubles(_: types.Type) -> types.Type:
    """A contiguous matrix of float64 that is written, whatever the other numbers are."""
    return types.Array(types.float64, 2, "C")


def counters(_: types.Type) -> types.Type:
    """Counters that threads write for each other."""
    return types.Array(types.int64, 1, "C")


def flag(_: types.Type) -> types.Type:
    """Yes or no."""
    return types.boolean


def index(_: types.Type) -> types.Type:
    """A bound of a range."""
    return types.intp


def compiled(*parameters: Argument) -> Callable[[Callable[..., None]], Callable[[Any], Callable[..., None]]]:
    """A kernel over arrays of one dtype: called with that dtype, it is compiled, once, and kept on disk.

    It releases the interpreter's lock; a product and a sum may be rounded once. The logger tells how long it took.
    """

    def wrap(function: Callable[..., None]) -> Callable[[Any], Callable[..., None]]:
        @cache
        def of_dtype(dtype: Any) -> Callable[..., None]:
            kind = numba.from_dtype(dtype)
            start, signature = perf_counter(), types.void(*(parameter(kind) for parameter in parameters))
            built = _built(function, signature)
            LOG.info("%s for %s: ready after %.1f s", function.__name__, dtype, perf_counter() - start)
            return built

        return of_dtype

    return wrap


def _built(function: Callable[..., None], signature: Any) -> Callable[..., None]:
    """A kernel, compiled or from disk; it allocates nothing, and so counts no references to the rows that it takes."""
    function.__qualname__ = f"{function.__name__}_{_sources()}"  # by which Numba names its file on disk
    options = {"nogil": True, "_nrt": False, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit([signature], cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "locator" not in str(error):
            raise
        warnings.warn(f"compiled kernels are not kept for the next run: {error}", RuntimeWarning, stacklevel=4)
        return numba.njit([signature], **options)(function)  # type: ignore[no-any-return]


@cache
def _sources() -> str:
    """A short name of these modules' text: Numba itself looks at the module of a kernel, not at what is inlined."""
    texts = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return sha256(b"".join(texts)).hexdigest()[:8]


Spread: TypeAlias = Callable[[Callable[[int, int], None], list[tuple[int, int]]], None]
"""Calls a kernel with each of the ranges, on several threads, and waits for all."""


@dataclass(frozen=True)
class Threads:
    """How many threads a kernel may use, and how they are called."""

    count: int
    spread: Spread

    def run(self, kernel: Callable[[int, int], None], size: int, work: int) -> None:
        """Call ``kernel(start, stop)`` on ranges that make up ``range(size)``, where ``work`` multiplications pay."""
        parts = max(min(self.count, size, work // SMALL), 1)
        cuts = [size * part // parts for part in range(parts + 1)]
        ranges = list(pairwise(cuts))
        if parts == 1:
            kernel(*ranges[0])
        else:
            self.spread(kernel, ranges)


def own_threads() -> Threads:
    """As many threads as NUMBA_NUM_THREADS says, at most OMP_NUM_THREADS, of a pool that is made when first needed.

    Not Numba's own, which abort the process when two threads enter them at once, or after a fork.
    """
    limit, available = os.environ.get("OMP_NUM_THREADS", ""), int(numba.config.NUMBA_NUM_THREADS)
    return Threads(min(available, int(limit)) if limit.isdecimal() and int(limit) else available, _in_pool)


def _in_pool(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    left = iter(ranges)

    def work() -> None:
        for part in left:  # however many threads there are
            kernel(*part)

    waiting = []
    with suppress(RuntimeError):  # no thread starts while the interpreter ends
        waiting += [_pool().submit(work) for _ in ranges[1:]]
    work()
    for future in waiting:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(int(numba.config.NUMBA_NUM_THREADS), thread_name_prefix="hbp")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork leaves the threads behind
