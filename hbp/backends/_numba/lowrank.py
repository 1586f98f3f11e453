"""The suffix scan of maps with few strong directions beside a cheap path, step by step, as one compiled loop."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numba
import numpy as np

from hbp.backends._numba.compile import Threads, as_numpy, compiled, contiguous, index, own_threads, reads, writes
from hbp.backends._numba.rows import packed
from hbp.backends._numba.scan import spread_out
from hbp.backends._numba.subnormals import flushed, restored
from hbp.backends._numba.tiles import add_product
from hbp.core.operator import Identity, LinearOperator, Pair, Scalar
from hbp.lowrank import LowRank


def low_rank_scan(operator: LowRank, c: Any, threads: Threads | None = None) -> np.ndarray:
    """Solve ``g[i] = a[i] g[i+1] + left[i] right[i] g[i+1] + c[i]``, ``g[L] = c[L]``: `hbp.core.scan.sequential`.

    Args:
        operator: bound to the states; its path a `Diagonal`, `Scalar`, `Identity`, `Zero` or `Pair`.
        c: (L+1, ...), float32 or float64, in any layout; a NumPy array, or a PyTorch tensor on a CPU.
        threads: its threads, among which the batch is divided; `own_threads` if None.

    >>> half = LowRank(np.full((2, 1, 1), 0.5), np.ones((2, 1, 1)))
    >>> low_rank_scan(half, np.ones((3, 1))).ravel().tolist()
    [1.75, 1.5, 1.0]
    """
    c = as_numpy(c)
    g = np.array(c, order="C")
    if not c[1:].size:
        return g
    paired = isinstance(operator.path, Pair)
    batch, size = (c.shape[1:-2], 2 * c.shape[-1]) if paired else (c.shape[1:-1], c.shape[-1])
    states = g.reshape((len(c), math.prod(batch), size))
    path = [spread_out(values, c).reshape(states[1:].shape) for values in _path(operator.path, c)]
    down, up = (_by_sequence(as_numpy(x).swapaxes(-1, -2), batch) for x in (operator.right, operator.left))
    low = np.empty((states.shape[1], operator.rank), c.dtype)
    room = np.empty((2 * len(low), size), c.dtype)
    run = partial(_scan(c.dtype), path[0], path[-1], down, up, low, room, states, size // 2 if paired else 0)
    (threads or own_threads()).run(run, states.shape[1], 2 * g.size * (operator.rank + 1))
    return g


def _path(path: LinearOperator, c: np.ndarray) -> list[np.ndarray]:
    """What the states are multiplied by along the path, of a `Pair` both factors."""
    if path.arrays:
        return [as_numpy(array) for array in path.arrays]
    number = path.value if isinstance(path, Scalar) else 1 if isinstance(path, Identity) else 0
    return [np.asarray(number, c.dtype)]


def _by_sequence(factor: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    """A factor (L or 1, ..., m, n) as (L or 1, B or 1, m, n), its rows contiguous."""
    if not factor.strides[0]:
        factor = factor[:1]
    count, own, ends = len(factor), factor.shape[1:-2], factor.shape[-2:]
    if math.prod(own) == 1:
        return np.ascontiguousarray(factor.reshape((count, 1, *ends)))
    whole = np.broadcast_to(factor, (count, *batch, *ends))
    return np.ascontiguousarray(whole.reshape((count, math.prod(batch), *ends)))


@numba.njit(inline="always")
def _add_products(rows, weights, sums, start, stop):  # type: ignore[no-untyped-def]
    """``sums[b] += rows[b] @ weights[b]``, where one weight may be that of all."""
    own = len(weights) > 1
    step = 1 if own else stop - start
    for b in range(start, stop, step):
        add_product(rows, weights[b if own else 0], sums, b, b + step)


@compiled(reads(3), reads(3), contiguous(4), contiguous(4), writes(2), writes(2), writes(3), *[index] * 3)
def _scan(
    values: np.ndarray,
    others: np.ndarray,
    down: np.ndarray,
    up: np.ndarray,
    low: np.ndarray,
    room: np.ndarray,
    g: np.ndarray,
    half: int,
    start: int,
    stop: int,
) -> None:
    """In place, of the sequences from ``start`` on; ``half``: the units of a `Pair`, 0 along another path.

    ``low``, (B, r), and ``room``, (2 B, width), are for one step's numbers.
    """
    control = flushed()
    for i in range(values.shape[0] - 1, -1, -1):
        for b in range(start, stop):
            value, old, new = packed(values[i, b], room[b]), g[i + 1, b], g[i, b]
            if half:
                other = packed(others[i, b], room[len(low) + b])
                value2, other2, old2, new2 = value[half:], other[half:], old[half:], new[half:]
                for n in range(half):
                    s = other[n] * old[n] + other2[n] * old2[n]
                    new[n] += value[n] * s
                    new2[n] += value2[n] * s
            else:
                for n in range(g.shape[2]):
                    new[n] += value[n] * old[n]
        low[start:stop] = 0
        _add_products(g[i + 1], down[i if len(down) > 1 else 0], low, start, stop)
        _add_products(low, up[i if len(up) > 1 else 0], g[i], start, stop)
    restored(control)
