"""The GRU's adjoint as PyTorch runs it best on a CPU without a compiler: in place, and in blocks of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbp.backends._blocks import blocks_of, pull_in_blocks
from hbp.backends.torch.operations import suffix_scan_
from hbp.cells import GRUParameters, GRUPullback
from hbp.core.chain import LinearizedChain


def gru_pullback(
    pullback: GRUPullback, dh: Tensor, iterations: int | None, with_inputs: bool = True
) -> tuple[GRUParameters, Tensor | None, Tensor]:
    """What ``pullback(dh, iterations)`` returns, the inputs' gradient where wanted."""
    blocks = blocks_of(pullback)
    scan = pullback.backend.kernel("suffix_scan_", dh) or suffix_scan_
    g = None if iterations is None else _highway([block.chain for _, block in blocks], dh, iterations, scan)

    def solve(block: GRUPullback, start: int, carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stop = start + len(block.h)
        states = _exact(block.chain, dh[start:stop], carry) if g is None else g[start : stop + 1]
        inputs, recurrent = block.preactivations(states)
        return inputs, recurrent, states[0].clone()

    return pull_in_blocks(pullback, blocks, solve, with_inputs)


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


def _highway(
    chains: list[LinearizedChain], dh: Tensor, iterations: int, scan: Callable[[Tensor, Tensor], None]
) -> Tensor:
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
            scan(chain.residual.arrays[0], new[a : b + 1])
            b = a
    return new
