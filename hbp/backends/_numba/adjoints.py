"""The way back through a GRU and an LSTM, exact or in rounds of Highway-BP: products over all steps around one loop.

The mathematics is that of `hbp.cells`. The products are the array library's, on the threads that it always uses; the
gates are those that the forward kept, or are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from hbp.backends._numba import loops
from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.backends._numba.loops import APART, EXACT, ROUND
from hbp.backends._tuning import fastest
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.cells._common import matmul, previous
from hbp.core.backend import Array

SPAN = 1 << 20
"""Numbers in the largest array of a span of time: it stays in the caches, and in memory that was written before."""


def gru_adjoint(
    pullback: GRUPullback,
    dh: Array,
    with_inputs: bool = True,
    threads: Threads | None = None,
    iterations: int | None = None,
) -> tuple[GRUParameters, Array | None, Array]:
    """``pullback(dh, iterations)`` for arrays of float32 or float64 in any layout; None for dx where unwanted."""
    params, h, threads = pullback.params, pullback.h, threads or own_threads()
    size, weight = h.shape[-1], _weight(params.weight_hh)
    carry = _zeros(pullback.h0, pullback.h0.shape)

    def before(a: int, b: int) -> Array:
        return _before(pullback.h0, h, a, b, pullback.backend)

    def gates(a: int, b: int, d: Array) -> tuple[Array, ...]:
        if pullback.gates is not None:
            return tuple(kept[a:b] for kept in pullback.gates)
        return _gru_gates(pullback, pullback.x[a:b], before(a, b), d, threads)

    def steps(a: int, b: int, pulled: Array, d: Array) -> Callable[..., None]:
        arrays = (*gates(a, b, d), h[a - 1] if a else pullback.h0, h[a:b], dh[a:b], pulled, carry, d)
        return partial(loops.gru_steps(weight.dtype), *map(as_numpy, arrays), weight)

    # the cotangents come as those of n, r, z and the candidate's recurrent part
    columns = slice(0, 3 * size), slice(size, 4 * size)
    to_x = (
        pullback.backend.concat([params.weight_ih[2 * size :], params.weight_ih[: 2 * size]]) if with_inputs else None
    )
    weights, recurrent, bias, dx = _back(pullback, before, steps, [carry], columns, to_x, iterations, threads)
    by_gate = [pullback.backend.concat([part[size : 3 * size], part[:size]]) for part in (weights, bias)]
    given = params.bias_ih, params.bias_hh
    biases = [None if own is None else part for own, part in zip(given, (by_gate[1], bias[size:]), strict=True)]
    return GRUParameters(by_gate[0], recurrent, *biases), dx, carry


def _gru_gates(pullback: GRUPullback, x: Array, before: Array, scratch: Array, threads: Threads) -> tuple[Array, Array]:
    """r, z, n, (T, B, 3H), and the candidate's recurrent part, (T, B, H), of all steps at once."""
    params, size = pullback.params, before.shape[-1]
    a, q = matmul(x, params.weight_ih.T), _empty(before, before.shape)
    rows = _rows(a)
    rec = scratch.reshape((-1,))[: rows.size].reshape(rows.shape)
    pullback.backend.xp.matmul(before.reshape((len(rows), size)), params.weight_hh.T, out=rec)
    run = partial(loops.gru_gates(rows.dtype), rows, as_numpy(rec), gru_bias(params, rows.dtype), _rows(q))
    threads.run(run, len(rows), 8 * rows.size)
    return a, q


