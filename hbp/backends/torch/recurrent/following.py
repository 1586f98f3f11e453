"""The strong directions of a layer's recurrent weights, followed from one backward pass to the next."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.core.backend import check_count
from hbp.directions import Directions, Rank, check_rank, directions

LOG = logging.getLogger("hbp")

_FOLLOWED = WeakTensorKeyDictionary()
"""Of parameters of users' own cells, which have no place for it: by the parameter, then rank and name."""


class Followed:
    """The strong directions of one weight (`hbp.directions`): at each call of the weight as it is then.

    What was found last is only where the next call starts from. A copy or a pickle finds its own anew.

    Args:
        rank: how many, or "auto".
        name: the weight's, for the log.
    """

    def __init__(self, rank: Rank, name: str) -> None:
        self.rank, self.name = rank, name
        self.latest: Directions | None = None

    def __call__(self, weight: Tensor) -> Directions:
        """The directions of ``weight``, (N, H); where "auto" takes another number than before, the log tells."""
        before = self.latest
        found = directions(weight, self.rank, before if _fits(before, weight) else None, backend=BACKEND)
        if self.rank == "auto" and (before is None or before.rank != found.rank):
            LOG.info("rank='auto' takes %d directions of %s, of %d", found.rank, self.name, weight.shape[1])
        self.latest = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Followed, (self.rank, self.name)


def check(rank: Any, hidden: int, residual: Any) -> Rank:
    """The rank of a recurrent layer, checked: "auto" or a number of directions, at most ``hidden``.

    Raises:
        TypeError, ValueError: it is none, or there is another residual path too.
    """
    check_rank(rank)
    if isinstance(rank, Directions):
        raise TypeError("rank is a Directions; a layer follows its own weights: give a number, 'auto', or 0")
    checked: Rank = rank if rank == "auto" else check_count("rank", rank, 0)
    if rank != "auto" and rank > hidden:
        raise ValueError(f"rank={rank} is more than hidden_size={hidden}; give at most that")
    if checked != 0 and residual is not None:
        raise ValueError("residual and rank are given; directions go with the layer's own path, give one of them")
    return checked


def followed(cell: Any, rank: Any, name: str | None, h0: Tensor) -> Followed | None:
    """What follows a parameter of a cell, the same as long as the parameter lives; None where no direction is taken.

    Raises:
        TypeError, ValueError: no rank, a rank without a parameter, or one whose shape is not (N, H), N at least rank.
    """
    rank = check(rank, h0.shape[-1] if h0.dim() else 0, None)
    if name is None and rank == 0:
        return None
    if not isinstance(cell, nn.Module):
        raise TypeError(f"the cell is a {type(cell).__name__}; to take directions give a torch.nn.Module, and weight=")
    named = dict(cell.named_parameters())
    fitting = [own for own, p in named.items() if p.dim() == 2 and p.shape[1] == h0.shape[-1]]
    cure = f"give a parameter of shape (N, {h0.shape[-1]}) that h enters by: {', '.join(fitting) or 'it has none'}"
    if name is None:
        raise ValueError(f"rank={rank!r} is given without weight; {cure}")
    if name not in named:
        raise ValueError(f"weight={name!r} names no parameter of this {type(cell).__name__}; {cure}")
    shape = tuple(named[name].shape)
    if name not in fitting or (rank != "auto" and rank > shape[0]):
        raise ValueError(f"weight={name!r} has shape {shape}, rank is {rank!r}; {cure}")
    if rank == 0:
        return None
    own: dict[tuple[Rank, str], Followed] = _FOLLOWED.setdefault(named[name], {})
    return own.setdefault((rank, name), Followed(rank, name))


def _fits(found: Directions | None, weight: Tensor) -> bool:
    """Whether a weight's directions may start from these: it may have moved, or become another."""
    if found is None:
        return False
    left, right = found.left, found.right
    shape = (left.shape[0], right.shape[1])
    return bool((shape, left.dtype, left.device) == (tuple(weight.shape), weight.dtype, weight.device))
