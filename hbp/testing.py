"""Oracles for what is added to hbp, in plain NumPy on explicit matrices: an operator, a cell's chain, a backend.

None of hbp's solvers is used to say what is right. `path_sum` is the definition of iterate k; the three checks compare
with it and with matrix products, and raise AssertionError with what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np

from hbp.core.adjoint import backprop, highway
from hbp.core.backend import Array, dtype_name
from hbp.core.chain import LinearizedChain
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero
from hbp.core.registry import resolve
from hbp.core.scan import loop
from hbp.lowrank import LowRank

__all__ = ["check_backend", "check_chain", "check_operator", "chunked_path_sum", "jacobian", "matrices", "path_sum"]
__all__ += ["suffix_loop"]

LONGEST = 8
"""Layers: the sum over paths has 2 to their number of terms."""


def path_sum(R: np.ndarray, B: np.ndarray, c: np.ndarray, k: int) -> np.ndarray:
    """Iterate k by its definition: the sum over all residual/block paths that cross at most k blocks.

    ``R`` and ``B`` are (L, d, d) in forward orientation, ``c`` is (L+1, d): 2^m paths lead from x[j] to x[j-m].
    """
    length = len(c) - 1
    g = np.zeros(c.shape)
    for i in range(length + 1):
        for j in range(i, length + 1):
            for crosses in product((False, True), repeat=j - i):
                if sum(crosses) <= k:
                    v = c[j]
                    for layer in range(j - 1, i - 1, -1):
                        v = (B if crosses[layer - i] else R)[layer].T @ v
                    g[i] += v
    return g


def chunked_path_sum(R: np.ndarray, B: np.ndarray, c: np.ndarray, k: int, S: int) -> np.ndarray:
    """Iterate k with stages of S layers: iterate k of the chain of stages, exact backprop inside each stage."""
    length, d = len(c) - 1, c.shape[1]
    bounds = [*range(0, length, S), length]
    stages = list(pairwise(bounds))
    coarse_R, coarse_B, entering = np.zeros((len(stages), d, d)), np.zeros((len(stages), d, d)), np.zeros((0, d))
    for s, (start, end) in enumerate(stages):
        residual = whole = np.eye(d)
        entered = np.zeros(d)
        for i in range(start, end):
            entered = entered + whole.T @ c[i]
            residual, whole = R[i] @ residual, (R[i] + B[i]) @ whole
        coarse_R[s], coarse_B[s] = residual, whole - residual
        entering = np.vstack([entering, entered])
    boundary = path_sum(coarse_R, coarse_B, np.vstack([entering, c[-1]]), k)
    g = np.zeros(c.shape)
    g[length] = boundary[-1]
    for s, (start, end) in enumerate(stages):
        v = boundary[s + 1]
        for i in range(end - 1, start, -1):
            v = (R[i] + B[i]).T @ v + c[i]
            g[i] = v
        g[start] = boundary[s]
    return g


def suffix_loop(A: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``g[i] = A[i] g[i+1] + c[i]`` with explicit matrices (L, d, d) and ``c`` (L+1, d)."""
    g = np.array(c)
    for i in range(len(c) - 2, -1, -1):
        g[i] = A[i] @ g[i + 1] + c[i]
    return g


def matrices(operator: LinearOperator, length: int, like: np.ndarray) -> np.ndarray:
    """The matrices of a stack of maps on states like ``like``, flattened: (length, n, n), from its ``mv`` alone.

    >>> matrices(Scalar(0.5), 1, np.zeros(2)).tolist()
    [[[0.5, 0.0], [0.0, 0.5]]]
    """
    bound = operator.bind(length, like, resolve("numpy", like))
    rows = np.eye(like.size, dtype=like.dtype).reshape(like.size, *like.shape)
    columns = [bound.mv(np.broadcast_to(row, (length, *like.shape))).reshape(length, like.size) for row in rows]
    return np.stack(columns, axis=-1)


