"""What `GRU` and `LSTM` are called with: one sequence, a batch of them or a packed one, and initial states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Sequence:
    """A batch of sequences as the vendor's kernels take it: (T, B, I), or packed data with its batch sizes."""

    data: Tensor
    batch_sizes: Tensor | None
    batch: int


def checked(
    mode: str,
    input: Any,  # noqa: A002
    hx: Any,
    weight: Tensor,
    features: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The input's data and the initial states given, or none.

    Raises:
        TypeError, ValueError: they are no tensors, as many as belong there, not of one dtype, or no sequence.
        RuntimeError: there are more or fewer features.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        raise TypeError(f"the input is a {type(input).__name__}; give a torch.Tensor or a PackedSequence")
    given = () if hx is None else tuple(hx) if mode == "LSTM" and isinstance(hx, tuple | list) else (hx,)
    count = 2 if mode == "LSTM" else 1
    if given and (len(given) != count or not all(isinstance(state, Tensor) for state in given)):
        wanted = "two tensors, (h, c)," if count == 2 else "one tensor"
        raise TypeError(f"hx is a {type(hx).__name__}; give {wanted} of shape (layers x directions, B, H), or None")
    for name, tensor in (("the weights", weight), *(("an initial state", state) for state in given)):
        if tensor.dtype != data.dtype and not torch.is_autocast_enabled(data.device.type):
            raise ValueError(f"the input is {data.dtype} and {name} {tensor.dtype}; cast one")
    if data is input and data.dim() not in (2, 3):
        raise ValueError(f"the input has {data.dim()} dimensions; expected 2 (one sequence) or 3 (a batch)")
    if data.shape[-1] != features:
        raise RuntimeError(f"the input has {data.shape[-1]} features, expected input_size={features}")
    return data, given


def unbatched(input: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:  # noqa: A002
    """One sequence and its states as a batch of one; RuntimeError where the states are those of a batch."""
    for state in given:
        if state.dim() != 2:
            raise RuntimeError(f"for one sequence the initial state has 2 dimensions, not {state.dim()}")
    return input[:, None], tuple(state[:, None] for state in given)


def reordered(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    """States, (layers x directions, B, H) each, with the batch in another order."""
    return tuple(state if order is None else state.index_select(1, order) for state in states)
