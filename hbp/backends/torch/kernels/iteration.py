"""The rounds of Highway-BP with a recurrent cell: one matrix product and one fused pass each.

Where increments are asked for, each pass measures what it changes as it goes. The sums stay on the device, which finds
out by itself whether the tolerance is met, or never will be: from then on a pass returns at once. The host hears of a
round while the next one runs, so that neither waits for the other; once it has heard that all is settled, it stops.
What this costs is one product more than needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.kernels.scan import precision, wide
from hbp.core.chain import LinearizedChain
from hbp.core.solver import Solver

Pass = Callable[["Arrays"], None]
"""A pass over all steps: it solves the suffix scan along the residual path."""
BACKEND = TorchBackend()
BLOCK = 1024
"""Sums that are added at once."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a pass takes from the round before, and what it writes; contiguous."""

    pulled: Tensor | None = None
    """What the blocks pull back to the first T states, of an LSTM's to h, (T, B, H); None in the first round."""
    out: Tensor | None = None
    """For the cotangents of the pre-activations that enter the product, (T, B, gates, H); None in the last round."""
    states: Tensor | None = None
    """For those of the states, (T+1, B, ...); None where nobody asks."""
    measure: Measure | None = None
    """For what changes in ``states``, which hold the round before; in the first round all does."""

    def given(self, any_other: Tensor) -> tuple[list[Tensor], dict[str, bool]]:
        """All as a kernel takes them, with some tensor in the place of None, and its flags."""
        inside = (None,) * 3 if self.measure is None else (self.measure.scale, self.measure.sums, self.measure.settled)
        arrays = [any_other if array is None else array for array in (self.pulled, self.out, self.states, *inside)]
        flags = {"PULLED": self.pulled, "OUT": self.out, "STATES": self.states, "MEASURED": self.measure}
        return arrays, {name: value is not None for name, value in flags.items()}

    def entering(self, c: Tensor) -> Tensor:
        """The definition of what enters at the states, from outside and by what was pulled back."""
        if self.pulled is None:
            return c
        entering = c.clone()
        (entering[:-1] if c.ndim == 3 else entering[:-1, :, 1]).add_(self.pulled)
        return entering

    def put(self, g: Tensor, preactivations: Callable[[Tensor], Tensor]) -> None:
        """The definition of what a pass does with the cotangents of the states once it has them."""
        if self.measure is not None and self.measure.settled:
            return
        if self.measure is not None and self.states is not None:
            change = g if self.pulled is None else g - self.states
            self.measure.sums.zero_()
            self.measure.sums[0] = torch.stack([(x * self.measure.scale[0]).square().sum() for x in (change, g)])
        if self.states is not None:
            self.states.copy_(g)
        if self.out is not None:
            self.out.copy_(preactivations(g[1:]).view(self.out.shape))


@dataclass(frozen=True, eq=False)
class Measure:
    """What a pass finds, and needs to know for it."""

    scale: Tensor
    """The factor that brings cotangents near 1, so that no square overflows or vanishes, and the tolerance, (2,)."""
    sums: Tensor
    """The sums of squares of change and whole, times that factor's square, of each program, (programs, 2)."""
    settled: Tensor
    """Whether `Solver.settled`, (1,), int32: then a pass does nothing."""

    @classmethod
    def of(cls, c: Tensor, tolerance: float | None, programs: int) -> Measure:
        """Before the first pass; without a tolerance nothing is ever settled."""
        kind = {"dtype": wide(c.dtype), "device": c.device}
        largest = c.abs().amax().to(kind["dtype"]) if c.numel() else torch.ones((), **kind)
        usual = (largest > 0) & torch.isfinite(largest)
        factor = torch.where(usual, (1 / largest).clamp(max=torch.finfo(c.dtype).max), torch.ones_like(largest))
        scale = torch.stack([factor, torch.full_like(factor, -1 if tolerance is None else tolerance)])
        settled = torch.zeros(1, dtype=torch.int32, device=c.device)
        return cls(scale, torch.zeros((programs, 2), **kind), settled)


@triton.jit
def squares(states: tl.tensor, g: tl.tensor, mask: tl.tensor, scale: tl.tensor, PULLED: tl.constexpr) -> tl.tensor:
    """The squares of what a store of ``g`` would change, and of ``g`` itself, times that of the factor."""
    factor = tl.load(scale)
    new = tl.where(mask, g * factor, 0)
    change = new
    if PULLED:
        change -= tl.load(states, mask, other=0) * factor
    return change * change, new * new


@triton.jit
def both_squares(
    states: tl.tensor,
    dc: tl.tensor,
    dh: tl.tensor,
    hidden: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    PULLED: tl.constexpr,
) -> tl.tensor:
    """Those of a pair, whose second half lies behind the first."""
    change_c, whole_c = squares(states, dc, mask, scale, PULLED)
    change_h, whole_h = squares(states + hidden, dh, mask, scale, PULLED)
    return change_c + change_h, whole_c + whole_h


