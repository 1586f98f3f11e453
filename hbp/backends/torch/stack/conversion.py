"""Existing models: their stack of layers found and given a backward pass by Highway-BP, in place."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from hbp.backends.torch.depth.conversion import SpreadStack
from hbp.backends.torch.depth.exchange import Exchange
from hbp.backends.torch.depth.ranks import Ranks
from hbp.backends.torch.stack.finding import Row, largest, named
from hbp.backends.torch.stack.options import Stack
from hbp.backends.torch.stack.tracked import call_layer
from hbp.core.backend import check_kind
from hbp.core.operator import LinearOperator
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver

Model = TypeVar("Model", bound=nn.Module)
LOG = logging.getLogger("hbp")


def convert(
    model: Model,
    iterations: int | Schedule | None = None,
    *,
    chunk: int | None = None,
    residual: LinearOperator | None = None,
    damping: float | Sequence[float] = 0,
    tolerance: float | None = None,
    solver: Solver | None = None,
    stacked: bool | None = None,
    stacks: str | Sequence[str] | None = None,
    mesh: Any = None,
    exchange: Exchange | None = None,
) -> Model:
    """Give the stack of layers inside a model a backward pass by Highway-BP, in place.

    The layers stay where they are, with their weights, hooks and names; only their ``forward`` is taken over, so
    the model's own loop goes on calling them one by one, on all of the list or on a slice, with its own arguments.
    Calls without gradients, as in ``generate``, and ``iterations=None`` are the layers' own. What the calls return
    may be used in a loss, intermediate states too, and written into. A loop that changes the state between layers, or
    sets a hook or ``retain_grad`` on it, is exact there, and said so. A tensor that needs gradients and is neither a
    layer's parameter nor given to it (from a closure, an attribute, a hook that computes weights) is refused, as are a
    loss on a tensor from inside a layer and backward hooks set there, which would run once per round (``retain_grad``
    inside a layer adds the rounds up); hooks on parameters and outside tensors run once. `torch.compile` breaks its
    graph at each layer. How the last backward pass pulled back: ``layer.forward.stack.path``. What was converted is
    logged ("hbp", level INFO); `revert` undoes it.

    Args:
        model: any module that calls the entries of a `torch.nn.ModuleList` or `torch.nn.Sequential` one after
            another, each on what the one before returned: a tensor, or a tuple whose first entry is the next state.
        iterations, chunk, residual, damping, tolerance, solver, stacked: as for `Sequential`.
        stacks: the name or names of the lists to convert, whole, as ``"encoder.layers"``. Otherwise that row of
            entries of one class that has most parameters; of a model in stages of several widths, the longest row.
        mesh, exchange: as for `DepthParallel`; every rank gives the same model with the same weights (and makes its
            optimizer after this call). Each keeps its share of the layers; the parameters of the others are on the
            meta device then and in no `state_dict`, and calls of them return shapes without numbers, up to the last
            layer's, which returns the stack's last state. The whole piece of a rank is one stage unless chunk is given;
            residual and damping are those of all layers.

    Returns:
        The model.

    Raises:
        ValueError: there is no such list, its layers cannot be converted (the message says why), or an option is
            none.

    >>> model = nn.Sequential(nn.Linear(3, 4), *(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(6)))
    >>> model = convert(model, iterations=2)
    >>> model(torch.randn(5, 3)).sum().backward()
    """
    ranks = None if mesh is None else Ranks.along(mesh)
    with nullcontext() if ranks is None else ranks.together("converting the model"):
        how = Solver.of(solver, iterations=iterations, chunk=1 if chunk is None else chunk, tolerance=tolerance)
        chosen = _rows(model, stacks)
        if ranks is not None:
            stack = SpreadStack(_one_stack(chosen, stacked), ranks, exchange, how, residual, damping)
            if chunk is None and solver is None:
                stack.chunk = len(stack.own)
    if ranks is not None:
        return _spread(model, stack)
    if exchange is not None:
        raise ValueError(f"exchange={exchange} is given without a mesh; give mesh= too")
    converted = []
    for name, layers in chosen:
        options = ConvertedStack(tuple(dict.fromkeys(layers)))
        options.configure(how, residual, damping, stacked)
        converted.append((name, layers, options))
    for name, layers, options in converted:
        for layer in options.layers:
            layer.forward = ConvertedForward(options, layer)
        kind = type(layers[0]).__name__
        LOG.info("hbp.convert: %s of %s: %d layers, %s", name or "the entries", type(model).__name__, len(layers), kind)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`, in place: the layers' ``forward`` is their class's again.

    Raises:
        ValueError: nothing in the model is converted.

    >>> model = convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), iterations=2)
    >>> "forward" in vars(model[0]), "forward" in vars(revert(model)[0])
    (True, False)
    """
    found = [part for part in model.modules() if _is_converted(part)]
    if not found:
        raise ValueError(f"nothing in this {type(model).__name__} is converted")
    if any(isinstance(layer.forward, SpreadForward) for layer in found):
        raise ValueError("a model spread over several ranks cannot be reverted: no rank has all of its layers")
    for layer in found:
        del layer.forward
    return model


