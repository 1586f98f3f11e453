"""The suffix scan of diagonal maps as one pass over the memory, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba.compile import Threads, as_numpy, compiled, index, own_threads, reads, writes
from hbp.core.operator import LinearOperator, Scalar

TILE = 4096
"""Channels that go through time together: one step's result is still in the first cache at the next."""

LARGE = 1 << 21
"""Numbers in a fresh array from which on the threads see to its pages before they write it side by side."""


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
    if out is None and g.size >= LARGE:
        (threads or own_threads()).run(partial(_touch(g.dtype), g.reshape(-1)), g.size, g.size)
    arrays = _planes(spread_out(values, c)), _planes(c), _planes(g)
    _over_channels(partial(_scan(g.dtype), *arrays), arrays[-1], threads)
    return g


def suffix_scan_(values: Any, g: Any, threads: Threads | None = None) -> None:
    """``g[i] += values[i] * g[i+1]`` from the end on: values (L, ...) as they broadcast, g (L+1, ...) contiguous."""
    g = as_numpy(g)
    if not g[1:].size:
        return
    arrays = _planes(spread_out(as_numpy(values), g)), _planes(g)
    _over_channels(partial(_scan_in_place(g.dtype), *arrays), arrays[-1], threads)


def spread_out(values: np.ndarray, states: np.ndarray) -> np.ndarray:
    """One map's numbers for each of the states but the last, as a view: its axes are the last of a state."""
    if values.ndim:
        values = values.reshape(len(values), *(1,) * (states.ndim - values.ndim), *values.shape[1:])
    return np.broadcast_to(values, (len(states) - 1, *states.shape[1:]))


def _planes(x: np.ndarray) -> np.ndarray:
    """``x`` with two axes behind the first, as a view wherever the layout has one."""
    if x.ndim < 3:
        return x.reshape(len(x), 1, -1) if x.flags.c_contiguous else x[:, None, None] if x.ndim == 1 else x[:, None]
    return x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])


def _over_channels(run: Callable[[int, int, int, int], None], rows: np.ndarray, threads: Threads | None) -> None:
    _, m, n = rows.shape
    threads = threads or own_threads()
    if m >= threads.count:
        threads.run(lambda start, stop: run(start, stop, 0, n), m, rows.size)
    else:
        threads.run(partial(run, 0, m), n, rows.size)


@compiled(reads(3), reads(3), writes(3), index, index, index, index)
def _scan(values: np.ndarray, c: np.ndarray, g: np.ndarray, first: int, last: int, start: int, stop: int) -> None:
    length = values.shape[0]
    for left in range(start, stop, TILE):
        right = min(left + TILE, stop)
        for m in range(first, last):
            for n in range(left, right):
                g[length, m, n] = c[length, m, n]
        for i in range(length - 1, -1, -1):
            for m in range(first, last):
                value, source, new, old = values[i, m], c[i, m], g[i, m], g[i + 1, m]
                for n in range(left, right):
                    new[n] = value[n] * old[n] + source[n]


@compiled(reads(3), writes(3), index, index, index, index)
def _scan_in_place(values: np.ndarray, g: np.ndarray, first: int, last: int, start: int, stop: int) -> None:
    for left in range(start, stop, TILE):
        right = min(left + TILE, stop)
        for i in range(values.shape[0] - 1, -1, -1):
            for m in range(first, last):
                value, new, old = values[i, m], g[i, m], g[i + 1, m]
                for n in range(left, right):
                    new[n] += value[n] * old[n]


@compiled(writes(1), index, index)
def _touch(g: np.ndarray, start: int, stop: int) -> None:
    """One write to each page: the system clears pages for several threads at once only where these are far apart."""
    for i in range(start, stop, 512):
        g[i] = 0
