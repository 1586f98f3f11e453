"""Calls of a stack's layers, each taken into the `Run` that its state comes from, or into a new one."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from hbp.backends.torch.autograd import SWAPPING, nodes, opaque, tensors
from hbp.backends.torch.hooks import cause, watched
from hbp.backends.torch.stack.nodes import Entry
from hbp.backends.torch.stack.options import Stack
from hbp.backends.torch.stack.run import Made, Run


@opaque  # one break of a compiled graph per layer
def call_layer(
    stack: Stack, layer: nn.Module, target: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call ``target``, which is ``layer`` or has it as its child "layer", on x and further arguments.

    The call continues the run whose last state x is, or begins a new one.

    Returns:
        What the layer returns, its tensors that need gradients tied to the run.
    """
    with SWAPPING:
        run, carrier = _run_at(stack, layer, x, args, kwargs)
        return run.call(layer, target, x, carrier, args, kwargs)


@opaque
def call_layers(stack: Stack, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call all layers of a stack, at least one, of which nobody sees a state but the last; it is returned, tied."""
    made: list[Made] = []
    for layer in stack.members():
        with SWAPPING:
            if not made:
                run, carrier = _run_at(stack, layer, x, args, kwargs)
            made.append(run.made(layer, layer, x, args, kwargs))
            x = made[-1].call.state
    return run.tied([one.call for one in made], made[-1].results, carrier)[0]


def _run_at(stack: Stack, layer: nn.Module, x: Tensor, args: Any, kwargs: Any) -> tuple[Run, Tensor]:
    """The run that a call of this layer on x continues or begins, and the outer tensor on which its link hangs."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"a {type(layer).__name__} got a state that is no real floating point tensor: {type(x).__name__}"
        )
    node: Any = x.grad_fn if x.output_nr == 0 and not watched(x) else None
    run = getattr(node, "run", None)
    outside = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
    if isinstance(run, Run) and run.stack is stack and node.number == len(run.layers) and run.knows(outside):
        return run, x
    if _follows(stack, layer, x):
        warnings.warn(
            f"a {type(layer).__name__} got another state than the layer before it returned ({cause(x, layer)}), or "
            "a tensor that needs gradients and was not given to the stack's first layer; a new run of Highway-BP "
            "begins there, and backprop is exact from run to run",
            stacklevel=4,
        )
    run = Run.begin(stack, outside)
    return run, Entry.apply(run, x, *run.originals.values())


def _follows(stack: Stack, layer: nn.Module, x: Tensor) -> bool:
    """Whether x was made from what the layer before this one returned, so that a run that begins here is a loss."""
    ids = [id(member) for member in stack.members()]
    before = {one for one, other in pairwise(ids) if other == id(layer) != ids[0]}
    found = [node for node in nodes([x.grad_fn], last=_in_a_run) if _in_a_run(node)] if before else []
    links = [node for node in found if node.run.stack is stack and hasattr(node, "number")]
    return any(id(link.run.layers[link.number - 1]) in before for link in links)


def _in_a_run(node: Any) -> bool:
    return isinstance(getattr(node, "run", None), Run)
