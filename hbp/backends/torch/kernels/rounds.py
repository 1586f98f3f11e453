"""The rounds of Highway-BP on GRUs and LSTMs: one matrix product and one fused pass each.

A pass shifts the product by one step, adds what enters from outside, solves the suffix scan along the residual path
and writes the cotangents of the gates' pre-activations, which are the next product's left side; the last pass writes
the cotangents of the states. Beside each pass stands its plain definition, of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.kernels.scan import Blocks, blocks, check_device, column, compose, entering, first, launch
from hbp.cells._gru import GRUBlocks
from hbp.cells._lstm import LSTMBlocks
from hbp.core.backend import check_count, check_shape
from hbp.core.chain import LinearizedChain
from hbp.core.operator import Diagonal, Pair

BACKEND = TorchBackend()


@triton.jit(do_not_specialize=["rows", "tiles"])
def gru_kernel(
    carries: tl.tensor,
    products: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    z: tl.tensor,
    c: tl.tensor,
    pulled: tl.tensor,
    gains: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    z_time: tl.tensor,
    z_batch: tl.tensor,
    z_unit: tl.tensor,
    PULLED: tl.constexpr,
    LAST: tl.constexpr,
    SUMMARY: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`gru_pass` over a chunk, or the affine map of its scan alone; all but z is contiguous."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    chunk = tl.program_id(1)
    inside = channel < channels
    z_at = z + column(channel, hidden, z_batch, z_unit)
    gates = column(channel, hidden, 3 * hidden, 1)
    slot = chunk.to(tl.int64) * channels + channel
    carry = entering(carries, slot, inside, channels, SUMMARY)
    product = tl.full((WIDTH,), 1, ACC)
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
        elif LAST:
            tl.store(out + state, g.to(out.dtype.element_ty), here)
        else:
            stepped = (row > 0)[:, None] & here  # the gates of step t read the state after it
            step = gates[None, :] + (time - 1) * 3 * channels
            for gate in tl.static_range(3):
                gain = tl.load(gains + step + gate * hidden, stepped, other=0).to(ACC)
                tl.store(out + step + gate * hidden, (gain * g).to(out.dtype.element_ty), stepped)
    if SUMMARY:
        tl.store(carries + slot, carry, inside)
        tl.store(products + slot, product, inside)


def gru_pass(
    z: Tensor, c: Tensor, pulled: Tensor | None, gains: Tensor | None, out: Tensor, sizes: Blocks | None = None
) -> None:
    """One scan of a GRU's chain, written to ``out``.

    Args:
        z: the residual path, (T, B, H), of any strides.
        c: what enters from outside, (T+1, B, H), contiguous as all that follows.
        pulled: what the blocks pull back to the first T states, (T, B, H), or None in the first round.
        gains: as in `GRUBlocks`, or None in the last round.
        out: ``gains * g[1:]``, (T, B, 3, H), or ``g`` itself, (T+1, B, H).
        sizes: of the tiles.
    """
    rows, batch, hidden = c.shape
    arguments = (z, c, c if pulled is None else pulled, c if gains is None else gains, out, hidden, *z.stride())
    flags = {"PULLED": pulled is not None, "LAST": gains is None}
    launch(gru_kernel, c, rows, batch * hidden, sizes, *arguments, **flags)


def plain_gru_pass(z: Tensor, c: Tensor, pulled: Tensor | None, gains: Tensor | None, out: Tensor) -> None:
    """The definition of `gru_pass`."""
    source = c if pulled is None else torch.cat([c[:-1] + pulled, c[-1:]])
    g = BACKEND.propagate(Diagonal(z), source)
    out.copy_(g if gains is None else gains * g[1:, :, None])


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
    pulled: tl.tensor,
    gains: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    f_time: tl.tensor,
    f_batch: tl.tensor,
    f_unit: tl.tensor,
    PULLED: tl.constexpr,
    LAST: tl.constexpr,
    SUMMARY: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`lstm_pass` over a chunk, or the affine map of its scan alone; all but f is contiguous.

    With ``u[t] = dc[t] + exposed[t-1] dh[t]`` the path's part of the cotangent of c[t] obeys
    ``s[t] = f[t] s[t+1] + f[t] u[t+1]``; a scan of u itself would give that cotangent as a difference.
    """
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    chunk = tl.program_id(1)
    inside = channel < channels
    f_at = f + column(channel, hidden, f_batch, f_unit)
    pairs = column(channel, hidden, 2 * hidden, 1)
    gates = column(channel, hidden, 4 * hidden, 1)
    slot = chunk.to(tl.int64) * channels + channel
    carry = entering(carries, slot, inside, channels, SUMMARY)
    product = tl.full((WIDTH,), 1, ACC)
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
            if LAST:
                tl.store(out + pair, dc.to(out.dtype.element_ty), here)
                tl.store(out + pair + hidden, dh.to(out.dtype.element_ty), here)
            else:
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


