"""Recurrent nets' backend: what is compiled, and the GRU's adjoint as PyTorch runs it best without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hbp.backends.torch.array import TorchBackend, suffix_scan_
from hbp.backends.torch.autograd import without_autocast
from hbp.cells import GRUParameters, GRUPullback
from hbp.cells._spans import pull_in_spans, spans_of
from hbp.core.chain import LinearizedChain


class RecurrentBackend(TorchBackend):
    """PyTorch for recurrent nets: on a CPU the GRU's pullback has a form of its own, in place and in spans of time."""

    def kernel(self, name: str, *arrays: Tensor) -> Callable[..., Any] | None:
        if name == "gru_in_place":
            return gru_in_place if all(array.device.type == "cpu" for array in arrays) else None
        return super().kernel(name, *arrays)

    def compiled(self, mode: str, tensors: Sequence[Tensor]) -> bool:
        """Whether this library's own forward runs on such inputs and weights."""
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return False
        return self.kernel(f"{mode.lower()}_forward", *(tensor.detach() for tensor in tensors)) is not None

    def adjoint_compiled(self, mode: str, x: Tensor) -> bool:
        """Whether the exact adjoint on such inputs is compiled."""
        with without_autocast("cpu"):  # as the backward runs
            return self.kernel(f"{mode.lower()}_adjoint", x.detach()) is not None


BACKEND = RecurrentBackend()


def gru_in_place(
    pullback: GRUPullback, dh: Tensor, with_inputs: bool = True, *, iterations: int | None
) -> tuple[GRUParameters, Tensor | None, Tensor]:
    """What ``pullback(dh, iterations, with_inputs=...)`` returns, in place and in spans of time."""
    spans = spans_of(pullback)
    scan = pullback.backend.kernel("suffix_scan_", dh) or suffix_scan_
    g = None if iterations is None else _highway([span.chain for _, span in spans], dh, iterations, scan)

    def solve(span: GRUPullback, start: int, carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stop = start + len(span.h)
        states = _exact(span.chain, dh[start:stop], carry) if g is None else g[start : stop + 1]
        inputs, recurrent = span.preactivations(states)
        return inputs, recurrent, states[0].clone()

    return pull_in_spans(pullback, spans, solve, with_inputs)


def _exact(chain: LinearizedChain, dh: Tensor, carry: Tensor) -> Tensor:
    """`hbp.core.adjoint.backprop` of a span, whose last state gets ``carry`` too: three operations a step."""
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
    """`hbp.core.adjoint.highway` of a chain cut into spans: all rounds in two arrays."""
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
