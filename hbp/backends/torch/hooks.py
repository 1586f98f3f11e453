"""Hooks of PyTorch's that stand in a layer's way: those inside it, and those between layers.

A layer's graph is walked once per round, with parts of the gradient, and once more at the end. Hooks on parameters
and on tensors outside of the stack see none of that; a backward hook inside a layer would see all of it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


def hooked(target: nn.Module, layer: nn.Module, parts: Iterable[nn.Module]) -> bool:
    """Whether module hooks run when ``target``, of these parts, is called; a layer's inside it run outside of it."""
    kinds = FORWARD + BACKWARD
    if any(getattr(everywhere, f"_global{kind}") for kind in kinds):
        return True
    return any(getattr(m, kind) for m in parts if m is target or m is not layer for kind in kinds)


@contextmanager
def no_backward_hooks(name: str, target: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Refuse what sets backward hooks: modules that have some, and code that puts them on tensors or graph nodes.

    Raises:
        RuntimeError: hooks were set while this was open.
    """
    # Every hook that Python sets takes a number; only the compiler sets some that are not ours to refuse.
    handles, compiled = RemovableHandle.next_id, _compiled()
    yield
    if RemovableHandle.next_id == handles or _compiled() != compiled:
        return
    told = backward_hooks(name, target, layer) or refusal(name, ["a tensor or a node of the graph"])
    raise RuntimeError(
        f"{told} (hooks that another thread sets meanwhile, and forward hooks that a layer sets on itself, look the "
        "same from here)"
    )


def backward_hooks(name: str, target: nn.Module | None, layer: nn.Module) -> str:
    """Why a layer with backward hooks on modules cannot be pulled back in rounds, or ""."""
    named = [(path or "itself", m) for path, m in layer.named_modules() if m is target or m is not layer]
    places = [path for path, m in named if any(getattr(m, kind) for kind in BACKWARD)]
    places += [f"{path} (by fully_shard: shard the whole model alone)" for path, m in named if sharded(m)]
    if any(getattr(everywhere, f"_global{kind}") for kind in BACKWARD):
        places.append("all modules")
    return refusal(name, places) if places else ""


def refusal(name: str, places: list[str]) -> str:
    """Why hooks in these places are refused."""
    return (
        f"{name} sets backward hooks inside, on {', '.join(places)}; they would run once per round of Highway-BP, on "
        "parts of the gradient: remove them, or set iterations=None"
    )


def _compiled() -> int:
    """How many times torch.compile has compiled something."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["frames"]["total"] if utils else 0


def watched(state: Tensor) -> bool:
    """Whether somebody waits for the gradient of this state, or changes it."""
    return bool(state._backward_hooks) or (state.retains_grad and not state.is_leaf)


def cause(state: Tensor, layer: nn.Module) -> str:
    """What stands between a layer and the one before it, as far as can be seen."""
    node = "" if state.grad_fn is None else state.grad_fn.name()
    if sharded(layer):
        return "fully_shard on a layer gathers its weights for its own backward only; shard the whole model alone"
    if node.startswith("BackwardHookFunction"):
        return "a backward hook stands on a layer"
    if watched(state):
        return "a hook or retain_grad stands on the state"
    return "the model changes it, or a hook does"


def sharded(module: Any) -> bool:
    """Whether ``fully_shard`` has put its hooks on this module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def leaf_of(tensor: Tensor) -> Tensor:
    """A leaf with the values of a tensor, for a layer's own graph; a gradient that reached it would be lost."""
    leaf = tensor.detach().requires_grad_()
    leaf._post_accumulate_grad_hooks = REFUSING  # as by register_post_accumulate_grad_hook, with one dict for all
    return leaf


def _refuse_inner_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "a tensor made inside a converted or stacked layer and not returned by it (taken by a hook, from an attribute "
        "or a cache) was used in a loss; its gradient would not reach the model. Return it from the layer, or set "
        "iterations=None"
    )


REFUSING = OrderedDict({0: _refuse_inner_gradient})