def lstm_adjoint(
    pullback: LSTMPullback,
    dstates: tuple[Array, Array | None],
    with_inputs: bool = True,
    threads: Threads | None = None,
    iterations: int | None = None,
) -> tuple[LSTMParameters, Array | None, tuple[Array, Array]]:
    """``pullback(dstates, iterations)`` for arrays of float32 or float64; None for dx where unwanted."""
    params, (h0, c0), threads = pullback.params, pullback.initial, threads or own_threads()
    (h, c), size, weight = pullback.states, h0.shape[-1], _weight(params.weight_hh)

    def before(a: int, b: int) -> Array:
        return _before(h0, h, a, b, pullback.backend)

    gates = pullback.gates
    if gates is None:
        gates = _lstm_gates(pullback, before(0, len(h)), threads)
    if c is None:
        c = _empty(h, h.shape)
        memory = partial(loops.lstm_memory(weight.dtype), *map(as_numpy, (gates, c0, c)))
        threads.run(memory, len(h0), 4 * math.prod(gates.shape[1:]))
    dh, dc = (np.broadcast_to(weight.dtype.type(0), h.shape) if one is None else one for one in dstates)
    carries = tuple(_zeros(state, state.shape) for state in (h0, c0))

    def steps(a: int, b: int, pulled: Array, d: Array) -> Callable[..., None]:
        arrays = (gates[a:b], c[a - 1] if a else c0, c[a:b], dh[a:b], dc[a:b], pulled, *carries, d)
        return partial(loops.lstm_steps(weight.dtype), *map(as_numpy, arrays), weight)

    columns, to_x = (slice(0, 4 * size),) * 2, params.weight_ih if with_inputs else None
    weights, recurrent, bias, dx = _back(pullback, before, steps, carries, columns, to_x, iterations, threads)
    given = (params.bias_ih, bias), (params.bias_hh, pullback.backend.concat([bias]))  # apart: they may be written into
    biases = [None if own is None else part for own, part in given]
    return LSTMParameters(weights, recurrent, *biases), dx, carries


def _lstm_gates(pullback: LSTMPullback, before: Array, threads: Threads) -> Array:
    """i, f, g, o of all steps at once, (T, B, 4H)."""
    params, backend = pullback.params, cast(Any, pullback.backend)
    a = matmul(pullback.x, params.weight_ih.T)
    rows = _rows(a)
    by_row = [part.reshape((len(rows), part.shape[-1])) for part in (a, before)]
    backend.add_product(*by_row, params.weight_hh.T)
    run = partial(loops.lstm_gates(rows.dtype), rows, lstm_bias(params, rows.dtype))
    threads.run(run, len(rows), 8 * rows.size)
    return a