def _rows(model: nn.Module, stacks: Any) -> list[Row]:
    """The lists of a model to convert, checked."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    chosen = named(model, stacks) if stacks is not None else [largest(model)]
    for name, layers in chosen:
        for i, layer in enumerate(layers):
            _check_layer(f"{name}[{i}]" if name else f"entry {i}", layer)
    return chosen


def _one_stack(chosen: list[Row], stacked: Any) -> Sequence[nn.Module]:
    """The layers that `convert` spreads over several ranks."""
    if stacked is not None:
        raise ValueError(f"stacked={stacked} is given beside a mesh; over several ranks each stage has its own graph")
    if len(chosen) > 1:
        raise ValueError(f"stacks names {len(chosen)} lists; over several ranks one stack is converted")
    return chosen[0][1]


def _spread(model: Model, stack: SpreadStack) -> Model:
    """`convert` over several ranks; collective."""
    stack.settle(len(stack.own))
    stack.check(model)
    stack.let_go(model)
    for i, layer in enumerate(stack.layers):
        layer.forward = SpreadForward(stack, layer, i)
    first, last = stack.own[0], stack.own[-1]
    LOG.info("hbp.convert: layers %d to %d of %d on this rank", first, last, len(stack.layers))
    return model


class ConvertedStack(Stack):
    """The options of a converted stack, shared by its layers."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self.layers = layers

    def members(self) -> Iterable[nn.Module]:
        return self.layers


class ConvertedForward:
    """A converted layer's ``forward``: within a run where gradients are needed, else that of the layer's class."""

    def __init__(self, stack: Any, layer: nn.Module) -> None:
        self.stack = stack
        self.layer = layer

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.layer).forward.__get__(self.layer))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if not self.stack.tracks(args, kwargs):
            return type(layer).forward(layer, *args, **kwargs)
        x, args = self._state(args, kwargs)
        return call_layer(self.stack, layer, _OwnForward(layer), x, args, kwargs)

    def _state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """The state among a call's arguments, and the others given by their place."""
        layer = self.layer
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing is on in a converted layer; turn it off, as by "
                "model.gradient_checkpointing_disable(), or call hbp.backends.torch.revert(model)"
            )
        if args:
            return args[0], args[1:]
        name = next(iter(self.__signature__.parameters))
        if name not in kwargs:
            raise TypeError(f"a {type(layer).__name__} was called without its state, {name}")
        return kwargs.pop(name), ()


class SpreadForward(ConvertedForward):
    """The ``forward`` of a layer of a stack over several ranks."""

    stack: SpreadStack

    def __init__(self, stack: SpreadStack, layer: nn.Module, number: int) -> None:
        super().__init__(stack, layer)
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, args = self._state(args, kwargs)
        return self.stack.call(self.number, _OwnForward(self.layer), x, args, kwargs)


class _OwnForward(nn.Module):
    """The forward of a layer's class, with the layer's parameters as its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _is_converted(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), ConvertedForward)


def _check_layer(name: str, layer: nn.Module) -> None:
    reasons = {
        "it is converted already; call revert first": _is_converted(layer),
        "its forward has been replaced, by another library or a compiler; convert before that": "forward"
        in layer.__dict__,
        "it is compiled to TorchScript, whose calls cannot be taken over": isinstance(layer, torch.jit.ScriptModule),
        "gradient checkpointing is on; turn it off, since its layers run twice": bool(
            getattr(layer, "gradient_checkpointing", False)
        ),
    }
    for reason, given in reasons.items():
        if given:
            raise ValueError(f"{name}, a {type(layer).__name__}, cannot be converted: {reason}")
