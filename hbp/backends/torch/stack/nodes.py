"""The nodes of the outer graph, which compute nothing forward: a run's entry, and links for its calls."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from hbp.backends.torch.autograd import refuse_second_derivatives
from hbp.backends.torch.hooks import watched


class Entry(torch.autograd.Function):
    """x and what the layers share -> the tensor on which the run's first link hangs."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *_: Tensor) -> Tensor:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Any, ...]:
        dx, others = ctx.run.gradients()
        return (None, dx, *others)


class Link(torch.autograd.Function):
    """Hands out the results of one call, the last of some whose states nobody sees, and takes in their cotangents."""

    @staticmethod
    def forward(ctx: Any, run: Any, calls: Any, results: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.calls, ctx.number, ctx.carrier = run, calls, len(run.layers), ref(carrier)
        ctx.set_materialize_grads(False)
        # Nothing, but in autograd's own way: a second backward is refused as everywhere. The results themselves are
        # not saved, so that they may be written into where the layer's graph does not need them.
        start = calls[-1].start
        ctx.save_for_backward(start.new_empty(0))
        # A layer may return its input, which a write into the result must not change unnoticed.
        own = [result is not start and result._base is not start for result in results]
        return tuple(result.detach() if alone else result.clone() for result, alone in zip(results, own, strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, None, None, None]:
        refuse_second_derivatives("iterations=None", *cotangents)
        assert ctx.saved_tensors
        carrier = ctx.carrier()
        if carrier is not None and watched(carrier):
            raise RuntimeError(f"a hook or retain_grad was set on a state after the next layer took it; {CURE}")
        first = ctx.run.reached(ctx.number, ctx.calls, cotangents)
        if first and not torch._C._will_engine_execute_node(_entry(ctx)):
            raise RuntimeError(f"the gradient of a state alone was asked for; {CURE}")
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.calls = None  # the layers' graphs are freed
        return None, None, None, None


CURE = (
    "between the layers of a stack no gradient is at hand in the backward: use retain_grad or a hook on the state "
    "before the next layer is called, or set iterations=None"
)


def _entry(node: Any) -> Any:
    """The entry of a link's run."""
    while hasattr(node, "number"):
        node = node.next_functions[0][0]
    return node
