"""Gradients of a model whose stack lies over several ranks, taken together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hbp.backends.torch.depth.piece import Piece
from hbp.backends.torch.options import scheduled


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float | str = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients so that the norm over all ranks' layers is at most ``max_norm``; collective.

    As `torch.nn.utils.clip_grad_norm_`, which would see this rank's layers only: parameters outside of the stacks,
    which all ranks have in common, count once. Gradients that `fully_shard` or others keep as a DTensor count whole.
    A NaN or infinity on one rank makes the norm so on all.

    Args:
        model: a model with a `DepthParallel`, or one converted with ``mesh=``.
        max_norm, norm_type, error_if_nonfinite: as torch's.

    Returns:
        The norm before, the same on all ranks.

    Raises:
        ValueError: the model has no such stack, or a number is not what its name says.
        RuntimeError: the norm is not finite, and that shall be an error.

    >>> from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
    >>> import hbp.backends.torch as hb
    >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # torchrun does it for several
    >>> stack = hb.DepthParallel(nn.Linear(4, 4, bias=False), mesh=init_device_mesh("cpu", (1,)))
    >>> stack(torch.ones(1, 4)).sum().backward()
    >>> clip_grad_norm_(stack, 1.0).item(), round(stack.get_parameter("0.weight").grad.norm().item(), 3)
    (4.0, 1.0)
    >>> destroy_process_group()
    """
    pieces = [stack for stack in scheduled(model).values() if isinstance(stack, Piece)]
    if not pieces:
        raise ValueError(f"no stack of this {type(model).__name__} lies on several ranks; use torch.nn.utils' own")
    max_norm, norm_type = _number("max_norm", max_norm), _number("norm_type", norm_type, above=True)
    own = {id(p): p for piece in pieces for layer in piece.members() for p in layer.parameters()}
    common = [p for p in model.parameters() if id(p) not in own]
    ranks = pieces[0].ranks
    sizes = [_norm(parameters, norm_type).to(ranks.device) for parameters in (own.values(), common)]
    total = torch.linalg.vector_norm(torch.stack([*ranks.gather(sizes[0]), sizes[1]]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of order {norm_type} of all ranks' gradients is {total.item()}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for p in model.parameters():
        if p.grad is not None:
            _local(p.grad).mul_(factor.to(p.grad.device, p.grad.dtype))
    return total


def _number(name: str, value: Any, above: bool = False) -> float:
    """A number, or its name as "inf", that is at least zero, or ``above``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 or (number == 0 and not above)):
        raise ValueError(f"{name}={value!r}; give a number {'above' if above else 'of at least'} 0")
    return number


def _norm(parameters: Iterable[Tensor], norm_type: float) -> Tensor:
    """The norm of the gradients of some parameters, as one number in double precision."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if hasattr(g, "full_tensor") is whole] for whole in (True, False)]
    norms: list[Any] = [get_total_norm(kind, norm_type) for kind in kinds if kind]
    sizes = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    found = torch.stack([size.double().cpu() for size in sizes] or [torch.zeros((), dtype=torch.float64)])
    return torch.linalg.vector_norm(found, norm_type)


def _local(gradient: Any) -> Tensor:
    """This process's part of a gradient."""
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return part
