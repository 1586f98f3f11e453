"""What a call's arguments hold, what its graph reaches, and who else turns it into a program of its own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

SWAPPING = threading.RLock()
"""Held where a module runs with other tensors in place of its parameters, which another thread must not see."""

_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7
_REASON = (
    "the backward pass by Highway-BP is no traceable code; set iterations=None, torch's own graph, or fullgraph=False"
)
opaque = partial(
    torch.compiler.disable,
    **({"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}),
)
"""Decorates functions at which `torch.compile` breaks its graph."""


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


def nodes(starts: Sequence[Any], behind: Any = None, last: Callable[[Any], bool] | None = None) -> Iterator[Any]:
    """The nodes of a graph, each once, from ``starts`` on, but not beyond the one ``behind`` and the ``last`` ones."""
    pending, seen = list(starts), {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node is not behind and (last is None or not last(node)):
            pending += [following for following, _ in node.next_functions]


def foreign_leaf(ends: Sequence[Tensor], start: Tensor, known: Container[int]) -> Tensor | None:
    """A leaf that a graph leads to, not ``start`` and not of ``known`` identity, so that its gradient would be lost.

    What lies behind a ``start`` that is no leaf is not looked at.
    """
    behind = start.grad_fn
    for node in nodes([end.grad_fn for end in ends], behind):
        if type(node) is _LEAF:
            leaf: Tensor = node.variable
            if leaf is not start and id(leaf) not in known:
                return leaf
    return None


_LEAF = type(torch.ones((), requires_grad=True).view_as(torch.ones(())).grad_fn.next_functions[0][0])
"""The kind of a leaf's node."""


def autocast_of(x: Tensor) -> tuple[Callable[[], AbstractContextManager[Any]], torch.dtype]:
    """What makes contexts with the autocast state that now holds on x's device, and the precision that it implies."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # meta tensors
        return nullcontext, x.dtype
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype, enabled), dtype if enabled else x.dtype


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context in which nothing on a device of this kind is cast."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def write_counter(x: Tensor) -> Tensor:
    """An empty tensor whose ``_version`` grows with every write into x or a view of it; x's memory is not kept."""
    counter = x.detach()
    counter.data = x.new_empty(0)
    return counter


def transformed() -> str:
    """Who turns the calls that now run into another program, which knows torch's own derivatives only; or "".

    `torch.compile` does not count: it breaks its graph at `opaque` functions and calls them as they are. While it
    compiles it hides all others but `torch.export`, so an opaque function asks.
    """
    if _exporting():
        return "torch.export"
    if torch.compiler.is_dynamo_compiling():
        return ""
    if torch.jit.is_tracing() or get_proxy_mode() is not None:
        return "a tracer (torch.export, make_fx, torch.jit.trace)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.func" if torch._C._functorch.peek_interpreter_stack() is not None else ""


def refuse_transforms() -> None:
    """Refuse to begin a backward pass by Highway-BP that a transform of the call would lose, or make exact unseen.

    Raises:
        RuntimeError: the call is transformed, with gradients.
    """
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        _refuse_transforms()


@opaque
def _refuse_transforms() -> None:
    by = transformed()
    if by:
        raise RuntimeError(
            f"{by} would lose the backward pass by Highway-BP; set iterations=None, torch's own graph, or use "
            "torch.no_grad() where only values count"
        )


def refuse_second_derivatives(cure: str, *cotangents: Tensor | None) -> None:
    """Refuse ``create_graph=True``, seen from inside a backward, and cotangents that come many at once.

    Raises:
        RuntimeError: the gradients shall be differentiable, or are those of ``is_grads_batched`` or ``vectorize``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"no second derivatives by Highway-BP or its exact adjoint; set {cure}, torch's own graph")
    if any(c is not None and torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents):
        raise RuntimeError(
            "no batched cotangents (is_grads_batched, vectorize=True) by Highway-BP or its exact adjoint; give them "
            f"singly, or set {cure}, torch's own graph"
        )


def numberless(x: Tensor) -> bool:
    """Whether a tensor has a shape only."""
    return bool(x.is_meta or is_fake(x))


def alike(found: Tensor, expected: Tensor, precision: torch.dtype) -> bool:
    """Whether two ways to the same numbers agree to half the digits of the largest of them.

    Tensors without numbers count as alike.
    """
    if numberless(found):
        return True
    tolerance = torch.finfo(precision).eps ** 0.5
    if not expected.numel() or (found - expected).abs().max() <= tolerance * expected.abs().max():
        return True
    size = float(expected.nan_to_num(0, 0, 0).abs().max())  # with NaN or infinity there
    return bool(torch.allclose(found, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True))
