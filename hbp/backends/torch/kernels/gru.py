"""The rounds of Highway-BP on GRUs: one matrix product and one fused pass each.

A pass shifts the product by one step, adds what enters from outside, solves the suffix scan along the residual path
and writes the cotangents of the gates' pre-activations, which are the next product's left side, and in the last round,
or where increments are measured, those of the states. Along the gates alone time is scanned in tiles; with strong
directions of the weights beside, one program goes through the steps of one sequence. Beside each pass stands its plain
definition, of the same signature.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbp.backends.torch.kernels.iteration import BACKEND, Arrays, check_chain, keep, solved, squares
from hbp.backends.torch.kernels.lowrank import GUESSED, Held, factor, split_of, strides
from hbp.backends.torch.kernels.scan import (
    Blocks,
    blocks,
    check_device,
    column,
    compose,
    cut_of,
    entering,
    first,
    launch,
)
from hbp.cells._gru import GRUBlocks
from hbp.core.backend import check_shape
from hbp.core.chain import LinearizedChain
from hbp.core.operator import Diagonal
from hbp.core.scan import sequential
from hbp.core.solver import Solver
from hbp.directions import Directions


@triton.jit(do_not_specialize=["rows", "tiles"])
def gru_kernel(
    carries: tl.tensor,
    products: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    z: tl.tensor,
    c: tl.tensor,
    gains: tl.tensor,
    pulled: tl.tensor,
    out: tl.tensor,
    states: tl.tensor,
    scale: tl.tensor,
    sums: tl.tensor,
    settled: tl.tensor,
    hidden: tl.tensor,
    z_time: tl.tensor,
    z_batch: tl.tensor,
    z_unit: tl.tensor,
    PULLED: tl.constexpr,
    OUT: tl.constexpr,
    STATES: tl.constexpr,
    MEASURED: tl.constexpr,
    SUMMARY: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`gru_pass` over a chunk, or the affine map of its scan alone; all but z is contiguous."""
    if MEASURED:  # noqa: SIM102 - the compiler knows this one
        if tl.load(settled) != 0:
            return
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    chunk = tl.program_id(1)
    inside = channel < channels
    z_at = z + column(channel, hidden, z_batch, z_unit)
    gates = column(channel, hidden, 3 * hidden, 1)
    slot = chunk.to(tl.int64) * channels + channel
    carry = entering(carries, slot, inside, channels, SUMMARY)
    product = tl.full((WIDTH,), 1, ACC)
    change, whole = tl.full((WIDTH,), 0, ACC), tl.full((WIDTH,), 0, ACC)
    local = tl.arange(0, HEIGHT)
    for tile in range(tiles):
        row = ((chunk + 1) * tiles - 1 - tile) * HEIGHT + local
        time = row.to(tl.int64)[:, None]
        state = channel[None, :] + time * channels
        here = (row < rows)[:, None] & inside[None, :]
        before_last = (row < rows - 1)[:, None] & inside[None, :]
        path = tl.load(z_at[None, :] + time * z_time, before_last, other=1).to(ACC)
        source = tl.load(c + state, here, other=0).to(ACC)
        if PULLED:
            source += tl.load(pulled + state, before_last, other=0).to(ACC)
        composed, g = tl.associative_scan((path, source), 0, compose, reverse=True)
        g += composed * carry[None, :]
        carry = first(g, local)
        if SUMMARY:
            product *= first(composed, local)
        else:
            if MEASURED:
                changed, all_of_it = squares(states + state, g, here, scale, PULLED)
                change += tl.sum(changed, 0)
                whole += tl.sum(all_of_it, 0)
            if STATES:
                tl.store(states + state, g.to(states.dtype.element_ty), here)
            if OUT:
                stepped = (row > 0)[:, None] & here  # the gates of step t read the state after it
                step = gates[None, :] + (time - 1) * 3 * channels
                for gate in tl.static_range(3):
                    gain = tl.load(gains + step + gate * hidden, stepped, other=0).to(ACC)
                    tl.store(out + step + gate * hidden, (gain * g).to(out.dtype.element_ty), stepped)
    if SUMMARY:
        tl.store(carries + slot, carry, inside)
        tl.store(products + slot, product, inside)
    elif MEASURED:
        keep(sums, change, whole)


