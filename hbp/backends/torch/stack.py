"""Runs through residual layers in PyTorch's autograd, one call at a time, pulled back by Highway-BP all at once.

Whoever calls the layers, `Sequential` or a model's own loop, calls them one by one. Each call keeps a graph of its
own, from a copy of its input to its output. In the outer graph a run is a chain of nodes that compute nothing: the
entry, whose inputs are the stream, the parameters and the tensors that all layers share, and one link per call. The
backward reaches the links first, which leave the cotangents that come from outside, and then the entry, which solves
the adjoint equation for all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.graphs import Call, LayerGraphs, StackedGraph, promising, pull, refusal
from hbp.backends.torch.operations import TorchBackend
from hbp.backends.torch.training import Scheduled
from hbp.core.adjoint import highway
from hbp.core.backend import check_tolerance, dtype_name
from hbp.core.chain import LayerChain
from hbp.core.joining import stack as stacked
from hbp.core.operator import Identity, LinearOperator
from hbp.core.pullbacks import check_same

BACKEND = TorchBackend()
IDENTITY = Identity()


class Stack(Scheduled):
    """The options of a stack of layers, and the calls of its layers."""

    residual: LinearOperator | None = None
    damping: float | Sequence[float] = 0
    tolerance: float | None = None
    stacked: bool | None = None
    """Whether equal layers are pulled back all at once over stacked parameters; None: where that was faster."""
    path: str = ""
    """How the last backward pass pulled back: "stacked", or "loop" with the reason."""
    calls: list[Call] | None = None
    """Where a list, each call is appended to it."""
    previous: int = 0
    """The identity of the layer called last."""

    def configure(
        self, iterations: Any, chunk: int, residual: Any, damping: Any, tolerance: Any, stacked: bool | None
    ) -> None:
        """Set the options, checked.

        Raises:
            TypeError, ValueError: an option is not what its name says.
        """
        if residual is not None and not isinstance(residual, LinearOperator):
            raise TypeError(f"residual is a {type(residual).__name__}; give an operator, as hbp.Identity(), or None")
        numbers = damping if isinstance(damping, list | tuple) else (damping,)
        if not all(isinstance(gamma, Real) for gamma in numbers):
            raise TypeError(f"damping is {damping!r}; give a number, or one per layer")
        self.iterations, self.chunk = iterations, chunk
        self.residual, self.damping, self.tolerance = residual, damping, check_tolerance(tolerance)
        if stacked not in (None, True, False):
            raise ValueError(f"stacked={stacked!r}; give True, False, or None for the faster one")
        self.stacked = stacked
        self.current()

    def members(self) -> Iterable[nn.Module]:
        """The layers, in order."""
        raise NotImplementedError

    def tracks(self, *given: Any) -> bool:
        """Whether a call on these arguments is pulled back here; otherwise torch's own graph is as good."""
        k, _ = self.current()
        if (k is None and self.tolerance is None) or not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in _tensors(given)) or bool(self.trainable())

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of all layers that need gradients."""
        return [p for layer in self.members() for p in layer.parameters() if p.requires_grad]

    @torch.compiler.disable  # one break of a compiled graph per layer: the backward is no traceable code
    def call(
        self, layer: nn.Module, target: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``target``, which is ``layer`` or has it as its child "layer", on x and further arguments.

        The call continues the run whose last state x is, or begins a new one.

        Returns:
            What the layer returns, its tensors that need gradients tied to the run.
        """
        node: Any = x.grad_fn if x.output_nr == 0 else None
        run = getattr(node, "run", None)
        outside = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        if isinstance(run, Run) and run.stack is self and node.number == len(run.maps) and run.knows(outside):
            self.previous = id(layer)
            return run.call(layer, target, x, x, args, kwargs)
        self._check_order(layer)
        run = Run.begin(self, outside, (args, kwargs))
        return run.call(layer, target, x, _Entry.apply(run, x, *run.given), args, kwargs)

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
            try:
                with warnings.catch_warnings():
                    if self.stacked is None:  # an operation that torch.vmap runs in a loop is no gain
                        warnings.filterwarnings("error", "There is a performance drop")
                    *_, y = found.linearized()
            except Exception as error:  # torch.vmap has many ways to say that it cannot
                reason = f"torch.vmap says: {error}"
            else:
                tolerance = torch.finfo(y.dtype).eps ** 0.5
                if torch.allclose(y, torch.stack([call.ends[0] for call in calls]), tolerance, tolerance, True):
                    self.path = "stacked"
                    return found
                reason = "run all at once they give other states, so they hold something else than parameters"
        if self.stacked:
            raise RuntimeError(f"stacked=True, but these layers cannot be pulled back all at once: {reason}")
        self.path = f"loop: {reason}"
        return LayerGraphs.of(calls)

    def residual_maps(self, own: list[LinearOperator], x: Tensor, damped: bool = True) -> LinearOperator:
        """The stack of residual maps of a run whose layers declare ``own``: replaced, or damped, where so chosen."""
        maps = own if self.residual is None else [self.residual.bind(len(own), x, BACKEND)[i] for i in range(len(own))]
        gammas = self.damping if isinstance(self.damping, list | tuple) else [self.damping] * len(own)
        if len(gammas) != len(own):
            raise ValueError(f"damping has {len(gammas)} entries and the stack ran {len(own)} layers")
        maps = [one.scaled(1 - gamma) if gamma and damped else one for one, gamma in zip(maps, gammas, strict=True)]
        return stacked(maps, x, BACKEND).bind(len(own), x, BACKEND)


