"""Runs through residual layers in PyTorch's autograd, one call at a time, pulled back by Highway-BP all at once.

Whoever calls the layers, `Sequential` or a model's own loop, calls them one by one. Each call keeps a graph of its
own, from a copy of its input to its output. In the outer graph a run is a chain of nodes that compute nothing: the
entry, whose inputs are the stream, the parameters and the tensors that all layers share, and one link for each state
that somebody sees: per call in a model's own loop, for all calls of a `Sequential`. The backward reaches the links
first, which leave the cotangents that come from outside, and then the entry, which solves the adjoint equation for all
layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from hbp.backends.torch.autograd import Swap, foreign_leaf
from hbp.backends.torch.hooks import leaf_of, no_backward_hooks
from hbp.backends.torch.stack.calling import depending, needs_gradient, next_state, places_of, run_layer
from hbp.backends.torch.stack.graphs import Call, Modes, edge, pull_back, summed, version
from hbp.backends.torch.stack.nodes import Link
from hbp.backends.torch.stack.options import Stack
from hbp.core.adjoint import highway
from hbp.core.backend import dtype_name
from hbp.core.chain import LayerChain
from hbp.core.operator import Identity, LinearOperator
from hbp.core.solver import Solver

IDENTITY = Identity()
RECORD: ContextVar[list[tuple[Stack, Call]] | None] = ContextVar("RECORD", default=None)
"""Where a list, calls are appended to it."""


@contextmanager
def recorded() -> Iterator[list[tuple[Stack, Call]]]:
    """A list that grows by each call of a stack's layer while this is open, with its stack."""
    found: list[tuple[Stack, Call]] = []
    token = RECORD.set(found)
    try:
        yield found
    finally:
        RECORD.reset(token)


class Made(NamedTuple):
    """One call of a layer with what it returned."""

    call: Call
    output: Any
    places: list[int]
    """Of the output's tensors that need gradients of their own, the next state first."""
    results: tuple[Tensor, ...]
    """These tensors."""


