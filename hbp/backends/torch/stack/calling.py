"""One call of one layer: run on a leaf, its results checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hbp.core.pullbacks import check_same


def run_layer(name: str, target: nn.Module, own: dict[str, Tensor], start: Tensor, args: Any, kwargs: Any) -> Any:
    """Call a layer on the leaf ``start``, with a graph."""
    try:
        with torch.enable_grad():
            return torch.func.functional_call(target, own, (start, *args), kwargs)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise RuntimeError(
            f"{name} writes into its input, as nn.ReLU(inplace=True) does; use inplace=False, or set iterations=None"
        ) from error


def next_state(name: str, output: Any, x: Tensor) -> Tensor:
    """The state among a layer's results, checked to be like x."""
    y = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} returned a {type(output).__name__}; expected a tensor, or a tuple whose first entry is one"
        )
    try:
        return check_same(f"the output of {name}", y, x)
    except ValueError as error:
        raise ValueError(
            f"{error}; the layers of a stack keep their state's shape: of a model in stages convert one, stacks="
            '"..." with the name of its list'
        ) from None


def depending(y: Tensor, start: Tensor) -> Tensor:
    """y; one that depends on nothing, not even the state, with a graph of zero derivatives."""
    if y.requires_grad:
        return y
    with torch.enable_grad():
        return torch.where(torch.zeros_like(start, dtype=torch.bool), start, y)


def needs_gradient(value: Any) -> bool:
    """Whether it is a tensor with a gradient to come."""
    return isinstance(value, Tensor) and value.requires_grad