def gru_pass(z: Tensor, c: Tensor, gains: Tensor, arrays: Arrays, sizes: Blocks | None = None) -> None:
    """One scan of a GRU's chain along its gates.

    Args:
        z: the residual path, (T, B, H), of any strides.
        c: what enters from outside, (T+1, B, H), contiguous.
        gains: as in `GRUBlocks`, contiguous.
        arrays: what it takes from the round before, and writes.
        sizes: of the tiles.
    """
    rows, batch, hidden = c.shape
    given, flags = arrays.given(c)
    launch(gru_kernel, c, rows, batch * hidden, sizes, z, c, gains, *given, hidden, *z.stride(), **flags)


def plain_gru_pass(z: Tensor, c: Tensor, gains: Tensor, arrays: Arrays) -> None:
    """The definition of `gru_pass`."""
    g = BACKEND.propagate(Diagonal(z), arrays.entering(c))
    arrays.put(g, lambda g: gains * g[:, :, None])


@triton.jit(do_not_specialize=["steps"])
def gru_low_rank_kernel(
    z: tl.tensor,
    c: tl.tensor,
    gains: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    pulled: tl.tensor,
    out: tl.tensor,
    states: tl.tensor,
    scale: tl.tensor,
    sums: tl.tensor,
    settled: tl.tensor,
    steps: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    z_time: tl.tensor,
    z_batch: tl.tensor,
    z_unit: tl.tensor,
    l_unit: tl.tensor,
    l_rank: tl.tensor,
    r_rank: tl.tensor,
    r_unit: tl.tensor,
    PULLED: tl.constexpr,
    OUT: tl.constexpr,
    STATES: tl.constexpr,
    MEASURED: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`gru_low_rank_pass` of one sequence; all but z, left and right is contiguous."""
    if MEASURED:  # noqa: SIM102 - the compiler knows this one
        if tl.load(settled) != 0:
            return
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    unit, along = tl.arange(0, WIDTH), tl.arange(0, RANK)[:, None]
    inside, flat, l_gate = unit < hidden, unit[None, :], hidden * l_unit
    if PARTS == 1:
        mask = (along < rank) & inside[None, :]
        by_r = factor(left, along, flat, mask, l_rank, l_unit, ACC)
        by_z = factor(left + l_gate, along, flat, mask, l_rank, l_unit, ACC)
        by_n = factor(left + 2 * l_gate, along, flat, mask, l_rank, l_unit, ACC)
        back = factor(right, along, flat, mask, r_rank, r_unit, ACC)
    change, whole = tl.full((WIDTH,), 0, ACC), tl.full((WIDTH,), 0, ACC)
    state = (steps * batch + sequence) * hidden + unit
    g = tl.load(c + state, inside, other=0).to(ACC)
    if MEASURED:
        change, whole = squares(states + state, g, inside, scale, PULLED)
    if STATES:
        tl.store(states + state, g.to(states.dtype.element_ty), inside)
    for turn in tl.range(0, steps, num_stages=STAGES):
        time = steps - 1 - turn + 0 * sequence  # in 64 bits
        state = (time * batch + sequence) * hidden + unit
        step = (time * batch + sequence) * 3 * hidden + unit
        path = tl.load(z + time * z_time + sequence * z_batch + unit * z_unit, inside, other=0).to(ACC)
        moved = tl.load(c + state, inside, other=0).to(ACC) + path * g
        if PULLED:
            moved += tl.load(pulled + state, inside, other=0).to(ACC)
        r = tl.load(gains + step, inside, other=0).to(ACC) * g
        z_ = tl.load(gains + step + hidden, inside, other=0).to(ACC) * g
        n = tl.load(gains + step + 2 * hidden, inside, other=0).to(ACC) * g
        if OUT:
            tl.store(out + step, r.to(out.dtype.element_ty), inside)
            tl.store(out + step + hidden, z_.to(out.dtype.element_ty), inside)
            tl.store(out + step + 2 * hidden, n.to(out.dtype.element_ty), inside)
        for part in range(PARTS):
            if PARTS > 1:
                those = along + part * RANK
                mask = (those < rank) & inside[None, :]
                by_r = factor(left, those, flat, mask, l_rank, l_unit, ACC)
                by_z = factor(left + l_gate, those, flat, mask, l_rank, l_unit, ACC)
                by_n = factor(left + 2 * l_gate, those, flat, mask, l_rank, l_unit, ACC)
                back = factor(right, those, flat, mask, r_rank, r_unit, ACC)
            low = tl.sum(by_r * r[None, :] + by_z * z_[None, :] + by_n * n[None, :], 1)
            moved += tl.sum(back * low[:, None], 0)
        g = moved
        if MEASURED:
            changed, all_of_it = squares(states + state, g, inside, scale, PULLED)
            change += changed
            whole += all_of_it
        if STATES:
            tl.store(states + state, g.to(states.dtype.element_ty), inside)
    if MEASURED:
        keep(sums, change, whole)


def gru_low_rank_pass(
    z: Tensor, c: Tensor, gains: Tensor, factors: tuple[Tensor, Tensor], arrays: Arrays, sizes: Held | None = None
) -> None:
    """One scan of a GRU's chain along its gates and strong directions of the recurrent weights.

    Args:
        z, c, gains: as for `gru_pass`.
        factors: of the directions, (3H, r) and (r, H), of any strides.
        arrays: what it takes from the round before, and writes.
        sizes: of the programs.
    """
    rows, batch, hidden = c.shape
    given, flags = arrays.given(c)
    left, right = factors
    constants = (sizes or GUESSED).constants(hidden, len(right), 4, c.dtype)
    lengths = rows - 1, hidden, len(right), *z.stride(), *strides(left), *strides(right)
    with torch.cuda.device_of(c):
        gru_low_rank_kernel[(batch,)](z, c, gains, left, right, *given, *lengths, **flags, **constants)


def plain_gru_low_rank_pass(
    z: Tensor, c: Tensor, gains: Tensor, factors: tuple[Tensor, Tensor], arrays: Arrays
) -> None:
    """The definition of `gru_low_rank_pass`."""
    low = GRUBlocks(gains, z).along(*factors)
    g = sequential((Diagonal(z) + low).T, arrays.entering(c), BACKEND)
    arrays.put(g, lambda g: gains * g[:, :, None])


@torch.no_grad()
def gru_rounds(chain: LinearizedChain, c: Tensor, solver: Solver, sizes: Blocks | None = None) -> Tensor:
    """Highway-BP on the chain of a `GRUPullback`: ``highway(chain, c[-1], sources=c[:-1], solver=solver)``.

    Args:
        chain: T steps, unbound, with the residual path diag(z).
        c: what enters at the states, (T+1, B, H).
        solver: with chunks of one step.
        sizes: of the tiles; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, (T+1, B, H), contiguous; no gradient passes through it.

    Raises:
        TypeError, ValueError: another chain, or a dtype, device or shape that does not fit.
    """
    own, z, c = _checked(chain, c)
    sizes = sizes or blocks("gru_rounds", z)
    programs = cut_of(c, len(c), z[0].numel(), sizes).programs
    return solved(partial(gru_pass, z, c, own.gains, sizes=sizes), c, own.gains, own.weight, solver, programs)


@torch.no_grad()
def gru_low_rank_rounds(
    chain: LinearizedChain, c: Tensor, solver: Solver, directions: Directions, sizes: Held | None = None
) -> Tensor:
    """The same with strong directions of the weights in the residual path, as `GRUPullback.split` puts them there.

    Args:
        chain, c, solver, sizes: as for `gru_rounds`.
        directions: of the recurrent weights.
    """
    own, z, c = _checked(chain, c)
    factors, rest = split_of(own.weight, directions)
    sizes = sizes or Held.of("gru_low_rank_rounds", z)
    fused = partial(gru_low_rank_pass, z, c, own.gains, factors, sizes=sizes)
    return solved(fused, c, own.gains, rest, solver, c.shape[1])


def _checked(chain: LinearizedChain, c: Tensor) -> tuple[GRUBlocks, Tensor, Tensor]:
    """The blocks, the path diag(z), and what enters, as the kernels take them."""
    check_chain(chain, GRUBlocks, Diagonal)
    own, z = chain.pullbacks, chain.residual.arrays[0]
    gains = own.gains.contiguous()
    steps, batch, _, hidden = gains.shape
    check_shape("c", c, (steps + 1, batch, hidden))
    check_device(c, gains, own.weight, z)
    return GRUBlocks(gains, own.weight), z, c.contiguous()
