"""The rounds of Highway-BP on LSTMs: one matrix product and one fused pass each.

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

from hbp.backends.torch.kernels.iteration import BACKEND, Arrays, both_squares, check_chain, keep, solved
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
from hbp.cells._lstm import LSTMBlocks
from hbp.core.backend import check_shape
from hbp.core.chain import LinearizedChain
from hbp.core.operator import Pair
from hbp.core.scan import sequential
from hbp.core.solver import Solver
from hbp.directions import Directions


@triton.jit(do_not_specialize=["rows", "tiles"])
def lstm_kernel(
    carries: tl.tensor,
    products: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    f: tl.tensor,
    exposed: tl.tensor,
    c: tl.tensor,
    gains: tl.tensor,
    pulled: tl.tensor,
    out: tl.tensor,
    states: tl.tensor,
    scale: tl.tensor,
    sums: tl.tensor,
    settled: tl.tensor,
    hidden: tl.tensor,
    f_time: tl.tensor,
    f_batch: tl.tensor,
    f_unit: tl.tensor,
    PULLED: tl.constexpr,
    OUT: tl.constexpr,
    STATES: tl.constexpr,
    MEASURED: tl.constexpr,
    SUMMARY: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`lstm_pass` over a chunk, or the affine map of its scan alone; all but f is contiguous.

    With ``u[t] = dc[t] + exposed[t-1] dh[t]`` the path's part of the cotangent of c[t] obeys
    ``s[t] = f[t] s[t+1] + f[t] u[t+1]``; a scan of u itself would give that cotangent as a difference.
    """
    if MEASURED:  # noqa: SIM102 - the compiler knows this one
        if tl.load(settled) != 0:
            return
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    chunk = tl.program_id(1)
    inside = channel < channels
    f_at = f + column(channel, hidden, f_batch, f_unit)
    pairs = column(channel, hidden, 2 * hidden, 1)
    gates = column(channel, hidden, 4 * hidden, 1)
    slot = chunk.to(tl.int64) * channels + channel
    carry = entering(carries, slot, inside, channels, SUMMARY)
    product = tl.full((WIDTH,), 1, ACC)
    change, whole = tl.full((WIDTH,), 0, ACC), tl.full((WIDTH,), 0, ACC)
    local = tl.arange(0, HEIGHT)
    for tile in range(tiles):
        row = ((chunk + 1) * tiles - 1 - tile) * HEIGHT + local
        time = row.to(tl.int64)[:, None]
        unit = channel[None, :] + time * channels
        pair = pairs[None, :] + time * 2 * channels
        here = (row < rows)[:, None] & inside[None, :]
        before_last = (row < rows - 1)[:, None] & inside[None, :]
        path = tl.load(f_at[None, :] + time * f_time, before_last, other=1).to(ACC)
        following = pair + 2 * channels
        dc = tl.load(c + following, before_last, other=0).to(ACC)
        dh = tl.load(c + following + hidden, before_last, other=0).to(ACC)
        if PULLED:
            before_two = (row < rows - 2)[:, None] & inside[None, :]
            dh += tl.load(pulled + unit + channels, before_two, other=0).to(ACC)
        source = path * (dc + tl.load(exposed + unit, before_last, other=0).to(ACC) * dh)
        composed, s = tl.associative_scan((path, source), 0, compose, reverse=True)
        s += composed * carry[None, :]
        carry = first(s, local)
        if SUMMARY:
            product *= first(composed, local)
        else:
            dc = s + tl.load(c + pair, here, other=0).to(ACC)
            dh = tl.load(c + pair + hidden, here, other=0).to(ACC)
            if PULLED:
                dh += tl.load(pulled + unit, before_last, other=0).to(ACC)
            if MEASURED:
                changed, all_of_it = both_squares(states + pair, dc, dh, hidden, here, scale, PULLED)
                change += tl.sum(changed, 0)
                whole += tl.sum(all_of_it, 0)
            if STATES:
                tl.store(states + pair, dc.to(states.dtype.element_ty), here)
                tl.store(states + pair + hidden, dh.to(states.dtype.element_ty), here)
            if OUT:
                stepped = (row > 0)[:, None] & here  # the gates of step t read the state after it
                memory = dc + tl.load(exposed + unit - channels, stepped, other=0).to(ACC) * dh
                step = gates[None, :] + (time - 1) * 4 * channels
                for gate in tl.static_range(4):
                    gain = tl.load(gains + step + gate * hidden, stepped, other=0).to(ACC)
                    value = gain * (memory if gate < 3 else dh)
                    tl.store(out + step + gate * hidden, value.to(out.dtype.element_ty), stepped)
    if SUMMARY:
        tl.store(carries + slot, carry, inside)
        tl.store(products + slot, product, inside)
    elif MEASURED:
        keep(sums, change, whole)


