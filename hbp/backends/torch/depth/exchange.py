"""How the cotangents at the ranks' first states travel in a suffix scan over ranks: three ways to the same numbers.

Each rank has the cotangent ``start`` of its first state, as far as its own layers make it, and the product of its
residual maps, transposed. What enters at its last state is ``entering[r] = start[r+1] + product[r+1] entering[r+1]``,
zero for the last rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.depth.ranks import Ranks
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Scalar, Zero
from hbp.lowrank import LowRank

LATENCY, BANDWIDTH = 20e-6, 20e9
"""Seconds and bytes per second between ranks, where nothing else is known."""
LOCAL = TorchBackend()


@dataclass(frozen=True)
class Exchange(ABC):
    """A way to exchange states among ranks, once per round."""

    @abstractmethod
    def seconds(self, size: int, count: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
        """About what one exchange of states of ``size`` bytes among ``count`` ranks takes."""

    def takes(self, product: LinearOperator) -> bool:
        """Whether it can do with residual maps of this kind."""
        return True

    @abstractmethod
    def prepared(self, product: LinearOperator, like: Tensor, ranks: Ranks) -> Any:
        """What of the residual maps is needed in every round; these maps do not depend on the cotangents."""

    @abstractmethod
    def entering(self, start: Tensor, maps: Any, ranks: Ranks) -> Tensor:
        """What enters at this rank's last state from the ranks behind it."""


@dataclass(frozen=True)
class AllGather(Exchange):
    """Every rank gets all starts and scans them itself: one collective, best within a node or for small states.

    >>> AllGather().seconds(1000, 4, latency=1.0, bandwidth=1000.0)
    4.0
    """

    def seconds(self, size: int, count: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
        return latency + (count - 1) * size / bandwidth

    def prepared(self, product: LinearOperator, like: Tensor, ranks: Ranks) -> Any:
        return _gathered(product, ranks)[ranks.here + 1 :]

    def entering(self, start: Tensor, maps: Any, ranks: Ranks) -> Tensor:
        starts = ranks.gather(start)[ranks.here + 1 :]
        return LOCAL.propagate(maps, torch.stack([*starts, torch.zeros_like(start)]))[0]


@dataclass(frozen=True)
class HillisSteele(Exchange):
    """Starts go 1, 2, 4, ... ranks back, point to point: ceil(log2 P) hops of one state (appendix E of the paper).

    >>> HillisSteele().seconds(1000, 4, latency=1.0, bandwidth=1000.0)
    4.0
    """

    def seconds(self, size: int, count: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
        return math.ceil(math.log2(count)) * (latency + size / bandwidth)

    def takes(self, product: LinearOperator) -> bool:
        return not isinstance(product, LowRank)  # the ranks of products add up, to others at the stack's end

    def prepared(self, product: LinearOperator, like: Tensor, ranks: Ranks) -> Any:
        """Per hop: the products of the maps of the ranks [r, r + shift), and of (r, r + shift)."""
        whole, behind, levels = product, cast("LinearOperator | None", None), []
        for shift in _shifts(ranks):
            levels.append((whole, behind))
            arrays = ranks.shifted(whole.arrays, shift) if 2 * shift < ranks.count else None
            if arrays is not None:
                came = type(whole)(*arrays) if arrays else whole
                whole, behind = whole @ came, came if behind is None else behind @ came
        return levels

    def entering(self, start: Tensor, maps: Any, ranks: Ranks) -> Tensor:
        window, entering = start, torch.zeros_like(start)
        for shift, (whole, behind) in zip(_shifts(ranks), maps, strict=True):
            came = ranks.shifted([window], shift)
            if came is not None:
                entering = entering + (came[0] if behind is None else behind[0].mv(came[0]))
                window = window + whole[0].mv(came[0])
        return entering


@dataclass(frozen=True)
class Transpose(Exchange):
    """Each rank scans one slice of the states for all: two all-to-all, the least bytes for large states.

    >>> Transpose().seconds(1000, 4, latency=1.0, bandwidth=1000.0)
    3.5
    """

    def seconds(self, size: int, count: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> float:
        return 2 * latency + 2 * (count - 1) / count * size / bandwidth

    def takes(self, product: LinearOperator) -> bool:
        return isinstance(product, Identity | Zero | Scalar | Diagonal | Dense)  # others act on no slices

    def prepared(self, product: LinearOperator, like: Tensor, ranks: Ranks) -> Any:
        match product:
            case Diagonal(values):
                return Diagonal(_sliced(values.expand(1, *like.shape).reshape(-1, 1), ranks))
            case Dense(matrix) if matrix.shape[:-2].numel() > 1:
                d = like.shape[-1]
                return Dense(_sliced(matrix.expand(1, *like.shape, d).reshape(-1, d, d), ranks))
            case Dense(matrix):
                return Dense(torch.cat(ranks.gather(matrix.reshape(1, 1, *matrix.shape[-2:]))))
        maps = _gathered(product, ranks)
        return Scalar(maps.arrays[0].reshape(-1, 1, 1)) if maps.arrays else maps

    def entering(self, start: Tensor, maps: Any, ranks: Ranks) -> Tensor:
        rows = start.reshape(-1, start.shape[-1] if isinstance(maps, Dense) else 1)
        slices = _sliced(rows, ranks)
        scanned = LOCAL.propagate(maps, torch.cat([slices, torch.zeros_like(slices[:1])]))
        return ranks.transposed(scanned[1:]).flatten(0, 1)[: len(rows)].reshape(start.shape)


def chosen(size: int, count: int, product: LinearOperator) -> Exchange:
    """The exchange that is quickest for states of ``size`` bytes among ``count`` ranks.

    >>> chosen(1000, 4, Identity()), chosen(10**9, 16, Identity())
    (AllGather(), Transpose())
    """
    every = (exchange for exchange in (AllGather(), HillisSteele(), Transpose()) if exchange.takes(product))
    return min(every, key=lambda exchange: exchange.seconds(size, count))


def _shifts(ranks: Ranks) -> list[int]:
    return [2**i for i in range((ranks.count - 1).bit_length())]


def _gathered(product: LinearOperator, ranks: Ranks) -> LinearOperator:
    """All ranks' maps in one stack."""
    return product.mapped(lambda array: torch.cat(ranks.gather(array)))


def _sliced(rows: Tensor, ranks: Ranks) -> Tensor:
    """This rank's slice of the rows of all ranks, (ranks, rows of a slice, ...); rows of zeros fill the last one."""
    missing = -len(rows) % ranks.count
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    return ranks.transposed(padded.reshape(ranks.count, -1, *rows.shape[1:]))
