"""Which way the layers of a stack are pulled back: each through its own graph, or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbp.backends.torch.autograd import alike, numberless
from hbp.backends.torch.stack.batched import BatchedGraph, Candidates
from hbp.backends.torch.stack.graphs import Call, LayerGraphs
from hbp.core.backend import Backend


@dataclass(frozen=True)
class Verdict:
    """How the last backward pass pulled its layers back, and for which layers the batched way is proved."""

    path: str = ""
    """ "stacked", or "loop" with the reason."""
    proved: frozenset[Any] = frozenset()
    """Layers, with the one run in their place and its structure, whose batched pullbacks were found to be their own."""

    def __reduce__(self) -> Any:
        return Verdict, (self.path,)  # the layers of a copy are others

    def judge(
        self, calls: Sequence[Call], leaves: Sequence[Tensor], stacked: bool | None, backend: Backend
    ) -> tuple[LayerGraphs | BatchedGraph, Verdict]:
        """The pullbacks of these calls in the way that ``stacked`` says, and the verdict on them.

        Raises:
            RuntimeError: stacked=True, and they cannot be pulled back all at once.
        """
        if stacked is False:
            return LayerGraphs.of(calls), Verdict("loop: pinned", self.proved)
        candidates = Candidates.of(calls)
        reason = candidates.refusal()
        if reason is None and stacked is None and not candidates.promising():
            reason = "too large, or of different settings"
        if reason is None:
            graph, kind = BatchedGraph(calls, stacked is None), candidates.structure()
            layers = {(id(call.module), id(calls[0].module), kind) for call in calls}
            reason = _objection(graph, leaves, layers <= self.proved, backend)
            if reason is None:
                return graph, Verdict("stacked", self.proved | layers)
        if stacked:
            raise RuntimeError(f"stacked=True, but these layers cannot be pulled back all at once: {reason}")
        return LayerGraphs.of(calls), Verdict(f"loop: {reason}", self.proved)


def _objection(graph: BatchedGraph, leaves: Sequence[Tensor], proved: bool, backend: Backend) -> str | None:
    """Run a batched graph and, the first time, prove its pullbacks; what speaks against it, or None."""
    if any(call.written() for call in graph.calls):
        return "parameters or states were written between forward and backward"
    try:
        if not _repeated(graph):
            return "run once more they have other values: they are random, or what they read was changed since"
        same = proved or _proved(graph, leaves, backend)
    except Exception as error:  # torch.vmap has many ways to say that it cannot
        return f"torch.vmap says: {error}"
    return None if same else "all at once they have other gradients: they hold more than parameters"


def _repeated(graph: BatchedGraph) -> bool:
    """Whether the layers, run once more, take their states where the forward took them."""
    *_, y = graph.linearized()
    return alike(y.detach(), torch.stack([call.state for call in graph.calls]), graph.calls[0].modes.precision)


def _proved(graph: BatchedGraph, leaves: Sequence[Tensor], backend: Backend) -> bool:
    """Whether a random cotangent is pulled back as through the layers' own graphs, to states and leaves."""
    first, loop = graph.calls[0], LayerGraphs.of(graph.calls)
    *_, y = graph.linearized()
    if numberless(y):
        return True
    generator = torch.Generator(y.device).manual_seed(0)
    v = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    found = [graph(v, backend), *graph.gradients(v, leaves)]
    expected = [loop(v, backend), *loop.gradients(v, leaves)]
    sizes = (float(t.detach().nan_to_num(0, 0, 0).abs().max()) for t in expected if t is not None and t.numel())
    largest = max(sizes, default=0.0)
    noise = 64 * torch.finfo(first.modes.precision).eps * largest
    for ours, reference in zip(found, expected, strict=True):
        if ours is None and reference is None:
            continue
        zero = torch.zeros_like(reference if ours is None else ours)
        ours, reference = (zero if t is None else t for t in (ours, reference))
        if ours.numel() and (ours - reference).abs().max() <= noise:
            continue  # a gradient that is 0, as of keys' biases, is nothing but rounding
        if not alike(ours, reference, first.modes.precision):
            return False
    return True
