"""The suffix scan of maps with few strong directions beside a cheap path: one program for each sequence.

It goes through the steps one after another. The state stays in its registers, and so do both factors where all maps
share them and they are not too large; else they are read again at each step, some directions at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbp.backends._measured import settings
from hbp.backends.torch.array import place
from hbp.backends.torch.kernels.scan import check_device, precision, wide
from hbp.core.backend import check_shape
from hbp.core.operator import Identity, LinearOperator, Pair, Scalar, Zero
from hbp.directions import Directions
from hbp.lowrank import LowRank


@dataclass(frozen=True)
class Held:
    """The sizes that a search may choose."""

    bytes: int = 1 << 18
    """Of the factors that a program has in its registers at once: all registers of a processor."""
    warps: int = 16
    """At most; so many that each thread has some 32 numbers of the factors."""
    stages: int = 2
    """Steps that are at work at once: what one reads is requested while the one before is computed."""

    @classmethod
    def of(cls, name: str, like: Tensor) -> Held:
        """Those measured for a kernel at this size, or the guesses."""
        return replace(GUESSED, **settings(f"torch.{name}", place(like)))

    def constants(self, size: int, rank: int, factors: int, dtype: torch.dtype) -> dict[str, Any]:
        """What a kernel is compiled with for so many units and directions, whose factors have so many columns each."""
        rank = max(rank, 1)  # where there are none, one that is masked: what a kernel reads must be defined somewhere
        width = triton.next_power_of_2(max(size, 1))
        fitting = max(self.bytes // (factors * width * wide(dtype).itemsize), 1)
        block = min(triton.next_power_of_2(rank), _power_below(fitting))
        warps = min(self.warps, _power_below(max(factors * width * block // 1024, 1)))
        sizes = {"WIDTH": width, "RANK": block, "PARTS": triton.cdiv(rank, block), "STAGES": self.stages}
        return {**sizes, "num_warps": warps, **precision(dtype)}


def _power_below(n: int) -> int:
    """The largest power of two that is not above a number."""
    return 1 << n.bit_length() - 1


GUESSED = Held()


@triton.jit
def factor(
    start: tl.tensor,
    along: tl.tensor,
    unit: tl.tensor,
    inside: tl.tensor,
    by_rank: tl.tensor,
    by_unit: tl.tensor,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Some directions of a factor, first axis, at some units."""
    at = along.to(tl.int64) * by_rank + unit.to(tl.int64) * by_unit
    return tl.load(start + at, inside, other=0).to(ACC)


