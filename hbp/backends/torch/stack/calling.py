"""One call of one layer: run on a leaf, its results checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbp.core.pullbacks import check_same


class Place(NamedTuple):
    """Where a module, or one inside it, holds a parameter."""

    name: str
    holder: dict[str, Any]
    key: str
    held: nn.Parameter


def places_of(module: nn.Module, prefix: str = "") -> Iterator[Place]:
    """All places of parameters in a module, each name once; a parameter in several of them comes as often."""
    for key, held in module._parameters.items():
        if held is not None:
            yield Place(prefix + key, module._parameters, key, held)
    for key, child in module._modules.items():
        if child is not None:
            yield from places_of(child, f"{prefix}{key}.")


def run_layer(
    name: str, target: nn.Module, places: list[Place], own: Mapping[str, Tensor], start: Tensor, args: Any, kwargs: Any
) -> Any:
    """Call a layer on the leaf ``start``, with a graph and with ``own`` tensors in its parameters' places.

    As `torch.func.functional_call`, which takes longer to find the places than a small layer to run.
    """
    if isinstance(target, torch.jit.ScriptModule | nn.DataParallel):
        raise RuntimeError(f"{name} cannot run with other tensors as its parameters; set iterations=None")
    try:
        for place in places:
            place.holder[place.key] = own[place.name]
        with torch.enable_grad():
            return target(start, *args, **kwargs)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise RuntimeError(
            f"{name} writes into its input, as nn.ReLU(inplace=True) does; use inplace=False, or set iterations=None"
        ) from error
    finally:
        for place in places:
            place.holder[place.key] = place.held


def next_state(name: str, output: Any, x: Tensor) -> Tensor:
    """The state among a layer's results, checked to be like x."""
    y = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} returned a {type(output).__name__}; expected a tensor, or a tuple whose first entry is one"
        )
    if y.shape == x.shape and y.dtype == x.dtype:
        return y
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
