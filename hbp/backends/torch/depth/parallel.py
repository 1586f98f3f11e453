"""A stack of layers over several ranks, each of which is given its own layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hbp.backends.torch.depth.exchange import Exchange
from hbp.backends.torch.depth.passage import Passage
from hbp.backends.torch.depth.piece import Piece
from hbp.backends.torch.depth.ranks import Ranks
from hbp.core.operator import LinearOperator
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver


class DepthParallel(Piece, nn.Module):
    """A stack of layers of which each rank of a mesh axis holds consecutive ones, pulled back on all ranks at once.

    Every rank runs the same program and calls this module on the same x, of which the first rank's counts; the state
    goes from rank to rank, and the stack's last state is returned on all. So what all ranks hold in common, before and
    behind the stack, has the same gradients everywhere, bit for bit, provided that it starts from the same numbers and
    draws the same random ones. In training, x and shared arguments apart, each layer draws its own (by its number, from
    one drawn of torch's generator), so masks do not depend on the number of ranks. Other tensors that need gradients
    are arguments of the call: one that a layer reads from elsewhere is refused, or, with ``iterations=None``, has this
    rank's part of its gradient only.

    The backward pass is `hbp.highway` on the chain of all ranks' stages: k + 1 pullbacks through this rank's layers,
    the last with the gradients of its parameters, and k + 1 exchanges of one state per rank; then the gradient of x
    goes from the first rank to all. Parameters and other states stay where they are. Iterate k is that of `Sequential`
    with the same stages on one process: with whole pieces as stages the layers' gradients are exact from k = P - 1 on
    P ranks, that of x from k = P. ``iterations=None`` is torch's own graph, and the ranks take turns.

    Each call, and each backward pass, begins with a few numbers from all ranks: where settings, shapes or places
    differ, all raise the same ValueError. A rank whose process ends, by an exception in a layer for instance, is
    noticed by the others at once on gloo, and at the latest after the process group's timeout; so is one that catches
    the exception and goes on, since the others wait for its part. `init_process_group` takes a timeout: set minutes.

    Args:
        *own_layers: this rank's layers, at least one, whole and with their skip, as for `Sequential`; ranks may hold
            different numbers of them, and a parameter stands on one rank only. They are named by their numbers in the
            whole stack, so `state_dict` has the keys of one `nn.Sequential` of all, and `torch.distributed.checkpoint`
            restores on other numbers of ranks.
        mesh: a `DeviceMesh` of one axis, as ``mesh["depth"]`` of a larger one.
        iterations, tolerance: as for `Sequential`; all ranks stop at the same round.
        chunk: layers per stage on this rank; None: all of them. A stage lies on one rank.
        residual, damping: as for `Sequential`, for this rank's layers.
        solver: iterations, chunk and tolerance in one `hbp.Solver`, instead, with its chunk.
        exchange: `AllGather`, `HillisSteele` or `Transpose`; None: by the state's size and the number of ranks. Maps
            of low rank (`hbp.LowRank`) travel by `AllGather` alone.
        last_only: return the last state on the last rank only; the others get zeros of its shape, through which
            ``backward()`` must be called all the same, as by ``y.sum().backward()``.

    Raises:
        TypeError, ValueError: an option is not what its name says, or a rank has no layers, on all ranks; the mesh has
            several axes.

    >>> import torch
    >>> from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
    >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # torchrun does it for several
    >>> layers = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)]
    >>> stack = DepthParallel(*layers, mesh=init_device_mesh("cpu", (1,)), iterations=0)
    >>> stack(torch.randn(2, 4)).sum().backward()
    >>> destroy_process_group()
    """

    def __init__(
        self,
        *own_layers: Any,
        mesh: Any,
        iterations: int | Schedule | None = None,
        chunk: int | None = None,
        residual: LinearOperator | None = None,
        damping: float | Sequence[float] = 0,
        tolerance: float | None = None,
        solver: Solver | None = None,
        exchange: Exchange | None = None,
        last_only: bool = False,
    ) -> None:
        super().__init__()
        ranks, own = Ranks.along(mesh), len(own_layers)
        with ranks.together("building the stack"):
            for i, layer in enumerate(own_layers):
                if not isinstance(layer, nn.Module):
                    raise TypeError(f"layer {i} is a {type(layer).__name__}; give torch.nn.Modules, as hbp's Residual")
                self.add_module(str(i), layer)
            self.spread(ranks, own, exchange, last_only)
            size = (own if solver is None else 1) if chunk is None else chunk
            how = Solver.of(solver, iterations=iterations, chunk=size, tolerance=tolerance)
            self.configure(how, residual, damping)
        self.settle(own)
        self._modules = {str(number): layer for number, layer in zip(self.numbers, own_layers, strict=True)}

    def members(self) -> Iterable[nn.Module]:
        layers: Iterable[nn.Module] = self._modules.values()
        return layers

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.states(x, *args, **kwargs)[0]

    def states(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """As a call, with the states after each of this rank's layers, for losses of this rank's own on them."""
        passage, found = Passage.enter(self, x, args, kwargs), []
        for layer in self.members():
            passage.call(layer, layer, args, kwargs)
            found.append(passage.state)
        return passage.leave(), found