def lstm_pass(
    f: Tensor,
    exposed: Tensor,
    c: Tensor,
    pulled: Tensor | None,
    gains: Tensor | None,
    out: Tensor,
    sizes: Blocks | None = None,
) -> None:
    """One scan of an LSTM's chain on the states (c, h), written to ``out``.

    Args:
        f: the forget gates, (T, B, H), of any strides.
        exposed: as in `LSTMBlocks`, contiguous as all that follows.
        c: what enters from outside, (T+1, B, 2, H).
        pulled: what the blocks pull back to the first T states h, (T, B, H), or None in the first round.
        gains: as in `LSTMBlocks`, or None in the last round.
        out: the cotangents of the pre-activations, (T, B, 4, H), or those of the states, (T+1, B, 2, H).
        sizes: of the tiles.
    """
    rows, batch, _, hidden = c.shape
    sources = (c, c if pulled is None else pulled, c if gains is None else gains)
    arguments = (f, exposed, *sources, out, hidden, *f.stride())
    flags = {"PULLED": pulled is not None, "LAST": gains is None}
    launch(lstm_kernel, c, rows, batch * hidden, sizes, *arguments, **flags)


def plain_lstm_pass(
    f: Tensor, exposed: Tensor, c: Tensor, pulled: Tensor | None, gains: Tensor | None, out: Tensor
) -> None:
    """The definition of `lstm_pass`."""
    source = c.clone()
    if pulled is not None:
        source[:-1, :, 1] += pulled
    left, right = torch.stack([f, exposed * f], -2), torch.stack([torch.ones_like(f), torch.zeros_like(f)], -2)
    g = BACKEND.propagate(Pair(left, right).T, source)
    if gains is not None:
        g = LSTMBlocks(gains, exposed, f).preactivations(g[1:], BACKEND)
    out.copy_(g.view(out.shape))


@torch.no_grad()
def gru_rounds(chain: LinearizedChain, c: Tensor, iterations: int, sizes: Blocks | None = None) -> Tensor:
    """Highway-BP on the chain of a `GRUPullback`: ``highway(chain, c[-1], iterations, sources=c[:-1])``.

    Args:
        chain: T steps, unbound, with the residual path diag(z).
        c: what enters at the states, (T+1, B, H).
        iterations: k; as many as there are steps are exact.
        sizes: of the tiles; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, (T+1, B, H), contiguous; no gradient passes through it.

    Raises:
        TypeError, ValueError: another chain, or a dtype, device or shape that does not fit.
    """
    _check_chain(chain, GRUBlocks, Diagonal)
    own, z = chain.pullbacks, chain.residual.arrays[0]
    gains = own.gains.contiguous()
    steps, batch, _, hidden = gains.shape
    check_shape("c", c, (steps + 1, batch, hidden))
    check_device(c, gains, own.weight, z)
    c = c.contiguous()
    fused = partial(gru_pass, z, c, sizes=sizes or blocks("gru_rounds", z))
    return _iterated(fused, c, gains, own.weight, iterations)


@torch.no_grad()
def lstm_rounds(chain: LinearizedChain, c: Tensor, iterations: int, sizes: Blocks | None = None) -> Tensor:
    """Highway-BP on the chain of an `LSTMPullback`: ``highway(chain, c[-1], iterations, sources=c[:-1])``.

    Args:
        chain: T steps, unbound, with the residual path c[t-1] -> c[t] -> h[t].
        c: what enters at the states (c, h), (T+1, B, 2, H).
        iterations: k; as many as there are steps are exact.
        sizes: of the tiles; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, (T+1, B, 2, H), contiguous; no gradient passes through it.

    Raises:
        TypeError, ValueError: another chain, or a dtype, device or shape that does not fit.
    """
    _check_chain(chain, LSTMBlocks, Pair)
    own, f = chain.pullbacks, chain.residual.arrays[0][..., 0, :]
    gains, exposed = own.gains.contiguous(), own.exposed.contiguous()
    steps, batch, _, hidden = gains.shape
    check_shape("c", c, (steps + 1, batch, 2, hidden))
    check_device(c, gains, exposed, own.weight, f)
    c = c.contiguous()
    fused = partial(lstm_pass, f, exposed, c, sizes=sizes or blocks("lstm_rounds", f))
    return _iterated(fused, c, gains, own.weight, iterations)


def _check_chain(chain: LinearizedChain, blocks: type, residual: type) -> None:
    if not isinstance(chain.pullbacks, blocks) or not isinstance(chain.residual, residual):
        given = f"{type(chain.pullbacks).__name__} and the residual {type(chain.residual).__name__}"
        raise TypeError(f"chain has {given}; these rounds take {blocks.__name__} and {residual.__name__}")


def _iterated(
    fused: Callable[..., None],
    c: Tensor,
    gains: Tensor,
    weight: Tensor,
    iterations: int,
) -> Tensor:
    """All rounds of a cell: the left side of the product and the product have one buffer each."""
    steps, batch, count, hidden = gains.shape
    rounds = min(check_count("iterations", iterations, 0), steps)
    pulled = None
    if rounds:
        left = torch.empty(gains.shape, dtype=c.dtype, device=c.device)
        product = torch.empty((steps, batch, hidden), dtype=c.dtype, device=c.device)
    for _ in range(rounds):
        fused(pulled, gains, left)
        torch.mm(left.view(steps * batch, count * hidden), weight, out=product.view(steps * batch, hidden))
        pulled = product
    g = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    fused(pulled, None, g)
    return g