@triton.jit(do_not_specialize=["steps"])
def low_rank_scan_kernel(
    c: tl.tensor,
    values: tl.tensor,
    others: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    g: tl.tensor,
    steps: tl.tensor,
    size: tl.tensor,
    rank: tl.tensor,
    v_time: tl.tensor,
    v_batch: tl.tensor,
    v_unit: tl.tensor,
    o_time: tl.tensor,
    o_batch: tl.tensor,
    o_unit: tl.tensor,
    l_time: tl.tensor,
    l_batch: tl.tensor,
    l_unit: tl.tensor,
    l_rank: tl.tensor,
    r_time: tl.tensor,
    r_batch: tl.tensor,
    r_rank: tl.tensor,
    r_unit: tl.tensor,
    PAIRS: tl.constexpr,
    LEFT_HELD: tl.constexpr,
    RIGHT_HELD: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`low_rank_scan` of one sequence, whose state is one row of units, or a pair of rows; c and g are contiguous."""
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, column, along = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, RANK)[:, None, None]
    unit = row[:, None] * size + column[None, :]
    inside = (row < HEIGHT)[:, None] & (column < size)[None, :]
    value_at = values + sequence * v_batch + unit.to(tl.int64) * v_unit
    other_at = others + sequence * o_batch + unit.to(tl.int64) * o_unit
    left_at, right_at = left + sequence * l_batch, right + sequence * r_batch
    if LEFT_HELD:
        up = factor(left_at, along, unit[None], (along < rank) & inside[None], l_rank, l_unit, ACC)
    if RIGHT_HELD:
        down = factor(right_at, along, unit[None], (along < rank) & inside[None], r_rank, r_unit, ACC)
    here = (steps * batch + sequence) * size * HEIGHT + unit
    state = tl.load(c + here, inside, other=0).to(ACC)
    tl.store(g + here, state.to(g.dtype.element_ty), inside)
    for turn in tl.range(0, steps, num_stages=STAGES):
        time = steps - 1 - turn + 0 * sequence  # in 64 bits
        here = (time * batch + sequence) * size * HEIGHT + unit
        source = tl.load(c + here, inside, other=0).to(ACC)
        value = tl.load(value_at + time * v_time, inside, other=0).to(ACC)
        if PAIRS:
            other = tl.load(other_at + time * o_time, inside, other=0).to(ACC)
            moved = source + value * tl.sum(other * state, 0)[None, :]
        else:
            moved = source + value * state
        for part in range(PARTS):
            those = along + part * RANK
            mask = (those < rank) & inside[None]
            if not RIGHT_HELD:
                down = factor(right_at + time * r_time, those, unit[None], mask, r_rank, r_unit, ACC)
            if not LEFT_HELD:
                up = factor(left_at + time * l_time, those, unit[None], mask, l_rank, l_unit, ACC)
            low = tl.sum(tl.sum(down * state[None], 2), 1)
            moved += tl.sum(up * low[:, None, None], 0)
        state = moved
        tl.store(g + here, state.to(g.dtype.element_ty), inside)


@torch.no_grad()
def low_rank_scan(operator: LowRank, c: Tensor, sizes: Held | None = None) -> Tensor:
    """Solve ``g[i] = a[i] g[i+1] + left[i] right[i] g[i+1] + c[i]``, ``g[L] = c[L]``: `hbp.core.scan.sequential`.

    In half precision sums are in float32, and rounded once for each state written.

    Args:
        operator: bound to the states; its path a `Diagonal`, `Scalar`, `Identity`, `Zero` or `Pair`.
        c: (L+1, ...), of any strides.
        sizes: of the programs; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, contiguous; no gradient passes through it.

    Raises:
        TypeError: another operator or dtype.
        ValueError: another device.
    """
    if not isinstance(operator, LowRank):
        raise TypeError(f"operator is a {type(operator).__name__}; give a bound LowRank")
    check_device(c, *operator.arrays)
    paired, steps = isinstance(operator.path, Pair), len(c) - 1
    batch, size = (c.shape[1:-2], c.shape[-1]) if paired else (c.shape[1:-1], c.shape[-1])
    flat = size * (1 + paired)
    c = c.contiguous()
    g = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    if not c.numel():
        return g
    path = [x.expand(steps, *c.shape[1:]).reshape(steps, math.prod(batch), flat) for x in _path(operator.path, c)]
    left, right = (_by_sequence(x, batch) for x in (operator.left, operator.right))
    constants = (sizes or Held.of("low_rank_scan", c)).constants(size, operator.rank, 2 + 2 * paired, c.dtype)
    one, factors = constants["PARTS"] < 2, {"LEFT_HELD": left, "RIGHT_HELD": right}
    held = {name: one and not strides(x)[0] for name, x in factors.items()}
    with torch.cuda.device_of(c):
        low_rank_scan_kernel[(math.prod(batch),)](
            c, path[0], path[-1], left, right, g, steps, size, operator.rank,
            *(n for x in (path[0], path[-1], left, right) for n in strides(x)),
            PAIRS=paired, HEIGHT=1 + paired, **held, **constants,
        )  # fmt: skip
    return g


def _path(path: LinearOperator, c: Tensor) -> list[Tensor]:
    """What the states are multiplied by along the path, of a `Pair` both factors, with all axes of the states."""
    if path.arrays:
        return [x.reshape(len(x), *(1,) * (c.ndim - x.ndim), *x.shape[1:]) for x in path.arrays]
    if not isinstance(path, Identity | Scalar | Zero):
        raise TypeError(f"the path is a {type(path).__name__}; give a Diagonal, Scalar, Identity, Zero or Pair")
    number = path.value if isinstance(path, Scalar) else float(isinstance(path, Identity))
    return [torch.full((1,) * c.ndim, number, dtype=c.dtype, device=c.device)]


def _by_sequence(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """A factor (L or 1, ..., m, n) as (L or 1, B or 1, m, n)."""
    own = x.shape[1:-2] if math.prod(x.shape[1:-2]) == 1 else batch
    return x.expand(len(x), *own, *x.shape[-2:]).reshape(len(x), math.prod(own), *x.shape[-2:])


def strides(x: Tensor) -> list[int]:
    """The strides of a tensor, 0 along what one entry is shared by."""
    return [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]


def split_of(weight: Tensor, directions: Directions) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The factors of a weight's directions, the units of both side by side in memory, and the rest of the weight.

    Raises:
        TypeError, ValueError: they are another weight's.
    """
    left, right = directions.taken
    check_device(weight, left, right)
    check_shape("the directions' left factor", left, (len(weight), len(right)))
    check_shape("the directions' right factor", right, (len(right), weight.shape[1]))
    return (left.T.contiguous().T, right.contiguous()), torch.addmm(weight, left, right, alpha=-1)
