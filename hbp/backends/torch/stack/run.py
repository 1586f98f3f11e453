"""Runs through residual layers in PyTorch's autograd, one call at a time, pulled back by Highway-BP all at once.

Whoever calls the layers, `Sequential` or a model's own loop, calls them one by one. Each call keeps a graph of its
own, from a copy of its input to its output. In the outer graph a run is a chain of nodes that compute nothing: the
entry, whose inputs are the stream, the parameters and the tensors that all layers share, and one link per call. The
backward reaches the links first, which leave the cotangents that come from outside, and then the entry, which solves
the adjoint equation for all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.autograd import (
    SWAPPING,
    Swap,
    alike,
    autocast_of,
    foreign_leaf,
    opaque,
    refuse_second_derivatives,
    refuse_transforms,
    tensors,
)
from hbp.backends.torch.options import Scheduled
from hbp.backends.torch.stack.graphs import (
    Call,
    Layer,
    LayerGraphs,
    StackedGraph,
    promising,
    pull_back,
    refusal,
    version,
)
from hbp.core.adjoint import highway
from hbp.core.backend import dtype_name
from hbp.core.chain import LayerChain
from hbp.core.operator import Identity, LinearOperator
from hbp.core.pullbacks import check_same
from hbp.core.solver import Solver
from hbp.linearization import stack_maps

BACKEND = TorchBackend()
IDENTITY = Identity()


class Stack(Scheduled):
    """The options of a stack of layers, and the calls of its layers."""

    residual: LinearOperator | None = None
    damping: float | Sequence[float] = 0
    stacked: bool | None = None
    """Whether equal layers are pulled back all at once over stacked parameters; None: where that was faster."""
    path: str = ""
    """How the last backward pass pulled back: "stacked", or "loop" with the reason."""
    proved: bool = False
    """Whether the layers were once pulled back all at once without fault."""
    calls: list[Call] | None = None
    """Where a list, each call is appended to it."""
    previous: int = 0
    """The identity of the layer called last."""

    def configure(self, solver: Solver, residual: Any = None, damping: Any = 0, stacked: bool | None = None) -> None:
        """Set the options, checked.

        Raises:
            TypeError, ValueError: an option is not what its name says.
        """
        if residual is not None and not isinstance(residual, LinearOperator):
            raise TypeError(f"residual is a {type(residual).__name__}; give an operator, as hbp.Identity(), or None")
        numbers = damping if isinstance(damping, list | tuple) else (damping,)
        if not all(isinstance(gamma, Real) for gamma in numbers):
            raise TypeError(f"damping is {damping!r}; give a number, or one per layer")
        if stacked not in (None, True, False):
            raise ValueError(f"stacked={stacked!r}; give True, False, or None for the faster one")
        self.solver, self.residual, self.damping, self.stacked = solver, residual, damping, stacked

    def members(self) -> Iterable[nn.Module]:
        """The layers, in order."""
        raise NotImplementedError

    def tracks(self, *given: Any) -> bool:
        """Whether a call on these arguments is pulled back here; otherwise torch's own graph is as good."""
        if self.current().exact:
            return False
        refuse_transforms()
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in tensors(given)) or bool(self.trainable())

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of all layers that need gradients."""
        return [p for layer in self.members() for p in layer.parameters() if p.requires_grad]

    @opaque  # one break of a compiled graph per layer
    def call(
        self, layer: nn.Module, target: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        node: Any = x.grad_fn if x.output_nr == 0 else None
        run = getattr(node, "run", None)
        with SWAPPING:
            outside = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
            if isinstance(run, Run) and run.stack is self and node.number == len(run.layers) and run.knows(outside):
                self.previous = id(layer)
                return run.call(layer, target, x, x, args, kwargs)
            self._check_order(layer)
            run = Run.begin(self, outside)
            return run.call(layer, target, x, _Entry.apply(run, x, *run.originals.values()), args, kwargs)

    def _check_order(self, layer: nn.Module) -> None:
        """Say so where a run begins at a layer that follows on the one called last, so that parallelism is lost."""
        ids = [id(member) for member in self.members()]
        if id(layer) != ids[0] and (self.previous, id(layer)) in pairwise(ids):
            warnings.warn(
                f"a {type(layer).__name__} got another state than the layer before it returned (the model changes it, "
                "or a hook does), or a tensor that needs gradients and was not given to the stack's first layer; a "
                "new run of Highway-BP begins there, and backprop is exact from run to run",
                stacklevel=4,
            )
        self.previous = id(layer)

    def graphs(self, calls: Sequence[Call]) -> LayerGraphs | StackedGraph:
        """The pullbacks of these calls, in the way ``stacked`` says; `path` tells which."""
        reason = "pinned" if self.stacked is False else refusal(calls)
        if reason is None and self.stacked is None and not promising(calls):
            reason = "too large, or of different settings"
        if reason is None:
            found = StackedGraph(calls)
            reason = self._try(found, calls)
            if reason is None:
                self.path = "stacked"
                return found
        if self.stacked:
            raise RuntimeError(f"stacked=True, but these layers cannot be pulled back all at once: {reason}")
        self.path = f"loop: {reason}"
        return LayerGraphs.of(calls)

    def _try(self, graph: StackedGraph, calls: Sequence[Call]) -> str | None:
        """Run a stacked graph, and the first time pull zeros back; what speaks against it, or None."""
        if any(version(call.layer.parameters) != call.layer.version for call in calls):
            return "parameters were written between forward and backward"
        try:
            with warnings.catch_warnings():
                if self.stacked is None:  # an operation that torch.vmap runs in a loop is no gain
                    warnings.filterwarnings("error", "There is a performance drop")
                *_, y = graph.linearized()
                if not self.proved:
                    graph(torch.zeros_like(y), BACKEND)
        except Exception as error:  # torch.vmap has many ways to say that it cannot
            return f"torch.vmap says: {error}"
        self.proved = alike(y, torch.stack([call.ends[0] for call in calls]), calls[0].layer.precision)
        return None if self.proved else "run all at once they give other states: they hold more than parameters"

    def residual_maps(self, layers: Sequence[Layer], x: Tensor, damped: bool = True) -> LinearOperator:
        """The stack of residual maps of some of the layers: their own or replaced, and damped, where so chosen."""
        ids = [id(member) for member in self.members()]
        whole = len(layers) == len(ids)
        places = list(range(len(ids))) if whole else [ids.index(id(layer.module)) for layer in layers]
        maps = [layer.residual_map for layer in layers]
        if self.residual is not None:
            bound = self.residual.bind(len(ids), x, BACKEND)
            maps = [bound[i] for i in places]
        gammas: Any = self.damping if isinstance(self.damping, list | tuple) else [self.damping] * len(ids)
        if len(gammas) != len(ids):
            raise ValueError(f"damping has {len(gammas)} entries and the stack {len(ids)} layers")
        if damped and self.damping:
            maps = [one.scaled(1 - gammas[i]) for one, i in zip(maps, places, strict=True)]
        return stack_maps(maps, x, BACKEND).bind(len(layers), x, BACKEND)


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
    calls: dict[int, Call] = field(default_factory=dict)
    """The calls that the backward pass ``task`` has reached, left by their links for the entry."""
    task: int = -1

    @classmethod
    def begin(cls, stack: Stack, outside: list[Tensor]) -> Run:
        """A run whose first layer takes these tensors that need gradients."""
        given = tuple({id(tensor): tensor for tensor in (*outside, *stack.trainable())}.values())
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in given}
        for leaf in leaves.values():
            leaf.register_post_accumulate_grad_hook(_refuse_inner_gradient)
        originals = {id(leaf): tensor for leaf, tensor in zip(leaves.values(), given, strict=True)}
        return cls(stack, stack.current(), leaves, originals)

    def knows(self, outside: list[Tensor]) -> bool:
        """Whether these tensors entered with the run; only then can they get gradients from it."""
        return all(id(tensor) in self.leaves for tensor in outside)

    def call(self, layer: nn.Module, target: nn.Module, x: Tensor, carrier: Tensor, args: Any, kwargs: Any) -> Any:
        """Call one layer on the state x, as `Stack.call`; ``carrier`` is the outer tensor its link hangs on."""
        name = f"layer {len(self.layers)}, a {type(layer).__name__},"
        prefix = "" if target is layer else "layer."
        named = layer.named_parameters(remove_duplicate=False)
        own = {prefix + parameter: self.leaves.get(id(p), p) for parameter, p in named}
        swap = Swap(self.leaves)
        arguments = swap(args), {key: swap(value) for key, value in kwargs.items()}
        start = x.detach().requires_grad_()
        output = _run(name, target, own, start, *arguments)
        swap.check_unwritten(name)
        outputs = output if isinstance(output, tuple) else (output,)
        if not outputs or not isinstance(outputs[0], Tensor):
            raise TypeError(
                f"{name} returned a {type(output).__name__}; expected a tensor, or a tuple whose first entry is one"
            )
        y = check_same(f"the output of {name}", outputs[0], x)
        declared = layer.residual_map(start.detach(), y.detach()) if hasattr(layer, "residual_map") else IDENTITY
        called = Layer(layer, target, own, arguments, declared, *autocast_of(x), version(own))
        handed = self._tied(called, carrier, start, (_depending(y, start), *outputs[1:]))
        if not isinstance(output, tuple):
            return handed[0]
        return type(output)(*handed) if hasattr(output, "_fields") else handed

    def _tied(self, layer: Layer, carrier: Tensor, start: Tensor, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A call's results, those that need gradients tied to the run by a new link."""
        handed: list[Any] = [self.originals.get(id(out), out) for out in outputs]  # an argument handed on
        places = [i for i, out in enumerate(handed) if i == 0 or (out is outputs[i] and _needs_gradient(out))]
        call = Call(layer, start, tuple(outputs[i] for i in places))
        foreign = foreign_leaf(call.ends, start, self.originals)
        if foreign is not None:
            raise RuntimeError(
                f"layer {len(self.layers)}, a {type(layer.module).__name__}, reads a tensor of shape "
                f"{tuple(foreign.shape)} that needs gradients and is neither its parameter nor a tensor, tuple, list "
                "or dict given to it (a cache, a closure, an attribute, weights computed by a hook); its gradient "
                "would be lost: register it or pass it, use use_cache=False, or set iterations=None"
            )
        start.register_post_accumulate_grad_hook(_refuse_inner_gradient)
        self.layers.append(layer.module)
        if self.stack.calls is not None:
            self.stack.calls.append(call)
        for i, tensor in zip(places, _Link.apply(self, call, carrier), strict=True):
            handed[i] = tensor
        return tuple(handed)

    def reached(self, number: int, call: Call) -> None:
        """Take in a call with the cotangents that a backward pass has brought."""
        task = torch._C._current_graph_task_id()
        if task != self.task:  # one before that never came to the entry left its calls here
            self.calls.clear()
            self.task = task
        self.calls[number] = call

    def gradients(self) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the first state and of the originals, from the cotangents that the links left."""
        calls = [self.calls.pop(i) for i in sorted(self.calls)]
        first, leaves = calls[0].start, list(self.leaves.values())
        arrived = [call.cotangents[0] for call in calls]
        *entering, last = (torch.zeros_like(first) if c is None else c for c in (None, *arrived))
        others = [pair for call in calls for pair in zip(call.ends[1:], call.cotangents[1:], strict=True)]
        others = [(end, cotangent) for end, cotangent in others if cotangent is not None]
        if others:  # further results of layers were used: cotangents of their states and leaves, known beforehand
            ends, cotangents = zip(*others, strict=True)
            pulled = pull_back(ends, [*(call.start for call in calls), *leaves], cotangents)
            entering = [c if more is None else c + more for c, more in zip(entering, pulled, strict=False)]
        sources = torch.stack(entering) if others or any(c is not None for c in arrived[:-1]) else None
        residual = self.stack.residual_maps([call.layer for call in calls], first)
        graphs = self.stack.graphs(calls)
        chain = LayerChain(graphs, residual, (tuple(first.shape), dtype_name(first)))
        g = highway(chain, last, sources=sources, solver=self.solver, backend=BACKEND)
        found = graphs.gradients(g[1:], leaves) if leaves else []
        if others:
            found = [
                b if a is None else a if b is None else a + b for a, b in zip(found, pulled[len(calls) :], strict=True)
            ]
        return g[0], found


class _Entry(torch.autograd.Function):
    """x and what the layers share -> the tensor on which the run's first link hangs."""

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, *_: Tensor) -> Tensor:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Any, ...]:
        dx, others = ctx.run.gradients()
        return (None, dx, *others)


