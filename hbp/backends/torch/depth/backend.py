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
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Scalar
from hbp.linearization import WIDER, stack_maps


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
        kind, shapes = type(product), [array.shape for array in product.arrays]
        index = WIDER.index(kind) if kind in WIDER else len(WIDER)
        rows = self.ranks.agree("the backward pass", {}, [index, crc32(repr(shapes).encode())])
        if any(row != rows[0] for row in rows):
            widest = max(row[0] for row in rows)
            if widest > WIDER.index(Dense):
                raise TypeError(
                    f"the ranks' residual maps differ, a {kind.__name__} here; give one same kind everywhere"
                )
            product = _as_kind(WIDER[widest], product, like)
        self.exchange = self.exchange or chosen(like.numel() * like.element_size(), self.ranks.count)
        self._maps = self.exchange.prepared(product, like, self.ranks)


def _as_kind(kind: Any, one: LinearOperator, like: Tensor) -> LinearOperator:
    """One map as another kind that can stand for it, with an entry for each of the state's."""
    wide: LinearOperator
    if kind is Dense:
        wide = Dense(torch.ones_like(like)[..., None] * torch.ones_like(like)[..., None, :])
    elif kind is Diagonal:
        wide = Diagonal(torch.ones_like(like))
    else:
        wide = Scalar(like.new_ones(()))
    return stack_maps([one[0], wide], like, LOCAL).bind(2, like, LOCAL)[:1]
