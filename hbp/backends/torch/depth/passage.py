"""One forward pass through a stack over several ranks, from rank to rank, and what its backward pass does.

With Highway-BP a rank's layers make a `Run` whose adjoint equation all ranks solve together. With exact backprop they
stay in torch's own graph between two nodes, `Enter` and `Leave`, at which the ranks take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hbp.backends.torch.autograd import SWAPPING, Swap, opaque, refuse_second_derivatives, tensors, transformed
from hbp.backends.torch.depth.backend import RankBackend
from hbp.backends.torch.depth.exchange import LOCAL
from hbp.backends.torch.depth.ranks import Ranks
from hbp.backends.torch.stack.calling import next_state
from hbp.backends.torch.stack.graphs import Call, LayerGraphs
from hbp.backends.torch.stack.nodes import Entry
from hbp.backends.torch.stack.run import Run
from hbp.core.chain import Composed
from hbp.core.operator import LinearOperator

SKIPPED = (
    "with iterations=None the ranks before wait for the gradient of this one's first state, and only others are asked "
    "for; call backward() without inputs=, or name x among them"
)


@dataclass(frozen=True, eq=False)
class Agreed:
    """What all ranks know of one forward pass."""

    ranks: Ranks
    number: int
    """Of the pass, counted from 1."""
    stages: int
    """Of all ranks together."""
    tracked: bool
    """Whether there will be a backward pass."""
    exact: bool
    input_needed: bool
    """Whether the first state's gradient is wanted, on whichever rank."""

    def opened(self, entered: Any) -> None:
        """Begin the backward pass of a call, all at once; in turns ``entered``, an `Enter` node, hands on."""
        waited_for = self.ranks.count > 1 and (self.input_needed or not self.ranks.first)
        skipped = entered is not None and waited_for and not torch._C._will_engine_execute_node(entered)
        self.ranks.agree("the backward pass", {"the call": self.number}, [], SKIPPED if skipped else "")

    def shared(self, dx: Tensor, others: list[Tensor]) -> list[Tensor | None]:
        """The first rank's gradient of the first state, and the sums of the others', on all ranks."""
        first = self.ranks.spread(dx, 0) if self.input_needed else None
        return [first, *(self.ranks.summed(other) for other in others)]


class Enter(torch.autograd.Function):
    """A rank's x and what all layers share -> the state that its first layer takes, and the shared tensors."""

    @staticmethod
    def forward(ctx: Any, agreed: Agreed, state: Tensor, _: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        ctx.agreed = agreed
        return (state.detach(), *(tensor.view_as(tensor) for tensor in shared))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        dx, *others = cotangents
        if not ctx.agreed.ranks.first:
            ctx.agreed.ranks.hand(dx, ctx.agreed.ranks.here - 1)
        return (None, None, *ctx.agreed.shared(dx, others))


class Leave(torch.autograd.Function):
    """A rank's last state -> the whole stack's, whose cotangent counts on the last rank."""

    @staticmethod
    def forward(ctx: Any, agreed: Agreed, entered: Any, final: Tensor, y: Tensor) -> Tensor:
        ctx.agreed, ctx.entered = agreed, entered
        # Nothing, but all ranks come here first: to be told of a second backward, or to run a checkpointed stack again.
        ctx.save_for_backward(y.new_empty(0))
        return (y if agreed.ranks.last else final).detach()  # either may be written into

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, None, Tensor | None]:
        refuse_second_derivatives("iterations=None on one process", cotangent)
        agreed = ctx.agreed
        assert ctx.saved_tensors
        agreed.opened(ctx.entered)
        if agreed.ranks.last:
            return None, None, None, cotangent
        return None, None, None, agreed.ranks.take(cotangent, agreed.ranks.here + 1) if agreed.exact else None