@dataclass(eq=False)
class Run:
    """Consecutive calls of layers, each on the state that the one before returned.

    Nothing here refers to the links, whose nodes refer to it: a graph that is dropped is freed at once.
    """

    stack: Stack
    options: dict[str, Any]
    given: tuple[Tensor, ...]
    """What the entry takes beside x: tensors shared by the layers, and parameters."""
    leaves: dict[int, Tensor]
    """Copies of ``given`` in the layers' graphs, by identity: hooks on ``given`` see the final gradient, once."""
    maps: list[LinearOperator] = field(default_factory=list)
    """The residual maps the layers declared."""
    calls: dict[int, Call] = field(default_factory=dict)
    """The calls a backward pass has reached, left by their links for the entry."""

    @classmethod
    def begin(cls, stack: Stack, outside: list[Tensor], arguments: Any) -> Run:
        """A run whose first layer takes these arguments, of which those ``outside`` need gradients."""
        if any(tensor.requires_grad for tensor in _hidden_tensors(arguments)):
            raise RuntimeError(
                "a cache given to the layers holds tensors that need gradients, which would not reach them; call the "
                "model with use_cache=False, fill the cache under torch.no_grad(), or set iterations=None"
            )
        k, chunk = stack.current()
        options = {
            "iterations": k,
            "chunk": chunk,
            "tolerance": check_tolerance(stack.tolerance),
            "watch": stack.watch(),
        }
        given = tuple({id(tensor): tensor for tensor in (*outside, *stack.trainable())}.values())
        return cls(stack, options, given, {id(tensor): tensor.detach().requires_grad_() for tensor in given})

    def knows(self, outside: list[Tensor]) -> bool:
        """Whether these tensors entered with the run; only then can they get gradients from it."""
        return all(id(tensor) in self.leaves for tensor in outside)

    def call(self, layer: nn.Module, target: nn.Module, x: Tensor, carrier: Tensor, args: Any, kwargs: Any) -> Any:
        """Call one layer on the state x, as `Stack.call`; ``carrier`` is the outer tensor its link hangs on."""
        name = f"layer {len(self.maps)}, a {type(layer).__name__},"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} got a state that is no real floating point tensor: {type(x).__name__}")
        prefix = "" if target is layer else "layer."
        own = {
            prefix + parameter: self.leaves.get(id(p), p)
            for parameter, p in layer.named_parameters(remove_duplicate=False)
        }
        args, kwargs = _swapped((args, kwargs), self.leaves)
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            output = torch.func.functional_call(target, own, (start, *args), kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        if not outputs or not isinstance(outputs[0], Tensor):
            raise TypeError(
                f"{name} returned a {type(output).__name__}; expected a tensor, or a tuple whose first entry is one"
            )
        y = check_same(f"the output of {name}", outputs[0], x)
        if not y.requires_grad:  # a layer that reads neither its state nor a parameter
            with torch.enable_grad():
                y = torch.where(torch.zeros_like(start, dtype=torch.bool), start, y)
            outputs = (y, *outputs[1:])
        declared = layer.residual_map(start.detach(), y.detach()) if hasattr(layer, "residual_map") else IDENTITY
        tied = [i for i, out in enumerate(outputs) if i == 0 or (isinstance(out, Tensor) and out.requires_grad)]
        call = Call(target, own, (args, kwargs), declared, start, tuple(outputs[i] for i in tied))
        start.register_post_accumulate_grad_hook(_refuse_inner_gradient)
        self.maps.append(declared)
        if self.stack.calls is not None:
            self.stack.calls.append(call)
        found = dict(zip(tied, _Link.apply(self, call, carrier), strict=True))
        handed = tuple(found.get(i, out) for i, out in enumerate(outputs))
        if not isinstance(output, tuple):
            return handed[0]
        return type(output)(*handed) if hasattr(output, "_fields") else handed

    def gradients(self) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the first state and of ``given``, from the cotangents that the links left."""
        calls = [self.calls.pop(i) for i in sorted(self.calls)]
        first, leaves = calls[0].start, list(self.leaves.values())
        arrived = [call.cotangents[0] for call in calls]
        *entering, last = (torch.zeros_like(first) if c is None else c for c in (None, *arrived))
        others = [pair for call in calls for pair in zip(call.ends[1:], call.cotangents[1:], strict=True)]
        others = [(end, cotangent) for end, cotangent in others if cotangent is not None]
        if others:  # further results of layers were used: cotangents of their states and leaves, known beforehand
            ends, cotangents = zip(*others, strict=True)
            pulled = pull(ends, [*(call.start for call in calls), *leaves], cotangents)
            entering = [c if more is None else c + more for c, more in zip(entering, pulled, strict=False)]
        sources = torch.stack(entering) if others or any(c is not None for c in arrived[:-1]) else None
        residual = self.stack.residual_maps(self.maps[: len(calls)], first)
        graphs = self.stack.graphs(calls)
        chain = LayerChain(graphs, residual, (tuple(first.shape), dtype_name(first)))
        g = highway(chain, last, sources=sources, backend=BACKEND, **self.options)
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
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("Highway-BP has no second derivatives; set iterations=None, which is torch's own graph")
        dx, others = ctx.run.gradients()
        return (None, dx, *others)


class _Link(torch.autograd.Function):
    """A node of the outer graph that hands out one call's results and takes in their cotangents."""

    @staticmethod
    def forward(ctx: Any, run: Run, call: Call, _: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.number = run, len(run.maps)
        ctx.call = replace(call, start=None, ends=())
        ctx.set_materialize_grads(False)
        # Saved in autograd's own way: the layer's graph is freed, and a second backward refused, as everywhere.
        ctx.save_for_backward(call.start, *call.ends)
        return tuple(end.detach() for end in call.ends)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, None, None]:
        start, *ends = ctx.saved_tensors
        ctx.run.calls[ctx.number] = replace(ctx.call, start=start, ends=tuple(ends), cotangents=cotangents)
        return None, None, None


def _refuse_inner_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "a tensor from inside a layer, as a cache's keys or attention weights taken by a hook, was used in a loss; "
        "its gradient would not reach the model. Use what the layers return, or iterations=None"
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _swapped(value: Any, leaves: dict[int, Tensor]) -> Any:
    """The same nest with the tensors that have a copy replaced by it."""
    if isinstance(value, Tensor):
        return leaves.get(id(value), value)
    if isinstance(value, tuple):
        parts = [_swapped(part, leaves) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is list:
        return [_swapped(part, leaves) for part in value]
    if type(value) is dict:
        return {key: _swapped(part, leaves) for key, part in value.items()}
    return value


def _hidden_tensors(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """The tensors in the attributes of objects, as of caches, in a nest of arguments."""
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _hidden_tensors(part, depth)
    elif (
        depth
        and hasattr(value, "__dict__")
        and not isinstance(value, Tensor | nn.Module | type)
        and not callable(value)
    ):
        for part in vars(value).values():
            yield from _tensors(part)
            yield from _hidden_tensors(part, depth - 1)