@triton.jit
def keep(sums: tl.tensor, change: tl.tensor, whole: tl.tensor) -> None:
    """Put a program's sums in its place."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + 2 * program, tl.sum(change, 0))
    tl.store(sums + 2 * program + 1, tl.sum(whole, 0))


@triton.jit
def settle_kernel(
    sums: tl.tensor,
    scale: tl.tensor,
    settled: tl.tensor,
    row: tl.tensor,
    programs: tl.tensor,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`settle`."""
    if tl.load(settled) == 0:
        local = tl.arange(0, BLOCK)
        change, whole = tl.full((BLOCK,), 0, ACC), tl.full((BLOCK,), 0, ACC)
        for start in range(0, programs, BLOCK):
            program = start + local
            change += tl.load(sums + 2 * program, program < programs, other=0)
            whole += tl.load(sums + 2 * program + 1, program < programs, other=0)
        factor, tolerance = tl.load(scale), tl.load(scale + 1)
        increment, solution = tl.sqrt(tl.sum(change, 0)) / factor, tl.sqrt(tl.sum(whole, 0)) / factor
        met = ((increment > tolerance * solution) == 0) & (tolerance >= 0)  # or not finite
        tl.store(row, increment)
        tl.store(row + 1, solution)
        tl.store(row + 2, met.to(ACC))
        tl.store(settled, met.to(tl.int32))


def settle(measure: Measure, row: Tensor) -> None:
    """From the sums of a pass its norms of change and whole, and whether these meet the tolerance, (3,)."""
    constants = {"BLOCK": BLOCK, **precision(row.dtype)}
    with torch.cuda.device_of(row):
        settle_kernel[(1,)](measure.sums, measure.scale, measure.settled, row, len(measure.sums), **constants)


def plain_settle(measure: Measure, row: Tensor) -> None:
    """The definition of `settle`."""
    if not measure.settled:
        factor, tolerance = measure.scale
        norms = measure.sums.sum(0).sqrt() / factor
        met = bool(tolerance >= 0 and not norms[0] > tolerance * norms[1])  # or not finite
        row.copy_(torch.stack([*norms, torch.full_like(factor, met)]))
        measure.settled.fill_(met)


@dataclass(eq=False)
class Watcher:
    """What the host hears of the rounds on a device, each a round late."""

    measure: Measure
    found: Tensor
    """A row for each round as `settle` finds it, on the device."""
    heard: Tensor
    """The same on the host, in memory that a device can write while the host goes on."""
    events: list[Any] = field(default_factory=list)
    """Of each round, when its row has arrived."""

    @classmethod
    def of(cls, c: Tensor, solver: Solver, rounds: int, programs: int) -> Watcher:
        """Before the first round."""
        found = torch.zeros((rounds, 3), dtype=wide(c.dtype), device=c.device)
        heard = torch.zeros(found.shape, dtype=found.dtype, pin_memory=c.is_cuda)
        return cls(Measure.of(c, solver.tolerance, programs), found, heard)

    def over(self) -> bool:
        """After a pass: whether the round before it was known to be the last."""
        k = len(self.events)
        settle(self.measure, self.found[k])
        self.heard[k].copy_(self.found[k], non_blocking=True)
        event = torch.cuda.Event() if self.found.is_cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream(self.found.device))
        self.events.append(event)
        return k > 0 and bool(self._row(k - 1)[2])

    def sizes(self) -> list[tuple[float, float]]:
        """The norms of all rounds that changed something."""
        rows = [self._row(k) for k in range(len(self.events))]
        last = next((k for k, row in enumerate(rows) if row[2]), len(rows) - 1)
        return [(increment, solution) for increment, solution, _ in rows[: last + 1]]

    def _row(self, k: int) -> list[float]:
        event = self.events[k]
        if event is not None:
            event.synchronize()
        row: list[float] = self.heard[k].tolist()
        return row


def solved(run: Pass, c: Tensor, gains: Tensor, weight: Tensor, solver: Solver, programs: int) -> Tensor:
    """All cotangents of the states, ``g``, like ``c``: the left side of the product and the product have one buffer.

    Args:
        run: the pass.
        c: what enters at the states from outside, (T+1, B, ...).
        gains: as the cells' blocks have them, (T, B, gates, H).
        weight: what of the recurrent weights is in no residual path, (gates * H, H).
        solver: with chunks of one step; it is told of the increments where it asks.
        programs: the number of a pass's programs.
    """
    steps, batch, count, hidden = gains.shape
    solver = solver.above(torch.finfo(wide(c.dtype)).eps)
    most, watched = solver.most(steps), solver.measures
    # increments are differences, which half precision would round away
    g = torch.empty(c.shape, dtype=wide(c.dtype) if watched else c.dtype, device=c.device)
    watcher = Watcher.of(c, solver, most + 1, programs) if watched else None
    measure, pulled = None if watcher is None else watcher.measure, None
    if most:
        left = torch.empty(gains.shape, dtype=c.dtype, device=c.device)
        product = torch.empty((steps, batch, hidden), dtype=c.dtype, device=c.device)
    for k in range(most + 1):
        last = k == most
        run(Arrays(pulled, None if last else left, g if last or watched else None, measure))
        if watcher is not None and watcher.over():
            break
        if not last:
            torch.mm(left.view(steps * batch, count * hidden), weight, out=product.view(steps * batch, hidden))
            pulled = product
    if watcher is not None:
        solver.tell(watcher.sizes(), steps)
    return g.to(c.dtype)


def check_chain(chain: LinearizedChain, blocks: type, residual: type) -> None:
    """Check that a chain is of a kind; raises TypeError."""
    if not isinstance(chain.pullbacks, blocks) or not isinstance(chain.residual, residual):
        given = f"{type(chain.pullbacks).__name__} and the residual {type(chain.residual).__name__}"
        raise TypeError(f"chain has {given}; these rounds take {blocks.__name__} and {residual.__name__}")
