"""Which damping suits the layers of a stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hbp.backends.torch.diagnosis import check_one_process, undisturbed
from hbp.backends.torch.options import scheduled
from hbp.backends.torch.stack.graphs import Call
from hbp.backends.torch.stack.options import Stack
from hbp.backends.torch.stack.run import recorded
from hbp.core.backend import check_count
from hbp.core.solver import Solver


def estimate_damping(stack: nn.Module, batch: Any, *, samples: int = 8, assign: bool = False) -> list[float]:
    """Estimate each layer's damping gamma, which brings the residual map (1 - gamma) R nearest to its Jacobian.

    The least-squares choice is 1 - gamma = <R, J> / <R, R>, whose inner products of matrices are estimated by pulling
    random signs back (Hutchinson). For R = I that is gamma = -tr(B) / d with the block B = J - I.

    Args:
        stack: a `Sequential`, or a module with one converted stack; its residual maps count undamped.
        batch: the module's input: a tensor, or a tuple or mapping of arguments.
        samples: random vectors per layer.
        assign: set the stack's ``damping`` to the result.

    Returns:
        gamma of each layer.

    Raises:
        ValueError: no stack, or several; nothing that needs gradients.

    >>> import hbp.backends.torch as hb
    >>> halving = nn.Linear(4, 4, bias=False)
    >>> halving.weight = nn.Parameter(0.5 * torch.eye(4))  # the whole layer: J = I / 2
    >>> estimate_damping(hb.Sequential(halving, halving), torch.ones(3, 4))
    [0.5, 0.5]
    """
    check_count("samples", samples, 1)
    layers = one_stack(stack, "give a module with one")
    check_one_process([layers])

    def run() -> None:
        if isinstance(batch, Mapping):
            stack(**batch)
        else:
            stack(*batch) if isinstance(batch, tuple | list) else stack(batch)

    with undisturbed(stack, [layers]), torch.enable_grad():
        calls = calls_of(layers, run)
        first = calls[0].start
        residual = layers.residual_maps(calls, first, damped=False)
        generator = torch.Generator(first.device).manual_seed(0)
        gammas = []
        for i, call in enumerate(calls):
            inner = size = 0.0
            for _ in range(samples):
                signs = torch.randint(0, 2, first.shape, generator=generator, device=first.device)
                v = (2 * signs - 1).to(first.dtype)
                along = residual[i].T.mv(v)
                options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                (pulled,) = torch.autograd.grad(call.ends[0], call.start, v, **options)
                inner += float((along * pulled).sum())
                size += float(along.square().sum())
            gammas.append(1 - inner / size if size else 0.0)
    if assign:
        layers.damping = gammas
    return gammas


def one_stack(model: nn.Module, cure: str) -> Stack:
    """The stack inside a model; ValueError unless there is one."""
    found = [layers for layers in scheduled(model).values() if isinstance(layers, Stack)]
    if len(found) != 1:
        raise ValueError(f"this {type(model).__name__} has {len(found)} stacks; {cure}")
    return found[0]


def calls_of(layers: Stack, run: Callable[[], Any]) -> list[Call]:
    """The calls of a stack's layers while something runs, each with its graph; ValueError where there are none."""
    layers.solver = Solver(0)
    with recorded() as seen:
        run()
    calls = [call for owner, call in seen if owner is layers]
    if not calls:
        raise ValueError("no layer of the stack ran with gradients; let a parameter or the input need them")
    return calls
