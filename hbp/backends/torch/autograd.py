"""What a call's arguments hold, and what its graph reaches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

SWAPPING = threading.RLock()
"""Held where a module runs with other tensors in place of its parameters, which another thread must not see."""


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts; other objects keep theirs (`foreign_leaf` finds them)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple) or type(value) is list:
        for part in value:
            yield from tensors(part)
    elif type(value) is dict:
        yield from tensors(list(value.values()))


@dataclass
class Swap:
    """Replaces tensors in nests of arguments; containers in which nothing is replaced stay the same objects."""

    leaves: dict[int, Tensor]
    """The replacements, by the identity of what they replace."""
    copies: list[tuple[Any, list[Any]]] = field(default_factory=list)
    """The lists and dicts that were rebuilt, each with its entries."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.leaves.get(id(value), value)
        if not any(id(tensor) in self.leaves for tensor in tensors(value)):
            return value
        if isinstance(value, tuple):
            parts = [self(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        copy = {key: self(part) for key, part in value.items()} if type(value) is dict else [self(p) for p in value]
        self.copies.append((copy, _entries(copy)))
        return copy

    def check_unwritten(self, name: str) -> None:
        """Check that the layer wrote into none of the copies, which its caller would not see."""
        for copy, entries in self.copies:
            if len(entries) != len(copy) or any(a is not b for a, b in zip(entries, _entries(copy), strict=True)):
                raise RuntimeError(
                    f"{name} wrote into a {type(copy).__name__} given to it that holds tensors needing gradients; "
                    "give it those apart, or set iterations=None"
                )


def _entries(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def foreign_leaf(ends: Sequence[Tensor], start: Tensor, known: Container[int]) -> Tensor | None:
    """A leaf that a graph leads to, not ``start`` and not of ``known`` identity, so that its gradient would be lost."""
    pending, seen = [end.grad_fn for end in ends], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            leaf: Tensor = node.variable
            if leaf is not start:
                return leaf
        pending += [following for following, _ in node.next_functions]
    return None


def autocast_of(x: Tensor) -> tuple[Callable[[], AbstractContextManager[Any]], torch.dtype]:
    """What makes contexts with the autocast state that now holds on x's device, and the precision that it implies."""
    kind = x.device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype, enabled), dtype if enabled else x.dtype


def refuse_second_derivatives(cure: str) -> None:
    """Refuse ``create_graph=True``, seen from inside a backward.

    Raises:
        RuntimeError: the gradients shall be differentiable.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"no second derivatives by Highway-BP or its exact adjoint; set {cure}, torch's own graph")