def jacobian(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The Jacobian of a function of arrays at x by central differences, on flattened arrays: (outputs, inputs).

    >>> jacobian(lambda x: x * x, np.array([1.0, 2.0])).round(6).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    columns = []
    for row in np.eye(x.size).reshape(x.size, *x.shape):
        columns.append((function(x + step * row) - function(x - step * row)).reshape(-1) / (2 * step))
    return np.stack(columns, axis=-1)


def check_operator(operator: LinearOperator, like: np.ndarray) -> None:
    """Check a kind of residual maps: its ``mv`` says what the maps are, and all else must agree with that.

    Linearity, the transpose, slices and single maps, products, multiples, the suffix scan, and every iterate of
    Highway-BP, with chunks and without, beside random blocks.

    Args:
        operator: a stack of 3 to 8 different maps, in NumPy.
        like: a state of float64 on which they act, in whose place zeros would do.
    """
    length, rng = operator.length, np.random.default_rng(0)
    if length is None or not 3 <= length <= LONGEST:
        raise ValueError(f"the operator has {length} maps; give a stack of 3 to {LONGEST}")
    backend = resolve("numpy", like)
    bound, M = operator.bind(length, like, backend), matrices(operator, length, like)
    v, c = (rng.normal(size=(n, *like.shape)) for n in (length, length + 1))
    steps = np.arange(1.0, length + 1)
    after, product_of = bound[1:] @ bound[:-1], M[1:] @ M[:-1]
    scanned = suffix_loop(M.swapaxes(1, 2), c.reshape(length + 1, -1)).reshape(c.shape)
    for what, found, wanted in (
        ("mv is not linear", bound.mv(v), _applied(M, v)),
        (".T is not the transpose", bound.T.mv(v), _applied(M.swapaxes(1, 2), v)),
        ("a slice has other maps", bound[::2].mv(v[::2]), _applied(M[::2], v[::2])),
        ("a single map is another", bound[1].mv(v[1]), _applied(M[1:2], v[1:2])[0]),
        ("scaled(0.5) is not half of it", bound.scaled(0.5).mv(v), _applied(0.5 * M, v)),
        ("scaled by an (L,) array", bound.scaled(steps).mv(v), _applied(steps[:, None, None] * M, v)),
        ("@ is not the product, the right map first", after.mv(v[1:]), _applied(product_of, v[1:])),
        ("a product's .T is not its transpose", after.T.mv(v[1:]), _applied(product_of.swapaxes(1, 2), v[1:])),
        ("the suffix scan goes along other maps", backend.propagate(bound.T, c), scanned),
    ):
        _same(what, found, wanted)
    blocks = 0.5 * rng.normal(size=M.shape) / like.size**0.5
    pullbacks = [lambda g, block=block: (block.T @ g.reshape(-1)).reshape(g.shape) for block in blocks]
    check_chain(LinearizedChain(pullbacks, operator), M + blocks, like)


def check_chain(chain: LinearizedChain, jacobians: np.ndarray, like: np.ndarray) -> None:
    """Check a chain's split and pullbacks: each iterate of Highway-BP must be the sum over its paths.

    Args:
        chain: at most 8 linearised layers, in NumPy, as `hbp.linearize` returns or a cell makes.
        jacobians: those of the whole layers, (L, n, n) on flattened states, by whatever is right (`jacobian`).
        like: a state of the chain.
    """
    length, rng = len(chain), np.random.default_rng(1)
    if length > LONGEST:
        raise ValueError(f"the chain has {length} layers, whose paths are too many; give at most {LONGEST}")
    R = matrices(chain.residual, length, like)
    sources, cotangent = rng.normal(size=(length, *like.shape)), rng.normal(size=like.shape)
    c = np.concatenate([sources, cotangent[None]]).reshape(length + 1, -1)
    loose = 1e-6  # the Jacobians may be finite differences
    for S, k in product((1, 2, length), range(length + 1)):
        wanted = chunked_path_sum(R, jacobians - R, c, k, S).reshape(length + 1, *like.shape)
        found = highway(chain, cotangent, k, sources=sources, chunk=S, backend="numpy")
        _same(f"iterate k={k} with chunk={S} is not the sum over its paths", found, wanted, loose)
    wanted = path_sum(R, jacobians - R, c, length).reshape(length + 1, *like.shape)
    _same("backprop is not exact", backprop(chain, cotangent, sources, backend="numpy"), wanted, loose)


def check_backend(backend: Any, array: Callable[[np.ndarray], Array], dtype: str = "float32") -> None:
    """Check an array library's backend against NumPy: its operations, its scans of all kinds, its pullbacks.

    Args:
        backend: the backend, whose library `hbp.core.registry.LIBRARIES` knows.
        array: a NumPy array as the library's, its dtype kept; back it goes by `numpy.asarray`.
        dtype: "float32" or "float64".
    """
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-0.9, 0.9, shape).astype(dtype)

    def same(what: str, found: Array, wanted: Any) -> None:
        kinds = dtype_name(found), type(found)
        _hold(kinds == (dtype, type(array(np.zeros(1, dtype)))), f"{what}: found {kinds}")
        _same(what, np.asarray(found), wanted, 1e-4 if dtype == "float32" else 1e-10)

    _check_operations(backend, array, draw, same)
    for length in (0, 1, 2, 5, 17):
        for operator in _stacks(draw, length):
            c = draw(length + 1, 2, 3)
            maps = matrices(operator, length, c[0])
            wanted = suffix_loop(maps, c.reshape(length + 1, -1)).reshape(c.shape)
            own, given = operator.mapped(array).bind(length, array(c[0]), backend), array(c)
            same(f"propagate, {length} maps of kind {type(operator).__name__}", backend.propagate(own, given), wanted)
            same("propagate wrote into what it was given", given, c)
    _check_pullback(backend, array, draw, same)