def lstm_pass(
    f: Tensor, exposed: Tensor, c: Tensor, gains: Tensor, arrays: Arrays, sizes: Blocks | None = None
) -> None:
    """One scan of an LSTM's chain on the states (c, h) along the path c[t-1] -> c[t] -> h[t].

    Args:
        f: the forget gates, (T, B, H), of any strides.
        exposed, gains: as in `LSTMBlocks`, contiguous.
        c: what enters from outside, (T+1, B, 2, H), contiguous.
        arrays: what it takes from the round before, and writes.
        sizes: of the tiles.
    """
    rows, batch, _, hidden = c.shape
    given, flags = arrays.given(c)
    launch(lstm_kernel, c, rows, batch * hidden, sizes, f, exposed, c, gains, *given, hidden, *f.stride(), **flags)


def plain_lstm_pass(f: Tensor, exposed: Tensor, c: Tensor, gains: Tensor, arrays: Arrays) -> None:
    """The definition of `lstm_pass`."""
    g = BACKEND.propagate(_path(f, exposed).T, arrays.entering(c))
    arrays.put(g, lambda g: LSTMBlocks(gains, exposed, f).preactivations(g, BACKEND))


def _path(f: Tensor, exposed: Tensor) -> Pair:
    return Pair(torch.stack([f, exposed * f], -2), torch.stack([torch.ones_like(f), torch.zeros_like(f)], -2))


