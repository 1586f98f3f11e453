"""The suffix scan of diagonal maps in one pass over memory.

A program owns a block of channels and walks time backwards in tiles: a tile is solved by an associative scan, and
what leaves it enters the tile before. Where the channels are too few to fill the device, time is cut into chunks as
well: a first pass reduces each chunk to one affine map ``v -> product v + offset``, a short scan of these maps finds
what enters each chunk at its end, and the walk starts from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from hbp.backends._measured import settings
from hbp.backends.torch.array import place
from hbp.core.operator import Diagonal, Identity, LinearOperator, Scalar

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHORTEST = 16
"""Rows of a tile at least, for how its numbers are dealt to threads."""
SECTOR = 32
"""Bytes of the smallest access to memory: a narrower row of a tile would read numbers that it does not use."""
WORTH = 3
"""Chunks from which on a cut pays: its first pass reads everything once more."""


@triton.jit
def compose(later_product: tl.tensor, later_offset: tl.tensor, product: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """The affine map of a run of steps from those of its later and its earlier part."""
    return product * later_product, product * later_offset + offset


@triton.jit
def first(tile: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The first row of a tile."""
    return tl.sum(tl.where(row[:, None] == 0, tile, 0), 0)


@triton.jit
def column(channel: tl.tensor, inner: tl.tensor, outer_stride: tl.tensor, inner_stride: tl.tensor) -> tl.tensor:
    """Offsets of channels that lie along two strided axes; 64 bits, since a tensor may be larger than 32 address."""
    return (channel // inner).to(tl.int64) * outer_stride + (channel % inner).to(tl.int64) * inner_stride


@triton.jit
def entering(
    carries: tl.tensor, slot: tl.tensor, inside: tl.tensor, channels: tl.tensor, SUMMARY: tl.constexpr
) -> tl.tensor:
    """What enters a chunk at its end: nothing from behind the last one, nothing either where the chunk is reduced."""
    known = 0 if SUMMARY else (tl.num_programs(1) - 1) * channels
    return tl.load(carries + slot, inside & (slot < known), other=0)


@triton.jit(do_not_specialize=["rows", "tiles"])
def scan_kernel(
    carries: tl.tensor,
    products: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    c: tl.tensor,
    a: tl.tensor,
    g: tl.tensor,
    inner: tl.tensor,
    c_time: tl.tensor,
    c_outer: tl.tensor,
    c_inner: tl.tensor,
    a_time: tl.tensor,
    a_outer: tl.tensor,
    a_inner: tl.tensor,
    SUMMARY: tl.constexpr,
    ACC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """``g[i] = a[i] g[i+1] + c[i]`` over a chunk, or its affine map alone."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    chunk = tl.program_id(1)
    inside = channel < channels
    c_at = c + column(channel, inner, c_outer, c_inner)
    a_at = a + column(channel, inner, a_outer, a_inner)
    slot = chunk.to(tl.int64) * channels + channel
    carry = entering(carries, slot, inside, channels, SUMMARY)
    product = tl.full((WIDTH,), 1, ACC)
    local = tl.arange(0, HEIGHT)
    for tile in range(tiles):
        row = ((chunk + 1) * tiles - 1 - tile) * HEIGHT + local
        time = row.to(tl.int64)[:, None]
        here = (row < rows)[:, None] & inside[None, :]
        before_last = (row < rows - 1)[:, None] & inside[None, :]
        factor = tl.load(a_at[None, :] + time * a_time, before_last, other=1).to(ACC)
        source = tl.load(c_at[None, :] + time * c_time, here, other=0).to(ACC)
        composed, solved = tl.associative_scan((factor, source), 0, compose, reverse=True)
        solved += composed * carry[None, :]
        carry = first(solved, local)
        if SUMMARY:
            product *= first(composed, local)
        else:
            tl.store(g + channel[None, :] + time * channels, solved.to(g.dtype.element_ty), here)
    if SUMMARY:
        tl.store(carries + slot, carry, inside)
        tl.store(products + slot, product, inside)


@dataclass(frozen=True)
class Blocks:
    """The sizes that a search may choose."""

    tile: int = 2048
    """Numbers in a tile: 16 for each thread of 4 warps, all requested from memory before the first is needed."""
    widest: int = 64
    """Channels of a tile at most."""
    waves: int = 2
    """Programs for each processor, below which time is cut."""
    warps: int = 4


GUESSED = Blocks()


@dataclass(frozen=True)
class Cut:
    """How the rows and channels of a scan are dealt to programs."""

    height: int
    """Rows of a tile."""
    width: int
    """Channels of a tile."""
    blocks: int
    """Blocks of channels."""
    tiles: int
    """Tiles of a chunk, from its end to its start."""
    chunks: int
    """Chunks of time."""
    warps: int
    """Groups of 32 threads in a program."""

    @classmethod
    def of(cls, rows: int, channels: int, itemsize: int, processors: int, sizes: Blocks | None = None) -> Cut:
        """Narrow tiles before chunks: as many programs as the device wants, if there are; 0 asks for one chunk."""
        sizes = sizes or GUESSED
        width = min(sizes.widest, triton.next_power_of_2(channels))
        while width > SECTOR // itemsize and triton.cdiv(channels, width) < sizes.waves * processors:
            width //= 2
        blocks = triton.cdiv(channels, width)
        height = min(sizes.tile // width, max(triton.next_power_of_2(rows), SHORTEST))
        tiles = triton.cdiv(rows, height)
        chunks = min(sizes.waves * processors // blocks, tiles)
        each = triton.cdiv(tiles, chunks) if chunks >= WORTH else tiles
        return cls(height, width, blocks, each, triton.cdiv(tiles, each), sizes.warps)

    @property
    def programs(self) -> int:
        """The number of programs."""
        return self.blocks * self.chunks

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a kernel is compiled with, for tensors of this dtype."""
        return {"HEIGHT": self.height, "WIDTH": self.width, "num_warps": self.warps, **precision(dtype)}


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """How a kernel computes with numbers of this dtype."""
    # Fused multiply-adds round once; Triton 3.9 warns where that is left to its default.
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "enable_fp_fusion": True}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cut_of(like: Tensor, rows: int, channels: int, sizes: Blocks | None) -> Cut:
    """How a scan on a tensor's device, in its dtype, is dealt to programs."""
    return Cut.of(rows, channels, like.element_size(), processors(like.device), sizes)


def blocks(name: str, like: Tensor) -> Blocks:
    """The block sizes measured for a kernel at this size, or the guesses."""
    return replace(GUESSED, **settings(f"torch.{name}", place(like)))


def launch(
    kernel: Any, like: Tensor, rows: int, channels: int, sizes: Blocks | None, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel over all rows and channels of a scan, in one pass or, where time is cut, in three.

    Args:
        kernel: has the parameters of `scan_kernel` up to ``tiles``, and its four constants.
        like: a tensor of the dtype and on the device of the scan.
        rows: L + 1.
        channels: the numbers in one state.
        sizes: of its tiles.
        arguments: the kernel's parameters after ``tiles``.
        constants: its further constants.
    """
    if not rows * channels:
        return
    cut = cut_of(like, rows, channels, sizes)
    maps = (2, cut.chunks, channels) if cut.chunks > 1 else (2, 1, 1)
    offsets, factors = torch.empty(maps, dtype=wide(like.dtype), device=like.device).unbind()
    constants |= cut.constants(like.dtype)
    run = kernel[(cut.blocks, cut.chunks)]
    with torch.cuda.device_of(like):
        carries = offsets
        if cut.chunks > 1:
            run(offsets, factors, rows, channels, cut.tiles, *arguments, SUMMARY=True, **constants)
            carries = _between(factors[1:-1], offsets[1:], sizes)
        run(carries, factors, rows, channels, cut.tiles, *arguments, SUMMARY=False, **constants)


def _between(factors: Tensor, offsets: Tensor, sizes: Blocks | None) -> Tensor:
    """What enters each chunk but the last at its end, from the affine maps of all but the first."""
    rows, channels = offsets.shape
    carries = torch.empty_like(offsets)
    cut = Cut.of(rows, channels, offsets.element_size(), 0, sizes)
    strides = (channels, channels, 1)
    arguments = (offsets, factors, carries, channels, *strides, *strides)
    constants = cut.constants(offsets.dtype)
    scan_kernel[(cut.blocks, 1)](offsets, factors, rows, channels, cut.tiles, *arguments, SUMMARY=False, **constants)
    return carries


@torch.no_grad()
def suffix_scan(operator: LinearOperator, c: Tensor, sizes: Blocks | None = None) -> Tensor:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]`` for `Diagonal`, `Scalar` and `Identity`.

    The contract of `hbp.backends._array.ArrayBackend.suffix_scan`, in half precision too: sums are in float32 there,
    in the dtype of ``c`` otherwise, and rounded once. Products of maps are formed first, as in every parallel scan:
    where they overflow, so does the result, even if the sequential recursion would not.

    Args:
        operator: L maps.
        c: (L+1, ...), of any strides.
        sizes: of the tiles; those measured at this size, or guesses, if not given.

    Returns:
        ``g``, contiguous; no gradient passes through it.

    Raises:
        TypeError: another operator or dtype.
        ValueError: another device, or shapes that do not fit.
    """
    check_device(c)
    values = _values(operator, c)
    rows, channels = len(c), c[0].numel()
    c, values, axes = _aligned(c, values)
    (inner, *inner_strides), (_, *outer_strides) = axes[-1], (axes[-2] if len(axes) > 1 else (1, 0, 0))
    strides = [(x.stride(0), outer_strides[i], inner_strides[i]) for i, x in enumerate((c, values))]
    g = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    sizes = sizes or blocks("suffix_scan", c)
    launch(scan_kernel, c, rows, channels, sizes, c, values, g, inner, *strides[0], *strides[1])
    return g


def check_device(*tensors: Tensor) -> None:
    """Check that the kernels take tensors of this dtype and device, the same for all.

    Raises:
        TypeError: a dtype that they do not take, or several.
        ValueError: not a CUDA device, or several.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in DTYPES or any(x.dtype != dtype for x in tensors):
        names = ", ".join(dict.fromkeys(str(x.dtype) for x in tensors))
        raise TypeError(f"the tensors are {names}; the Triton kernels take one of {', '.join(map(str, DTYPES))}")
    compiled = isinstance(scan_kernel, JITFunction)
    if (compiled and device.type != "cuda") or any(x.device != device for x in tensors):
        names = ", ".join(dict.fromkeys(str(x.device) for x in tensors))
        raise ValueError(
            f"the tensors are on {names}; the Triton kernels take tensors on one CUDA device (and on the CPU where "
            "TRITON_INTERPRET=1 was set before triton was imported)"
        )


def _values(operator: LinearOperator, c: Tensor) -> Tensor:
    """The diagonals of the maps as they broadcast, (L, ...)."""
    if c.ndim == 0 or not len(c):
        raise ValueError(f"c has shape {tuple(c.shape)}; give one entry per state, (L+1, ...)")
    shape = (len(c) - 1, *c.shape[1:])
    if not isinstance(operator, Diagonal | Scalar | Identity) or isinstance(getattr(operator, "value", 0), tuple):
        raise TypeError(f"operator is a {type(operator).__name__}; give a bound Diagonal, Scalar or Identity")
    if not operator.arrays:
        number = operator.value if isinstance(operator, Scalar) else 1.0
        return torch.full((1,), number, dtype=wide(c.dtype), device=c.device).expand(shape)
    values = operator.arrays[0]
    check_device(c, values)
    trailing = values.shape[1:]
    fits = all(own in (1, full) for own, full in zip(trailing[::-1], shape[:0:-1], strict=False))
    if values.ndim > c.ndim or len(values) != shape[0] or not fits:
        raise ValueError(f"values have shape {tuple(values.shape)}; expected one that broadcasts to {shape}")
    return values.reshape((shape[0],) + (1,) * (c.ndim - values.ndim) + trailing).expand(shape)


def _aligned(c: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Sequence[tuple[int, ...]]]:
    """Both with two axes of channels at most, copied only where their strides have no such form."""
    if len(_axes(c, values)) > 2:
        c = c.contiguous()
    if len(_axes(c, values)) > 2:
        values = values.contiguous()
    return c, values, _axes(c, values)


def _axes(c: Tensor, values: Tensor) -> Sequence[tuple[int, ...]]:
    """The axes after the first, neighbours merged where the strides of both allow it: size, strides of both."""
    merged = [(1, 1, 1)]
    for size, *strides in zip(c.shape[1:], c.stride()[1:], values.stride()[1:], strict=True):
        last, *outer = merged[-1]
        if last == 1 or size == 1:
            merged[-1] = merged[-1] if size == 1 else (size, *strides)
        elif outer == [size * stride for stride in strides]:
            merged[-1] = (last * size, *strides)
        else:
            merged.append((size, *strides))
    return merged