@dataclass(eq=False)
class Run:
    """Consecutive calls of layers, each on the state that the one before returned.

    Nothing here refers to the links, whose nodes refer to it: a graph that is dropped is freed at once.
    """

    stack: Stack
    solver: Solver
    leaves: dict[int, Tensor]
    """Copies, by identity, of what the entry takes beside x: hooks on that see the final gradient, once."""
    originals: dict[int, Tensor]
    """And back: the tensors shared by the layers and the parameters, by the identity of the copies."""
    layers: list[nn.Module] = field(default_factory=list)
    """The layers called so far."""
    calls: dict[int, tuple[Call, tuple[Tensor | None, ...]]] = field(default_factory=dict)
    """The calls that the backward pass ``task`` has reached, with their ends' cotangents, left for the entry."""
    task: int = -1

    @classmethod
    def begin(cls, stack: Any, outside: list[Tensor]) -> Self:
        """A run whose first layer takes these tensors that need gradients."""
        given = tuple({id(tensor): tensor for tensor in (*outside, *stack.trainable())}.values())
        leaves = {id(tensor): leaf_of(tensor) for tensor in given}
        originals = {id(leaf): tensor for leaf, tensor in zip(leaves.values(), given, strict=True)}
        return cls(stack, stack.current(), leaves, originals)

    def knows(self, outside: list[Tensor]) -> bool:
        """Whether these tensors entered with the run; only then can they get gradients from it."""
        return all(id(tensor) in self.leaves for tensor in outside)

    def call(self, layer: nn.Module, target: nn.Module, x: Tensor, carrier: Tensor, args: Any, kwargs: Any) -> Any:
        """Call one layer on the state x, as `call_layer`; ``carrier`` is the outer tensor its link hangs on."""
        made = self.made(layer, target, x, args, kwargs)
        outputs = made.output if isinstance(made.output, tuple) else (made.output,)
        handed: list[Any] = [self.originals.get(id(out), out) for out in outputs]  # an argument handed on
        for i, tensor in zip(made.places, self.tied([made.call], made.results, carrier), strict=True):
            handed[i] = tensor
        if not isinstance(made.output, tuple):
            return handed[0]
        return type(made.output)(*handed) if hasattr(made.output, "_fields") else tuple(handed)

    def made(self, layer: nn.Module, target: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Made:
        """Call one layer on the state x, as `call`; nothing is tied to the run yet."""
        name = f"layer {len(self.layers)}, a {type(layer).__name__},"
        held = list(places_of(layer, "" if target is layer else "layer."))
        own = {place.name: self.leaves.get(id(place.held), place.held) for place in held}
        swap, start = Swap(self.leaves), self.start(x)
        arguments = swap(args), {key: swap(value) for key, value in kwargs.items()}
        with no_backward_hooks(name, target, layer):
            output = run_layer(name, target, held, own, start, *arguments)
        swap.check_unwritten(name)
        outputs = output if isinstance(output, tuple) else (output,)
        y = next_state(name, output, x)
        more = [i for i, out in enumerate(outputs) if i and needs_gradient(out) and id(out) not in self.originals]
        results = (depending(y, start), *(outputs[i] for i in more))
        self._check_leaves(name, results, start)
        state, ends = y.detach(), tuple(map(edge, results))
        declared = layer.residual_map(start.detach(), state) if hasattr(layer, "residual_map") else IDENTITY
        call = Call(
            layer, target, own, arguments, declared, Modes.now(x), start, ends, state, version(own, start, state)
        )
        self.layers.append(layer)
        record = RECORD.get()
        if record is not None:
            record.append((self.stack, call))
        return Made(call, output, [0, *more], results)

    def start(self, x: Tensor) -> Tensor:
        """What the next call starts from, with the values of x."""
        return leaf_of(x)

    def _check_leaves(self, name: str, results: tuple[Tensor, ...], start: Tensor) -> None:
        foreign = foreign_leaf(results, start, self.originals)
        if foreign is not None:
            raise RuntimeError(
                f"{name} reads a tensor of shape {tuple(foreign.shape)} that needs gradients and is neither its "
                "parameter nor a tensor, tuple, list or dict given to it (a cache, a closure, an attribute, weights "
                "computed by a hook, a leaf made inside); its gradient would be lost: register it or pass it, use "
                "use_cache=False, or set iterations=None"
            )

    def tied(self, calls: list[Call], results: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        """The results of the last of these calls, tied to the run by a new link."""
        handed: tuple[Tensor, ...] = Link.apply(self, calls, results, carrier)
        return handed

    def reached(self, number: int, calls: list[Call], cotangents: tuple[Tensor | None, ...]) -> bool:
        """Take in a link's calls, the last with what a backward pass has brought; whether it is the pass's first."""
        task: int = torch._C._current_graph_task_id()
        first = task != self.task
        if first:  # one before that never came to the entry left its calls here
            self.calls.clear()
            self.task = task
        for i, call in enumerate(reversed(calls)):
            self.calls[number - i] = call, (None,) * len(call.ends) if i else cotangents
        return first

    def gradients(self) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the first state and of the originals, from the cotangents that the links left."""
        reached = [self.calls.pop(i) for i in sorted(self.calls)]
        calls, leaves = [call for call, _ in reached], list(self.leaves.values())
        stages = self.stages(calls)
        first, closing = calls[0].start, {id(stage[-1]) for stage in stages}
        arrived = [came[0] for call, came in reached if id(call) in closing]
        *entering, last = (torch.zeros_like(first) if c is None else c for c in (None, *arrived))
        others = [
            (end, cotangent)
            for call, came in reached
            for i, (end, cotangent) in enumerate(zip(call.ends, came, strict=True))
            if cotangent is not None and (i or id(call) not in closing)
        ]
        if others:  # results inside stages were used: cotangents of their states and leaves, known beforehand
            ends, cotangents = zip(*others, strict=True)
            pulled = pull_back(ends, [*(stage[0].start for stage in stages), *leaves], cotangents)
            entering = [c if more is None else c + more for c, more in zip(entering, pulled, strict=False)]
        sources = torch.stack(entering) if others or any(c is not None for c in arrived[:-1]) else None
        graphs, residual = self.linearized(calls, leaves)
        chain = LayerChain(graphs, residual, (tuple(first.shape), dtype_name(first)))
        g = highway(chain, last, sources=sources, **self.solved())
        found = graphs.gradients(g[1:], leaves)
        if others:
            found = [summed(a, b) for a, b in zip(found, pulled[len(stages) :], strict=True)]
        return g[0], found

    def solved(self) -> dict[str, Any]:
        """How the adjoint equation is solved, as `highway` takes it."""
        return {"solver": self.solver, "backend": self.stack.backend}

    def stages(self, calls: list[Call]) -> list[list[Call]]:
        """These calls, those of one graph together."""
        return [[call] for call in calls]

    def linearized(self, calls: list[Call], leaves: list[Tensor]) -> tuple[Any, LinearOperator]:
        """The pullbacks of these calls' stages, and their residual maps."""
        return self.stack.pullbacks(calls, leaves), self.stack.residual_maps(calls, calls[0].start)
