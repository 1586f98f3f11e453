"""Existing models whose stack is spread over ranks: each rank keeps its own layers and lets go of the others'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.autograd import Swap, tensors
from hbp.backends.torch.depth.passage import Passage
from hbp.backends.torch.depth.piece import Piece
from hbp.backends.torch.depth.ranks import Ranks
from hbp.core.solver import Solver


class SpreadStack(Piece):
    """A stack inside a model, spread over ranks, whose layers the model's own loop calls one by one."""

    called_whole = False
    passage: Passage | None = None
    """The forward pass that is under way."""
    handed: Any = None
    """The state that the last layer returned."""
    next: int = 0

    def __init__(
        self, layers: Sequence[nn.Module], ranks: Ranks, exchange: Any, solver: Solver, residual: Any, damping: Any
    ) -> None:
        """This rank's share of some layers, with its own part of the residual and the damping of all of them."""
        self.layers, self.own = layers, range(len(layers))
        self.configure(solver, residual, damping)  # checks those of all
        self.own = self.own[ranks.here * len(layers) // ranks.count : (ranks.here + 1) * len(layers) // ranks.count]
        self.spread(ranks, len(self.own), exchange)
        place = slice(self.own.start, self.own.stop)
        damping = damping[place] if isinstance(damping, list | tuple) else damping
        residual = residual if residual is None or residual.length is None else residual[place]
        self.configure(solver, residual, damping)

    @property
    def training(self) -> bool:  # type: ignore[override]
        return any(layer.training for layer in self.members())

    def members(self) -> Iterable[nn.Module]:
        return [self.layers[i] for i in self.own]

    def check(self, model: nn.Module) -> None:
        """Check that all ranks have the same model, and that no parameter stands on several ranks; collective."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        common = {name: p for name, p in model.named_parameters() if id(p) not in inside}
        facts = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
        facts |= {
            f"the sum of {name}": p.sum(dtype=torch.float64).item() for name, p in common.items() if not p.is_meta
        }
        self.ranks.agree("the model to convert", facts, [], _tied(model, self.layers))

    def let_go(self, model: nn.Module) -> None:
        """Free the memory of the layers of other ranks, whose parameters stay on the meta device, without a name."""
        for number, layer in enumerate(self.layers):
            if number not in self.own:
                own = layer.to("meta").requires_grad_(False).state_dict()
                layer.register_state_dict_post_hook(_leave_out)
                layer.register_load_state_dict_pre_hook(partial(_take_none, own))
                layer._apply = partial(_convert_only, layer)
        names = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        kept: Any = getattr(model, "_ddp_params_and_buffers_to_ignore", [])  # where DDP looks
        model._ddp_params_and_buffers_to_ignore = [*kept, *names]
        for part in model.modules():
            if hasattr(part, "save_pretrained"):
                part.save_pretrained = partial(_refuse_to_save, self.numbers)

    def call(self, number: int, target: nn.Module, x: Any, args: Any, kwargs: Any) -> Any:
        """A call of one layer in the model's loop; ``target`` runs it. Layers of other ranks give shapes only."""
        layer = self.layers[number]
        if number == 0:
            self.passage, self.handed, self.next = Passage.enter(self, x, args, kwargs), x, 0
        passage = self.passage
        if passage is None or number != self.next or x is not self.handed:
            self.passage = None
            raise RuntimeError(
                f"layer {number}, a {type(layer).__name__}, was not called with what layer {number - 1} returned; a "
                "stack over several ranks is called whole, in order, and nothing may change its state between layers"
            )
        here = number in self.own
        result = passage.call(layer, target, args, kwargs) if here else _shapes(number, target, x, args, kwargs)
        if number == len(self.layers) - 1:
            self.passage = self.handed = None  # nothing of a pass outlives it
            return _with_state(result, passage.leave())
        self.handed, self.next = result[0] if isinstance(result, tuple) else result, number + 1
        return result


def _tied(model: nn.Module, layers: Sequence[nn.Module]) -> str:
    """Why a stack cannot be spread, or ""."""
    if len(set(layers)) < len(layers):
        return "some of the layers are one and the same, which cannot stand on several ranks"
    owners: dict[int, set[int]] = {}
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            owners.setdefault(id(p), set()).add(i)
    inside = {id(part) for layer in layers for part in layer.modules()}
    for part in model.modules():
        for p in part._parameters.values():
            if id(part) not in inside and id(p) in owners:
                owners[id(p)].add(-1)
    tied = next((sorted(found) for found in owners.values() if len(found) > 1), None)
    return (
        "" if tied is None else f"a parameter of layer {tied[-1]} stands elsewhere too; only what is outside is shared"
    )


def _shapes(number: int, target: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Any:
    """What a layer of another rank returns, without numbers."""
    meta = Swap({id(t): t.to("meta") for t in tensors((x, args, kwargs))})
    try:
        with torch.no_grad():
            return target(meta(x), *meta(args), **{name: meta(value) for name, value in kwargs.items()})
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"layer {number}, which stands on another rank, cannot run on the meta device, for its shapes: {error}"
        ) from error


def _with_state(result: Any, state: Tensor) -> Any:
    """A layer's result with another state."""
    if not isinstance(result, tuple):
        return state
    rest = (state, *result[1:])
    return type(result)(*rest) if hasattr(result, "_fields") else rest


def _leave_out(_: Any, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


def _take_none(own: dict[str, Tensor], _: Any, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    _leave_out(None, state_dict, prefix)
    state_dict.update({prefix + name: tensor for name, tensor in own.items()})


def _convert_only(layer: nn.Module, function: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """In place of a layer's ``_apply``, as by ``model.to``: what has no numbers here takes a new dtype, and stays."""

    def converted(t: Tensor) -> Tensor:
        return t.to(function(torch.empty(0, dtype=t.dtype)).dtype)

    return type(layer)._apply(layer, converted, *args, **kwargs)


def _refuse_to_save(numbers: range, *_: Any, **__: Any) -> None:
    raise RuntimeError(
        f"this rank holds layers {numbers.start} to {numbers.stop - 1} only, so save_pretrained would lose the others; "
        "save the state_dict by torch.distributed.checkpoint, and load that into an unconverted model"
    )
