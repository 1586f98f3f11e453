"""The suffix scan of diagonal maps as one pass over the memory, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba.compile import Threads, as_numpy, compiled, flag, index, own_threads, reads, writes
from hbp.backends._numba.rows import packed, published, stream
from hbp.backends._numba.subnormals import flushed, restored
from hbp.core.operator import LinearOperator, Scalar

TILE = 4096
"""Channels that go through time together: one step's result is still in the first cache at the next."""

LARGE = 1 << 21
"""Numbers from which on a result is written past the caches, and the threads see to a fresh array's pages first."""

LONG = 256
"""Numbers in a row, or in a thread's part of one, from which on both pays: its ends share lines with others."""


def suffix_scan(
    operator: LinearOperator, c: Any, threads: Threads | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Solve ``g[i] = a[i] g[i+1] + c[i]``, ``g[L] = c[L]``: `hbp.core.scan.sequential` for diagonal maps.

    Args:
        operator: a `Diagonal`, `Scalar` or `Identity`, bound to the states.
        c: (L+1, ...), float32 or float64, in any layout; a NumPy array, or a PyTorch tensor on a CPU.
        threads: its threads; `own_threads` if None.
        out: a contiguous array for the result, like ``c`` and apart from it; the system clears fresh memory first.

    >>> from hbp.core.operator import Scalar
    >>> suffix_scan(Scalar(2.0), np.ones((3, 1))).ravel().tolist()
    [7.0, 3.0, 1.0]
    """
    c = as_numpy(c)
    g = np.empty(c.shape, c.dtype) if out is None else out
    if not c[1:].size:
        g[...] = c
        return g
    if operator.arrays:
        values = as_numpy(operator.arrays[0])
    else:
        values = np.asarray(operator.value if isinstance(operator, Scalar) else 1, c.dtype)
    arrays = _planes(spread_out(values, c), c, g)
    large = g.size >= LARGE
    if out is None and large:
        (threads or own_threads()).run(partial(_touch(g.dtype), g.reshape(-1)), g.size, g.size)
    streamed = large and g.flags.aligned and arrays[-1].shape[-1] >= LONG
    _over_channels(partial(_scan(g.dtype), *arrays, streamed), arrays[-1], threads)
    return g


def suffix_scan_(values: Any, g: Any, threads: Threads | None = None) -> None:
    """``g[i] += values[i] * g[i+1]`` from the end on: values (L, ...) as they broadcast, g (L+1, ...) contiguous."""
    g = as_numpy(g)
    if not g[1:].size:
        return
    arrays = _planes(spread_out(as_numpy(values), g), g)
    _over_channels(partial(_scan_in_place(g.dtype), *arrays), arrays[-1], threads)


def spread_out(values: np.ndarray, states: np.ndarray) -> np.ndarray:
    """One map's numbers for each of the states but the last, as a view: its axes are the last of a state."""
    if values.ndim:
        values = values.reshape(len(values), *(1,) * (states.ndim - values.ndim), *values.shape[1:])
    return np.broadcast_to(values, (len(states) - 1, *states.shape[1:]))


def _planes(*arrays: np.ndarray) -> list[np.ndarray]:
    """Each with two axes behind the first, as views wherever the layouts have them: one row a step if all are dense."""
    if all(x.flags.c_contiguous for x in arrays):
        return [x.reshape(len(x), 1, -1) for x in arrays]
    return [x.reshape(len(x), -1, x.shape[-1] if x.ndim > 1 else 1) for x in arrays]


def _over_channels(kernel: Callable[..., None], rows: np.ndarray, threads: Threads | None) -> None:
    """Call it on parts of (m, n) for the threads, none of which goes through memory in short pieces."""
    _, m, n = rows.shape
    threads = threads or own_threads()
    count = min(threads.count, max(m * n // LONG, 1))
    by_rows = m >= count
    threads = replace(threads, count=count if by_rows else min(count, max(n // LONG, 1)))

    def run(first: int, last: int, start: int, stop: int) -> None:
        kernel(first, last, start, stop, np.empty((last - first + 2, min(stop - start, TILE)), rows.dtype))

    if by_rows:
        threads.run(lambda first, last: run(first, last, 0, n), m, rows.size)
    else:
        threads.run(partial(run, 0, m), n, rows.size)


@compiled(reads(3), reads(3), writes(3), flag, index, index, index, index, writes(2))
def _scan(
    values: np.ndarray,
    c: np.ndarray,
    g: np.ndarray,
    streamed: bool,
    first: int,
    last: int,
    start: int,
    stop: int,
    room: np.ndarray,
) -> None:
    """``room``: (last - first + 2, tile), for a step's states, as those in g may be past the caches, and two rows."""
    length, control = values.shape[0], flushed()
    for left in range(start, stop, TILE):
        right = min(left + TILE, stop)
        for m in range(first, last):
            for n in range(left, right):
                room[m - first, n - left] = g[length, m, n] = c[length, m, n]
        for i in range(length - 1, -1, -1):
            for m in range(first, last):
                value, source = packed(values[i, m, left:right], room[-1]), packed(c[i, m, left:right], room[-2])
                new, state = g[i, m, left:right], room[m - first, : right - left]
                if streamed:
                    for n in range(right - left):
                        state[n] = value[n] * state[n] + source[n]
                    stream(state, new)
                else:
                    for n in range(right - left):
                        state[n] = new[n] = value[n] * state[n] + source[n]
    published()
    restored(control)


@compiled(reads(3), writes(3), index, index, index, index, writes(2))
def _scan_in_place(
    values: np.ndarray, g: np.ndarray, first: int, last: int, start: int, stop: int, room: np.ndarray
) -> None:
    control = flushed()
    for left in range(start, stop, TILE):
        right = min(left + TILE, stop)
        for i in range(values.shape[0] - 1, -1, -1):
            for m in range(first, last):
                value = packed(values[i, m, left:right], room[-1])
                new, old = g[i, m, left:right], g[i + 1, m, left:right]
                for n in range(right - left):
                    new[n] += value[n] * old[n]
    restored(control)


@compiled(writes(1), index, index)
def _touch(g: np.ndarray, start: int, stop: int) -> None:
    """One write to each page: the system clears pages for several threads at once only where these are far apart."""
    for i in range(start, stop, 512):
        g[i] = 0
