"""Independent oracles in plain NumPy, on explicit matrices; none of hbp's solvers is used here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hbp import Dense, Diagonal, Identity, LinearOperator, LowRank, Pair, Scalar, Zero
from hbp.testing import chunked_path_sum, path_sum, suffix_loop

__all__ = [
    "KINDS",
    "chunked_path_sum",
    "converted",
    "fits",
    "matrix_pullbacks",
    "path_sum",
    "residual_case",
    "suffix_loop",
]


KINDS = (
    "identity",
    "zero",
    "number",
    "scalars",
    "diagonal",
    "diagonal-shared",
    "diagonal-mask",
    "dense",
    "dense-entries",
    "pair",
    "pair-left-shared",
    "pair-right-shared",
    "low-rank",
    "low-rank-shared",
    "low-rank-entries",
    "pair-low-rank",
)


def fits(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether residual maps of this kind act on states of this shape."""
    if kind.startswith("pair"):
        return len(shape) >= 2 and shape[-2] == 2
    least = {"diagonal-shared": 2, "dense": 1, "dense-entries": 2, "low-rank-entries": 2}
    return len(shape) >= least.get(kind, int(kind.startswith("low-rank")))


def residual_case(
    kind: str, rng: np.random.Generator, length: int, shape: tuple[int, ...]
) -> tuple[LinearOperator, np.ndarray]:
    """A random stack of maps with entries below 1, and its matrices on flattened states, (length, n, n)."""
    n, d = int(np.prod(shape)), shape[-1] if shape else 1
    eye = np.eye(n)
    if "low-rank" in kind:
        return low_rank_case(kind, rng, length, shape)
    if kind in ("identity", "zero", "number"):
        operator, factor = {"identity": (Identity(), 1.0), "zero": (Zero(), 0.0), "number": (Scalar(0.7), 0.7)}[kind]
        return operator, np.broadcast_to(factor * eye, (length, n, n))
    if kind == "scalars":
        values = rng.uniform(-1, 1, length)
        return Scalar(values), values[:, None, None] * eye
    if kind.startswith("diagonal"):
        values = rng.uniform(-1, 1, (length, *(shape if kind != "diagonal-shared" else shape[-1:])))
        values = values > 0 if kind == "diagonal-mask" else values
        rows = np.array([np.broadcast_to(entry, shape).reshape(n) for entry in values]).reshape(length, n)
        return Diagonal(values), rows[:, :, None] * eye
    if kind.startswith("dense"):
        batch = shape[:-1] if kind == "dense-entries" else ()
        matrices = rng.uniform(-1, 1, (length, *batch, d, d)) / d
        blocks = np.broadcast_to(matrices.reshape(length, int(np.prod(batch)), d, d), (length, n // d, d, d))
        return Dense(matrices), np.einsum("lbij,bc->lbicj", blocks, np.eye(n // d)).reshape(length, n, n)
    b = n // (2 * d)
    arrays, full = [], []
    for side in ("left", "right"):
        own = shape[-2:] if kind == f"pair-{side}-shared" else shape
        arrays.append(rng.uniform(-0.7, 0.7, (length, *own)))
        rows = arrays[-1].reshape(length, int(np.prod(own[:-2])), 2, d)
        full.append(np.broadcast_to(rows, (length, b, 2, d)))
    matrices = np.einsum("lbpu,lbqu,bc,uv->lbpucqv", *full, np.eye(b), np.eye(d)).reshape(length, n, n)
    return Pair(*arrays), matrices


def low_rank_case(
    kind: str, rng: np.random.Generator, length: int, shape: tuple[int, ...]
) -> tuple[LinearOperator, np.ndarray]:
    """A stack of rank 2, beside a diagonal, the identity (all maps one), a number, or a pair."""
    path = {
        "low-rank": "diagonal",
        "low-rank-shared": "identity",
        "low-rank-entries": "number",
        "pair-low-rank": "pair",
    }
    rest, matrices = residual_case(path[kind], rng, length, shape)
    flat = (*shape[:-2], 2 * shape[-1]) if kind.startswith("pair") else shape
    batch, d = flat[:-1] if kind == "low-rank-entries" else (), flat[-1]
    left = rng.uniform(-0.7, 0.7, (1 if kind == "low-rank-shared" else length, *batch, d, 2))
    right = rng.uniform(-0.7, 0.7, (1 if kind.startswith("low-rank-") else length, *batch, 2, d)) / d
    count = int(np.prod(flat[:-1]))
    full = np.broadcast_to((left @ right).reshape(-1, int(np.prod(batch)), d, d), (length, count, d, d))
    low = np.einsum("lbij,bc->lbicj", full, np.eye(count)).reshape(length, count * d, count * d)
    return rest + LowRank(left, right), matrices + low


def converted(operator: LinearOperator, array: Callable[[Any], Any]) -> LinearOperator:
    """The same stack over another library's arrays."""
    return operator.mapped(array)


def matrix_pullbacks(B: np.ndarray, array: Callable[[Any], Any] = np.asarray) -> list[Callable[[Any], Any]]:
    """The pullbacks of the linear blocks ``B``, (L, n, n), on states of any shape with n entries."""

    def pullback(transposed: Any) -> Callable[[Any], Any]:
        return lambda g: (transposed @ g.reshape(-1)).reshape(g.shape)

    return [pullback(array(matrix.T.copy())) for matrix in B]
