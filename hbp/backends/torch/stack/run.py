"""Runs through residual layers in PyTorch's autograd, one call at a time, pulled back by Highway-BP all at once.

Whoever calls the layers, `Sequential` or a model's own loop, calls them one by one. Each call keeps a graph of its
own, from a copy of its input to its output. In the outer graph a run is a chain of nodes that compute nothing: the
entry, whose inputs are the stream, the parameters and the tensors that all layers share, and one link per call. The
backward reaches the links first, which leave the cotangents that come from outside, and then the entry, which solves
the adjoint equation for all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from hbp.backends.torch.autograd import SWAPPING, Swap, foreign_leaf, nodes, opaque, tensors
from hbp.backends.torch.hooks import cause, leaf_of, no_backward_hooks, watched
from hbp.backends.torch.stack.calling import depending, needs_gradient, next_state, run_layer
from hbp.backends.torch.stack.graphs import Call, Modes, edge, pull_back, summed, version
from hbp.backends.torch.stack.nodes import Entry, Link
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


@opaque  # one break of a compiled graph per layer
def call_layer(
    stack: Stack, layer: nn.Module, target: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call ``target``, which is ``layer`` or has it as its child "layer", on x and further arguments.

    The call continues the run whose last state x is, or begins a new one.

    Returns:
        What the layer returns, its tensors that need gradients tied to the run.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"a {type(layer).__name__} got a state that is no real floating point tensor: {type(x).__name__}"
        )
    node: Any = x.grad_fn if x.output_nr == 0 and not watched(x) else None
    run = getattr(node, "run", None)
    with SWAPPING:
        outside = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        if isinstance(run, Run) and run.stack is stack and node.number == len(run.layers) and run.knows(outside):
            return run.call(layer, target, x, x, args, kwargs)
        if _follows(stack, layer, x):
            warnings.warn(
                f"a {type(layer).__name__} got another state than the layer before it returned ({cause(x, layer)}), or "
                "a tensor that needs gradients and was not given to the stack's first layer; a new run of Highway-BP "
                "begins there, and backprop is exact from run to run",
                stacklevel=3,
            )
        run = Run.begin(stack, outside)
        return run.call(layer, target, x, Entry.apply(run, x, *run.originals.values()), args, kwargs)


def _follows(stack: Stack, layer: nn.Module, x: Tensor) -> bool:
    """Whether x was made from what the layer before this one returned, so that a run that begins here is a loss."""
    ids = [id(member) for member in stack.members()]
    before = {one for one, other in pairwise(ids) if other == id(layer) != ids[0]}
    found = [node for node in nodes([x.grad_fn], _in_a_run) if _in_a_run(node)] if before else []
    links = [node for node in found if node.run.stack is stack and hasattr(node, "number")]
    return any(id(link.run.layers[link.number - 1]) in before for link in links)


def _in_a_run(node: Any) -> bool:
    return isinstance(getattr(node, "run", None), Run)


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
        name = f"layer {len(self.layers)}, a {type(layer).__name__},"
        prefix = "" if target is layer else "layer."
        named = layer.named_parameters(remove_duplicate=False)
        own = {prefix + parameter: self.leaves.get(id(p), p) for parameter, p in named}
        swap, start = Swap(self.leaves), self.start(x)
        arguments = swap(args), {key: swap(value) for key, value in kwargs.items()}
        with no_backward_hooks(name, target, layer):
            output = run_layer(name, target, own, start, *arguments)
        swap.check_unwritten(name)
        outputs = output if isinstance(output, tuple) else (output,)
        y = next_state(name, output, x)
        handed: list[Any] = [self.originals.get(id(out), out) for out in outputs]  # an argument handed on
        places = [i for i, out in enumerate(handed) if i == 0 or (out is outputs[i] and needs_gradient(out))]
        results = (depending(y, start), *(outputs[i] for i in places[1:]))
        self._check_leaves(name, results, start)
        declared = layer.residual_map(start.detach(), y.detach()) if hasattr(layer, "residual_map") else IDENTITY
        ends, state = tuple(map(edge, results)), y.detach()
        call = Call(
            layer, target, own, arguments, declared, Modes.now(x), start, ends, state, version(own, start, state)
        )
        for i, tensor in zip(places, self._tied(call, results, carrier), strict=True):
            handed[i] = tensor
        if not isinstance(output, tuple):
            return handed[0]
        return type(output)(*handed) if hasattr(output, "_fields") else tuple(handed)

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

    def _tied(self, call: Call, results: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        """A call's results, tied to the run by a new link."""
        self.layers.append(call.module)
        record = RECORD.get()
        if record is not None:
            record.append((self.stack, call))
        handed: tuple[Tensor, ...] = Link.apply(self, call, results, carrier)
        return handed

    def reached(self, number: int, call: Call, cotangents: tuple[Tensor | None, ...]) -> bool:
        """Take in a call with the cotangents that a backward pass has brought; whether it is the pass's first."""
        task: int = torch._C._current_graph_task_id()
        first = task != self.task
        if first:  # one before that never came to the entry left its calls here
            self.calls.clear()
            self.task = task
        self.calls[number] = call, cotangents
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