class _Link(torch.autograd.Function):
    """A node of the outer graph that hands out one call's results and takes in their cotangents."""

    @staticmethod
    def forward(ctx: Any, run: Run, call: Call, _: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.number, ctx.layer = run, len(run.layers), call.layer
        ctx.set_materialize_grads(False)
        # Saved in autograd's own way: the layer's graph is freed, and a second backward refused, as everywhere.
        ctx.save_for_backward(call.start, *call.ends)
        return tuple(end.detach() for end in call.ends)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, None, None]:
        refuse_second_derivatives("iterations=None", *cotangents)
        start, *ends = ctx.saved_tensors
        ctx.run.reached(ctx.number, Call(ctx.layer, start, tuple(ends), cotangents))
        return None, None, None


def _run(name: str, target: nn.Module, own: dict[str, Tensor], start: Tensor, args: Any, kwargs: Any) -> Any:
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


def _depending(y: Tensor, start: Tensor) -> Tensor:
    """y; one that depends on nothing, not even the state, with a graph of zero derivatives."""
    if y.requires_grad:
        return y
    with torch.enable_grad():
        return torch.where(torch.zeros_like(start, dtype=torch.bool), start, y)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _refuse_inner_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "a tensor made inside a converted or stacked layer and not returned by it (taken by a hook, from an attribute "
        "or a cache) was used in a loss; its gradient would not reach the model. Return it from the layer, or set "
        "iterations=None"
    )
