"""PyTorch behind the core's protocol, where a chain's stages stand on several ranks."""

from __future__ import annotations

import math
from functools import reduce
from operator import matmul
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from hbp.backends._depth import scan_over_ranks
from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.depth.exchange import LOCAL, Exchange, chosen
from hbp.backends.torch.depth.ranks import Ranks
from hbp.core.backend import Array
from hbp.core.joining import one_each
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Scalar, Zero
from hbp.linearization import stack_maps
from hbp.lowrank import LowRank

KINDS = (Zero, Identity, Scalar, Diagonal, LowRank, Dense)
"""The kinds of residual maps, each after those that it can stand for."""
UNKNOWN = len(KINDS)


class RankBackend(TorchBackend):
    """PyTorch for one backward pass through a chain of which each rank holds consecutive stages.

    A rank's last state is the next one's first; what enters there enters on one of the two. Per scan one state of
    each rank travels, and, once, the product of its residual maps.
    """

    def __init__(self, ranks: Ranks, stages: int, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.stages = stages
        """Of all ranks together."""
        self.exchange = exchange
        self._maps: Any = None

    def total(self, length: int) -> int:
        return self.stages

    def norm(self, x: Array) -> float:
        """The norm over all ranks' states, the same on all; a rank's last state is counted as the next one's first."""
        own = super().norm(x if self.ranks.last else x[:-1])
        sizes = self.ranks.gather(torch.tensor(own, dtype=torch.float64, device=self.ranks.device))
        return math.hypot(*torch.stack(sizes).tolist())

    def propagate(self, operator: LinearOperator, c: Array) -> Array:
        """The suffix scan over all ranks' stages, of which ``operator`` and ``c`` are this rank's."""
        if self._maps is None:
            self._prepare(operator, c)
        exchange: Any = self.exchange
        return scan_over_ranks(
            LOCAL.propagate, operator, c, lambda start: exchange.entering(start, self._maps, self.ranks), LOCAL
        )

    def _prepare(self, operator: LinearOperator, c: Tensor) -> None:
        """Agree on one kind of residual map, and on the exchange."""
        like = c[0]
        own = (operator[i : i + 1] for i in range(len(c) - 1))
        product = one_each(reduce(matmul, own, Identity()), 1, like, LOCAL).bind(1, like, LOCAL)
        rows = self.ranks.agree("the backward pass", {}, _kind(product))
        kind, path, rank = (max(column) for column in (*zip(*rows, strict=True),)[:3])
        if isinstance(product, LowRank):
            product = product.padded(rank)
        if any((*row[:2], row[3]) != (kind, path, rows[0][3]) for row in rows):
            if kind == UNKNOWN or (path == UNKNOWN and KINDS[kind] is LowRank):
                name = type(product).__name__
                raise TypeError(f"the ranks' residual maps differ, a {name} here; give one same kind everywhere")
            product = _as_kind(KINDS[kind], KINDS[path], rank, product, like)
        size = like.numel() * like.element_size()
        self.exchange = self.exchange or chosen(size, self.ranks.count, product)
        if not self.exchange.takes(product):
            name = type(product).__name__
            raise TypeError(f"{self.exchange} cannot send parts of a {name} residual; give exchange=hb.AllGather()")
        self._maps = self.exchange.prepared(product, like, self.ranks)


def _kind(product: LinearOperator) -> list[int]:
    """What ranks compare: a map's kind, that of its path beside strong directions, their number, and the shapes."""
    path, rank, shapes = product, 0, [array.shape for array in product.arrays]
    if isinstance(product, LowRank):
        path, rank, (left, right) = product.path, product.rank, shapes[:2]
        shapes[:2] = left[:-1], right[:-2] + right[-1:]
    kinds = [KINDS.index(type(one)) if type(one) in KINDS else UNKNOWN for one in (product, path)]
    return [*kinds, rank, crc32(repr(shapes).encode())]


def _as_kind(kind: Any, path: Any, rank: int, one: LinearOperator, like: Tensor) -> LinearOperator:
    """One map as another kind that can stand for it, with an entry for each of the state's."""
    wide: LinearOperator = Diagonal(torch.ones_like(like)) if Diagonal in (kind, path) else Scalar(like.new_ones(()))
    if kind is Dense:
        wide = Dense(torch.ones_like(like)[..., None] * torch.ones_like(like)[..., None, :])
    elif kind is LowRank:
        wide = LowRank(like.new_zeros(*like.shape, rank), like.new_zeros(*like.shape[:-1], rank, like.shape[-1]), wide)
    return stack_maps([one[0], wide], like, LOCAL).bind(2, like, LOCAL)[:1]