def _back(
    pullback: Any,
    before: Callable[[int, int], Array],
    steps: Callable[[int, int, Array, Array], Callable[..., None]],
    carries: Sequence[Array],
    columns: tuple[slice, slice],
    to_x: Array | None,
    iterations: int | None,
    threads: Threads,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of both weights, the sums of ``d``, and dx where the inputs' weights are given, of either cell.

    Args:
        pullback: the cell's.
        before: the states before each of the steps from a to b.
        steps: the loop over these, given what was pulled back and where ``d`` goes, the cotangents of the
            pre-activations, (b - a, B, 4H).
        carries: the cotangents that leave a step, zeros; the first gets the products with the weights.
        columns: those of ``d`` that belong to the product with the inputs' weights, and to that with the states'.
        to_x: the inputs' weights in the order of these columns, or None.
        iterations: rounds of Highway-BP, over all steps at once; None is exact, in spans of time.
        threads: the loops'.
    """
    x, weight, backend = pullback.x, pullback.params.weight_hh, pullback.backend
    carry, length = carries[0], len(x)
    batch, size = carry.shape
    looped = in_loop(f"{'gru' if isinstance(pullback, GRUPullback) else 'lstm'} backward", backend, batch, size)
    span = max(SPAN // max(4 * size * batch, 1), 8) if iterations is None else length
    d = _empty(carry, (min(span, length), batch, 4 * size))
    recurrent, bias = _zeros(carry, weight.shape), _zeros(carry, (4 * size,))
    inputs = _zeros(carry, (weight.shape[0], x.shape[-1]))
    dx = None
    for b in range(length, 0, -span):
        a = max(b - span, 0)
        rows = d[: b - a].reshape(((b - a) * batch, 4 * size))
        if iterations is None:
            _exact(steps(a, b, carry[None], d), b - a, carry, d[..., columns[1]], weight, backend, threads, looped)
        else:
            _rounds(
                partial(steps, a, b), min(iterations, length), carries, d, rows[:, columns[1]], weight, backend, threads
            )
        backend.add_product(inputs, rows[:, columns[0]].T, x[a:b].reshape((len(rows), x.shape[-1])))
        backend.add_product(recurrent, rows[:, columns[1]].T, before(a, b).reshape((len(rows), size)))
        bias += rows.sum(0)
        if to_x is not None:
            dx = _empty(carry, x.shape) if dx is None else dx
            dx[a:b] = (rows[:, columns[0]] @ to_x).reshape((b - a, batch, x.shape[-1]))
    return inputs, recurrent, bias, dx


def _exact(
    run: Callable[..., None],
    length: int,
    carry: Array,
    d: Array,
    weight: Array,
    backend: Any,
    threads: Threads,
    looped: bool,
) -> None:
    """All steps from the last to the first, with the product ``carry += d[t] @ weight`` in the loop or behind each."""
    batch, size = carry.shape
    if looped:
        threads.run(partial(run, EXACT, 0, length), batch, length * batch * 4 * size * size)
        return
    for t in range(length - 1, -1, -1):
        run(APART, t, t + 1, 0, batch)
        backend.add_product(carry, d[t], weight)


def _rounds(
    steps: Callable[[Array, Array], Callable[..., None]],
    iterations: int,
    carries: Sequence[Array],
    d: Array,
    rows: Array,
    weight: Array,
    backend: Any,
    threads: Threads,
) -> None:
    """A pass over all steps, then in turn a product that pulls all blocks back and a pass that adds what it gave."""
    length, (batch, size) = d.shape[0], carries[0].shape
    pulled = _empty(carries[0], (length if iterations else 1, batch, size))
    run = steps(pulled, d)
    for k in range(iterations + 1):
        if k:
            backend.xp.matmul(rows, weight, out=pulled.reshape((length * batch, size)))
            for own in carries:
                own[...] = 0
        threads.run(partial(run, ROUND if k else APART, 0, length), batch, 64 * length * batch * size)


def in_loop(task: str, backend: Any, batch: int, size: int) -> bool:
    """Whether each step's product with the recurrent weights is computed in the compiled loop, or by a call of it."""
    return fastest(task, backend.name, batch, size, ("loop", "calls")) == "loop"


def gru_bias(params: GRUParameters, dtype: Any) -> np.ndarray:
    """The sums of both biases of r and z, then the candidate's recurrent one and its input's, (4H,)."""
    size = params.weight_hh.shape[1]
    own, recurrent = (_bias(bias, 3 * size, dtype) for bias in (params.bias_ih, params.bias_hh))
    parts = own[: 2 * size] + recurrent[: 2 * size], recurrent[2 * size :], own[2 * size :]
    return np.concatenate(parts)


def lstm_bias(params: LSTMParameters, dtype: Any) -> np.ndarray:
    """The sum of both biases, (4H,)."""
    size = 4 * params.weight_hh.shape[1]
    both: np.ndarray = _bias(params.bias_ih, size, dtype) + _bias(params.bias_hh, size, dtype)
    return both


def _bias(bias: Array | None, size: int, dtype: Any) -> np.ndarray:
    return np.zeros(size, dtype) if bias is None else as_numpy(bias)


def _before(h0: Array, h: Array, a: int, b: int, backend: Any) -> Array:
    """The states before the steps from a to b, (b - a, B, H)."""
    return h[a - 1 : b - 1] if a else previous(h0, h[:b], backend)


def _empty(like: Array, shape: tuple[int, ...]) -> Array:
    """A fresh array of the library and dtype of another, not written yet."""
    return like.new_empty(shape) if hasattr(like, "new_empty") else np.empty(shape, like.dtype)


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return like.new_zeros(shape) if hasattr(like, "new_zeros") else np.zeros(shape, like.dtype)


def _rows(x: Array) -> np.ndarray:
    """All steps of all sequences as the rows of a NumPy matrix, without a copy."""
    return as_numpy(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _weight(weight: Array) -> np.ndarray:
    return np.ascontiguousarray(as_numpy(weight))