@triton.jit(do_not_specialize=["steps"])
def lstm_low_rank_kernel(
    f: tl.tensor,
    exposed: tl.tensor,
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
    f_time: tl.tensor,
    f_batch: tl.tensor,
    f_unit: tl.tensor,
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
    """`lstm_low_rank_pass` of one sequence; all but f, left and right is contiguous."""
    if MEASURED:  # noqa: SIM102 - the compiler knows this one
        if tl.load(settled) != 0:
            return
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    unit, along = tl.arange(0, WIDTH), tl.arange(0, RANK)[:, None]
    inside, flat, l_gate = unit < hidden, unit[None, :], hidden * l_unit
    if PARTS == 1:
        mask = (along < rank) & inside[None, :]
        by_i = factor(left, along, flat, mask, l_rank, l_unit, ACC)
        by_f = factor(left + l_gate, along, flat, mask, l_rank, l_unit, ACC)
        by_g = factor(left + 2 * l_gate, along, flat, mask, l_rank, l_unit, ACC)
        by_o = factor(left + 3 * l_gate, along, flat, mask, l_rank, l_unit, ACC)
        back = factor(right, along, flat, mask, r_rank, r_unit, ACC)
    change, whole = tl.full((WIDTH,), 0, ACC), tl.full((WIDTH,), 0, ACC)
    pair = (steps * batch + sequence) * 2 * hidden + unit
    dc = tl.load(c + pair, inside, other=0).to(ACC)
    dh = tl.load(c + pair + hidden, inside, other=0).to(ACC)
    if MEASURED:
        change, whole = both_squares(states + pair, dc, dh, hidden, inside, scale, PULLED)
    if STATES:
        tl.store(states + pair, dc.to(states.dtype.element_ty), inside)
        tl.store(states + pair + hidden, dh.to(states.dtype.element_ty), inside)
    for turn in tl.range(0, steps, num_stages=STAGES):
        time = steps - 1 - turn + 0 * sequence  # in 64 bits
        state = (time * batch + sequence) * hidden + unit
        pair = (time * batch + sequence) * 2 * hidden + unit
        step = (time * batch + sequence) * 4 * hidden + unit
        path = tl.load(f + time * f_time + sequence * f_batch + unit * f_unit, inside, other=0).to(ACC)
        memory = dc + tl.load(exposed + state, inside, other=0).to(ACC) * dh
        i = tl.load(gains + step, inside, other=0).to(ACC) * memory
        f_ = tl.load(gains + step + hidden, inside, other=0).to(ACC) * memory
        g = tl.load(gains + step + 2 * hidden, inside, other=0).to(ACC) * memory
        o = tl.load(gains + step + 3 * hidden, inside, other=0).to(ACC) * dh
        dc = tl.load(c + pair, inside, other=0).to(ACC) + path * memory
        dh = tl.load(c + pair + hidden, inside, other=0).to(ACC)
        if PULLED:
            dh += tl.load(pulled + state, inside, other=0).to(ACC)
        if OUT:
            tl.store(out + step, i.to(out.dtype.element_ty), inside)
            tl.store(out + step + hidden, f_.to(out.dtype.element_ty), inside)
            tl.store(out + step + 2 * hidden, g.to(out.dtype.element_ty), inside)
            tl.store(out + step + 3 * hidden, o.to(out.dtype.element_ty), inside)
        for part in range(PARTS):
            if PARTS > 1:
                those = along + part * RANK
                mask = (those < rank) & inside[None, :]
                by_i = factor(left, those, flat, mask, l_rank, l_unit, ACC)
                by_f = factor(left + l_gate, those, flat, mask, l_rank, l_unit, ACC)
                by_g = factor(left + 2 * l_gate, those, flat, mask, l_rank, l_unit, ACC)
                by_o = factor(left + 3 * l_gate, those, flat, mask, l_rank, l_unit, ACC)
                back = factor(right, those, flat, mask, r_rank, r_unit, ACC)
            low = tl.sum(by_i * i[None, :] + by_f * f_[None, :] + by_g * g[None, :] + by_o * o[None, :], 1)
            dh += tl.sum(back * low[:, None], 0)
        if MEASURED:
            changed, all_of_it = both_squares(states + pair, dc, dh, hidden, inside, scale, PULLED)
            change += changed
            whole += all_of_it
        if STATES:
            tl.store(states + pair, dc.to(states.dtype.element_ty), inside)
            tl.store(states + pair + hidden, dh.to(states.dtype.element_ty), inside)
    if MEASURED:
        keep(sums, change, whole)


def lstm_low_rank_pass(
    f: Tensor,
    exposed: Tensor,
    c: Tensor,
    gains: Tensor,
    factors: tuple[Tensor, Tensor],
    arrays: Arrays,
    sizes: Held | None = None,
) -> None:
    """One scan of an LSTM's chain along c[t-1] -> c[t] -> h[t] and strong directions of the recurrent weights.

    Args:
        f, exposed, c, gains: as for `lstm_pass`.
        factors: of the directions, (4H, r) and (r, H), of any strides.
        arrays: what it takes from the round before, and writes.
        sizes: of the programs.
    """
    rows, batch, _, hidden = c.shape
    given, flags = arrays.given(c)
    left, right = factors
    constants = (sizes or GUESSED).constants(hidden, len(right), 5, c.dtype)
    lengths = rows - 1, hidden, len(right), *f.stride(), *strides(left), *strides(right)
    with torch.cuda.device_of(c):
        lstm_low_rank_kernel[(batch,)](f, exposed, c, gains, left, right, *given, *lengths, **flags, **constants)


def plain_lstm_low_rank_pass(
    f: Tensor, exposed: Tensor, c: Tensor, gains: Tensor, factors: tuple[Tensor, Tensor], arrays: Arrays
) -> None:
    """The definition of `lstm_low_rank_pass`."""
    blocks = LSTMBlocks(gains, exposed, f)
    g = sequential((_path(f, exposed) + blocks.along(*factors, BACKEND)).T, arrays.entering(c), BACKEND)
    arrays.put(g, lambda g: blocks.preactivations(g, BACKEND))


@torch.no_grad()
def lstm_rounds(chain: LinearizedChain, c: Tensor, solver: Solver, sizes: Blocks | None = None) -> Tensor:
    """Highway-BP on the chain of an `LSTMPullback`: ``highway(chain, c[-1], sources=c[:-1], solver=solver)``.

    Args:
        chain: T steps, unbound, with the residual path c[t-1] -> c[t] -> h[t].
        c: what enters at the states (c, h), (T+1, B, 2, H).
        solver: with chunks of one step.
        sizes: of the tiles; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, (T+1, B, 2, H), contiguous; no gradient passes through it.

    Raises:
        TypeError, ValueError: another chain, or a dtype, device or shape that does not fit.
    """
    own, f, c = _checked(chain, c)
    sizes = sizes or blocks("lstm_rounds", f)
    fused = partial(lstm_pass, f, own.exposed, c, own.gains, sizes=sizes)
    return solved(fused, c, own.gains, own.weight, solver, cut_of(c, len(c), f[0].numel(), sizes).programs)


@torch.no_grad()
def lstm_low_rank_rounds(
    chain: LinearizedChain, c: Tensor, solver: Solver, directions: Directions, sizes: Held | None = None
) -> Tensor:
    """The same with strong directions of the weights in the residual path, as `LSTMPullback.split` puts them there.

    Args:
        chain, c, solver, sizes: as for `lstm_rounds`.
        directions: of the recurrent weights.
    """
    own, f, c = _checked(chain, c)
    factors, rest = split_of(own.weight, directions)
    sizes = sizes or Held.of("lstm_low_rank_rounds", f)
    fused = partial(lstm_low_rank_pass, f, own.exposed, c, own.gains, factors, sizes=sizes)
    return solved(fused, c, own.gains, rest, solver, c.shape[1])


def _checked(chain: LinearizedChain, c: Tensor) -> tuple[LSTMBlocks, Tensor, Tensor]:
    """The blocks, the forget gates, and what enters, as the kernels take them."""
    check_chain(chain, LSTMBlocks, Pair)
    own, f = chain.pullbacks, chain.residual.arrays[0][..., 0, :]
    gains, exposed = own.gains.contiguous(), own.exposed.contiguous()
    steps, batch, _, hidden = gains.shape
    check_shape("c", c, (steps + 1, batch, 2, hidden))
    check_device(c, gains, exposed, own.weight, f)
    return LSTMBlocks(gains, exposed, own.weight), f, c.contiguous()