@dataclass(eq=False)
class DepthRun(Run):
    """A run of one rank's layers: each stage of layers is one graph, and the equation is that of all ranks' stages."""

    agreed: Any = None
    inner: Any = None
    """The last call's result, in its stage's graph."""

    def start(self, x: Tensor) -> Tensor:
        return self.inner if len(self.layers) % self.solver.chunk else super().start(x)

    def tied(self, calls: list[Call], results: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        self.inner = results[0]
        return super().tied(calls, results, carrier)

    def stages(self, calls: list[Call]) -> list[list[Call]]:
        if len(calls) != len(self.layers):
            raise RuntimeError("a loss takes states of the stack and not its last one; use that one too, on every rank")
        size = self.solver.chunk
        return [calls[i : i + size] for i in range(0, len(calls), size)]

    def linearized(self, calls: list[Call], leaves: list[Tensor]) -> tuple[Any, LinearOperator]:
        stages, first = self.stages(calls), calls[0].start
        graphs = LayerGraphs([stage[0].start for stage in stages], [stage[-1].ends[0] for stage in stages])
        size = min(self.solver.chunk, len(calls))
        maps = Composed(self.stack.residual_maps(calls, first), len(calls), size, size)
        return graphs, maps.bind(len(stages), first, LOCAL)

    def solved(self) -> Any:
        piece: Any = self.stack
        backend = RankBackend(self.agreed.ranks, self.agreed.stages, piece.exchange)
        return {"solver": replace(self.solver, chunk=1), "backend": backend}

    def gradients(self) -> tuple[Any, list[Tensor | None]]:
        dx, found = super().gradients()
        shared = len(self.leaves) - len({id(p) for p in self.stack.trainable()})  # layers may have some in common
        others = [torch.zeros_like(leaf) for leaf in list(self.leaves.values())[:shared]]
        others = [zero if d is None else d for d, zero in zip(found, others, strict=False)]
        dx, *others = self.agreed.shared(dx, others)
        return dx, [*others, *found[shared:]]


@dataclass(eq=False)
class Passage:
    """A forward pass through this rank's layers, which are called one by one in their order."""

    piece: Any
    agreed: Agreed
    x: Any
    """What the stack was called on, here."""
    outside: list[Tensor]
    """Tensors among the arguments that need gradients."""
    seed: int | None
    """What this pass's random numbers start from, in training."""
    state: Any = None
    """What the next layer takes."""
    run: DepthRun | None = None
    carrier: Any = None
    """The outer tensor that the next call hangs on, in a run."""
    entered: Any = None
    """The `Enter` node, where ranks take turns."""
    swap: Swap = field(default_factory=lambda: Swap({}))
    called: int = 0

    @classmethod
    @opaque
    def enter(cls, piece: Any, x: Tensor, args: Any, kwargs: Any) -> Passage:
        """Begin a pass, if the ranks agree; collective.

        Raises:
            ValueError: their settings or states differ, on all ranks.
            RuntimeError: something transforms the call.
        """
        by = transformed()
        if by:
            raise RuntimeError(
                f"{by} cannot follow a state from rank to rank; call a stack over several ranks without it"
            )
        outside = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        agreed = piece.agreed(x, outside)
        return cls(piece, agreed, x, outside, int(torch.randint(2**62, ())) if piece.training else None)

    def _arrive(self) -> None:
        """Take the state from the rank before."""
        agreed, x, ranks = self.agreed, self.x, self.agreed.ranks
        self.x, self.state = None, x.detach() if ranks.first else ranks.take(x, ranks.here - 1)
        if not agreed.tracked:
            return
        x = x if x.requires_grad else x.detach().requires_grad_()
        if agreed.exact:
            self.state, *shared = Enter.apply(agreed, self.state, x, *self.outside)
            self.entered = self.state.grad_fn
            self.swap = Swap({id(old): new for old, new in zip(self.outside, shared, strict=True)})
        else:
            self.run = DepthRun.begin(self.piece, self.outside)
            self.run.agreed = agreed
            self.carrier = Entry.apply(self.run, x, *self.run.originals.values())

    @opaque
    def call(self, layer: nn.Module, target: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call one layer, or ``target`` that has it inside, on the present state."""
        if not self.called:
            self._arrive()
        with self._random(), SWAPPING:
            if self.run is None:
                named = {name: self.swap(value) for name, value in kwargs.items()}
                result = target(self.state, *self.swap(args), **named)
                next_state(f"layer {self.piece.numbers[self.called]}, a {type(layer).__name__},", result, self.state)
            elif self.run.knows([t for t in tensors((args, kwargs)) if t.requires_grad]):
                result = self.run.call(layer, target, self.state, self.carrier, args, kwargs)
            else:
                raise RuntimeError(
                    f"a {type(layer).__name__} takes a tensor that needs gradients and was not given to the stack's "
                    "first layer; give it to all layers"
                )
        self.called += 1
        self.state = self.carrier = result[0] if isinstance(result, tuple) else result
        return result

    @opaque
    def leave(self) -> Tensor:
        """Hand the state on, and return the stack's last one; collective."""
        y, ranks = self.state, self.agreed.ranks
        self.state = self.carrier = None
        if self.run is not None:
            self.run.inner = None
        if not ranks.last:
            ranks.hand(y.detach(), ranks.here + 1)
        if not self.piece.last_only:
            final = ranks.spread(y.detach(), ranks.count - 1)
        else:
            final = y.detach() if ranks.last else y.new_zeros(()).expand(y.shape)
        return Leave.apply(self.agreed, self.entered, final, y) if self.agreed.tracked else final

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Random numbers that are this layer's own, on whichever rank it stands; those outside are left as they are."""
        if self.seed is None:
            yield
            return
        seed, device = self.seed + self.piece.numbers[self.called], self.state.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call per kind of device unused
            if devices:
                there = torch.get_device_module(device)
                with there.device(device):
                    there.manual_seed(seed)
            yield