def _check_operations(backend: Any, array: Any, draw: Any, same: Any) -> None:
    """All that is neither a scan along residual maps nor a pullback."""
    a, b = draw(3, 2), draw(3, 2)
    for axis in (0, 1):
        same(f"concat along {axis}", backend.concat([array(a), array(b)], axis), np.concatenate([a, b], axis))
        same(f"stack along {axis}", backend.stack([array(a), array(b)], axis), np.stack([a, b], axis))
    same("zeros_like", backend.zeros_like(array(a)), np.zeros_like(a))
    pulled = backend.map([lambda g: 2 * g, lambda g: g - 1], [array(a), array(b)])
    same("map", backend.stack(pulled), np.stack([2 * a, b - 1]))
    _hold(abs(float(backend.norm(array(a))) - np.linalg.norm(a)) < 1e-5, "norm")
    for reverse in (False, True):
        wanted = loop(_step, b[0], a, reverse, backend=resolve("numpy", a))
        same(f"scan, reverse={reverse}", backend.scan(_step, array(b[0]), array(a), reverse), wanted)
    same("repeat", backend.repeat(lambda x: 2 * x, array(a), 3), 8 * a)


def _check_pullback(backend: Any, array: Any, draw: Any, same: Any) -> None:
    """The backend's ``vjp``, where it has one, and Highway-BP on what it gives."""
    x, g = draw(4), draw(4)
    try:
        y, pullback = backend.vjp(lambda x: x * x + x, array(x))
    except NotImplementedError:
        return
    same("vjp's value", y, x * x + x)
    same("vjp's pullback", pullback(array(g)), (2 * x + 1) * g)
    chain = LinearizedChain([pullback] * 5, Scalar(0.5))
    R, B = np.stack([0.5 * np.eye(4)] * 5), np.stack([np.diag(2 * x + 1)] * 5)
    c = np.concatenate([np.zeros((5, 4)), g[None]])
    for S, k in product((1, 2), range(6)):
        found = highway(chain, array(g), k, chunk=S, backend=backend)
        same(f"iterate k={k} with chunk={S}", found, chunked_path_sum(R, B, c, k, S).astype(g.dtype))


def _stacks(draw: Callable[..., np.ndarray], length: int) -> list[LinearOperator]:
    """Stacks of all kinds on states (2, 3)."""
    numbers = [Identity(), Zero(), Scalar(0.7), Scalar(draw(length))]
    arrays = [Diagonal(draw(length, 2, 3)), Diagonal(draw(length, 3)), Dense(draw(length, 3, 3))]
    low = Diagonal(draw(length, 3)) + LowRank(draw(length, 3, 2), draw(length, 2, 3))
    return [*numbers, *arrays, low, Pair(draw(length, 2, 3), draw(length, 2, 3))]


def _step(carry: Any, row: Any) -> Any:
    return 0.5 * carry + row


def _applied(maps: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Each matrix times its own flattened state."""
    moved: np.ndarray = maps @ v.reshape(len(v), -1, 1)
    return moved.reshape(v.shape)


def _same(what: str, found: Any, wanted: np.ndarray, tolerance: float = 1e-10) -> None:
    _hold(np.shape(found) == np.shape(wanted), f"{what}: shape {np.shape(found)}, expected {np.shape(wanted)}")
    worst = float(np.abs(np.asarray(found) - wanted).max(initial=0.0))
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    _hold(worst <= tolerance * scale, f"{what}: off by {worst:.2g}")


def _hold(holds: Any, what: str) -> None:
    """Raise AssertionError unless something holds: an assert would be gone under ``python -O``."""
    if not holds:
        raise AssertionError(what)
