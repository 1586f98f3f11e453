"""The GRU's adjoint as PyTorch runs it best on a CPU: in place, and in blocks of time whose arrays stay in the caches.

The mathematics is that of `hbp.cells.GRUPullback`, whose pullbacks compose: a block's cotangent of its initial state
enters at the end of the block before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbp.backends.torch.operations import TorchBackend, suffix_scan_
from hbp.cells import GRUParameters, GRUPullback
from hbp.core.chain import LinearizedChain

BACKEND = TorchBackend()
BLOCK = 2_000_000
"""Numbers in the largest array of a block; beyond some 10 MB fresh memory costs more than the arithmetic in it."""


def gru_pullback(
    params: GRUParameters, x: Tensor, h0: Tensor, h: Tensor, dh: Tensor, iterations: int | None, with_inputs: bool
) -> tuple[GRUParameters, Tensor | None, Tensor]:
    """What ``GRUPullback(params, x, h0, h, backend)(dh, iterations)`` returns, the inputs' gradient where wanted."""
    size = max(BLOCK // params.weight_hh.numel() * h.shape[-1] // max(len(h0), 1), 8)
    starts = range(0, len(x), size)
    blocks = [GRUPullback(params, x[a : a + size], h[a - 1] if a else h0, h[a : a + size], BACKEND) for a in starts]
    g = None if iterations is None else _highway([block.chain for block in blocks], dh, iterations)
    dx, carry, total = x.new_empty(x.shape) if with_inputs else None, torch.zeros_like(h0), None
    for a in reversed(starts):
        block, b = blocks.pop(), min(a + size, len(x))
        states = _exact(block.chain, dh[a:b], carry) if g is None else g[a : b + 1]
        inputs, recurrent = block.preactivations(states)
        found, carry = block.parameters(inputs, recurrent), states[0].clone()
        if dx is not None:
            torch.matmul(inputs, params.weight_ih, out=dx[a:b])
        total = found if total is None else _added(total, found)
    assert total is not None
    return total, dx, carry


def _exact(chain: LinearizedChain, dh: Tensor, carry: Tensor) -> Tensor:
    """`hbp.core.adjoint.backprop` of a block, whose last state gets ``carry`` too: three operations a step."""
    z, gains, weight = chain.residual.arrays[0], chain.pullbacks.gains, chain.pullbacks.weight
    g = torch.cat([torch.zeros_like(carry)[None], dh])  # what enters at each state; the step adds what arrives there
    g[-1] += carry
    states, spread, gates = g.unbind(0), g[:, :, None].unbind(0), gains.unbind(0)
    product = torch.empty_like(gates[0])
    rows = product.flatten(1)
    for t, path in reversed(list(enumerate(z.unbind(0)))):
        torch.mul(gates[t], spread[t + 1], out=product)
        states[t].addcmul_(path, states[t + 1]).addmm_(rows, weight)
    return g


def _highway(chains: list[LinearizedChain], dh: Tensor, iterations: int) -> Tensor:
    """`hbp.core.adjoint.highway` of a chain cut into blocks: all rounds in two arrays."""
    c = torch.cat([torch.zeros_like(dh[:1]), dh])
    old, new = torch.empty_like(c), c.clone()
    for k in range(min(iterations, len(dh)) + 1):
        if k:
            old, new = new, old
            new.copy_(c)
        b = len(dh)
        for chain in reversed(chains):
            a = b - len(chain)
            if k:
                rows = (chain.pullbacks.gains * old[a + 1 : b + 1, :, None]).flatten(0, 1).flatten(1)
                new[a:b].view(len(rows), new.shape[-1]).addmm_(rows, chain.pullbacks.weight)
            suffix_scan_(chain.residual.arrays[0], new[a : b + 1])
            b = a
    return new


def _added(a: GRUParameters, b: GRUParameters) -> GRUParameters:
    return GRUParameters(*(None if one is None else one + other for one, other in zip(a, b, strict=True)))
