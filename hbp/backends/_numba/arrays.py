"""What compiled forwards and adjoints share: fresh arrays of either library, a cell's numbers as loops take them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hbp.backends._numba.compile import as_numpy
from hbp.cells import GRUParameters, LSTMParameters
from hbp.core.backend import Array


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


def empty(like: Array, shape: tuple[int, ...]) -> Array:
    """A fresh array of the library and dtype of another, not written yet."""
    return like.new_empty(shape) if hasattr(like, "new_empty") else np.empty(shape, like.dtype)


def zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """An array of zeros of the library and dtype of another."""
    return like.new_zeros(shape) if hasattr(like, "new_zeros") else np.zeros(shape, like.dtype)


def rows_of(x: Array) -> np.ndarray:
    """All steps of all sequences as the rows of a NumPy matrix, without a copy."""
    return as_numpy(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dense(x: Array) -> np.ndarray:
    """An array as the loops read it: contiguous, copied where it is not."""
    return np.ascontiguousarray(as_numpy(x))
