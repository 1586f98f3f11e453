"""The strong directions of a layer's recurrent weights, followed from one backward pass to the next."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.core.backend import check_count
from hbp.directions import Directions, Rank, check_rank, directions

LOG = logging.getLogger("hbp")


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


def _fits(found: Directions | None, weight: Tensor) -> bool:
    """Whether a weight's directions may start from these: it may have moved, or become another."""
    if found is None:
        return False
    left, right = found.left, found.right
    shape = (left.shape[0], right.shape[1])
    return bool((shape, left.dtype, left.device) == (tuple(weight.shape), weight.dtype, weight.device))
