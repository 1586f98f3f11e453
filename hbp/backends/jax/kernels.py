"""Pallas kernels for CUDA devices, compiled through Triton.

A suffix scan walks backwards in time, one lane for each channel and chunk of time. With a single chunk that is the
whole solution; with more, each chunk's maps are composed into one first, the same scan solves for the values between
chunks, and a scan over all chunks at once starts from those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hbp.backends._measured import Place, settings
from hbp.backends.jax.chains import varying
from hbp.core.backend import Array, dtype_name
from hbp.core.operator import Diagonal, Identity, LinearOperator, Scalar

WIDE = {"bfloat16": "float32", "float16": "float32", "float32": "float32", "float64": "float64"}
"""The dtypes of states, and those their sums are accumulated in."""


@dataclass(frozen=True)
class Blocks:
    """The sizes that a search may choose."""

    lanes: int = 128
    """Of a program: one for each thread of its warps."""
    rows: int = 16
    """Steps whose inputs are loaded at once, while the steps before them are computed."""
    few: int = 2**14
    """Lanes below which time is split ..."""
    many: int = 2**16
    """... until there are as many (sizes of a device of 2023)."""
    shortest: int = 32
    """The least number of steps of a chunk; shorter ones cost more in carries than they save."""


GUESSED = Blocks()


def place(c: Array) -> Place:
    """Where the kernel on states ``c``, (L+1, ...), would run."""
    family = str(getattr(jax.devices()[0], "compute_capability", "")).replace(".", "")
    return Place(f"sm_{family}", dtype_name(c), len(c), prod(c.shape[1:]))


def suffix_scan(operator: LinearOperator, c: Array, sizes: Blocks | None = None, *, interpret: bool = False) -> Array:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]``, in one pass over memory.

    The contract is that of `hbp.core.scan.sequential` for `Diagonal`, `Scalar` and `Identity` bound to the states
    (`LinearOperator.bind`), under `jax.jit`, `jax.vmap` and `jax.grad` of any order; the pullback is a suffix scan
    of the reversed chain, and there is no forward mode. Where the channels are too few to fill a device, time is split
    into chunks and a chunk's product may overflow where the sequential products, applied to a carry of zero, would not.

    Args:
        operator: the L maps, in the direction they are applied.
        c: (L+1, ...), bfloat16, float16, float32 or float64. Half precision accumulates in float32 and is rounded once.
        sizes: of the programs; those measured at this size, or guesses, if not given.
        interpret: run the kernels in Pallas's interpreter, on any device and slowly.

    Raises:
        TypeError: another operator or dtype.
    """
    if dtype_name(c) not in WIDE:
        raise TypeError(f"the Pallas suffix scan takes {', '.join(WIDE)}, not {dtype_name(c)}; cast the states")
    how = _How(sizes or replace(GUESSED, **settings("jax.suffix_scan", place(c))), interpret)
    match operator:
        case Identity():
            return _solution(1.0, how, None, c)
        case Scalar(float(number)):
            return _solution(number, how, None, c)
        case Scalar(values) if hasattr(values, "shape"):
            values = values.reshape((-1,) + (1,) * (c.ndim - 1)).astype(c.dtype)
            return _solution(1.0, how, varying(values, c), varying(c, values))
        case Diagonal(values):
            values = values.astype(c.dtype)
            return _solution(1.0, how, varying(values, c), varying(c, values))
    raise TypeError(
        f"the Pallas suffix scan takes Diagonal, Scalar (a number or an array) and Identity, not "
        f"{type(operator).__name__}"
    )


@dataclass(frozen=True)
class _How:
    """How programs run."""

    sizes: Blocks
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solution(factor: float, how: _How, values: Array | None, c: Array) -> Array:
    """The solution for ``values``, (L, ...) as they broadcast, or for one number."""
    if len(c) == 1 or not c.size:
        return c
    flat, channels = c.reshape(len(c), -1), prod(c.shape[1:])
    if values is None:
        return _solve(_Maps(factor, 1, 1, how), flat).reshape(c.shape)
    spread = _spread(values.shape[1:], c.shape[1:])
    if spread is None:
        values, spread = jnp.broadcast_to(values, (len(values), *c.shape[1:])), (1, channels)
    maps = _Maps(factor, *spread, how)
    return _solve(maps, flat, values.reshape(len(values), -1)).reshape(c.shape)


def _forward(factor: float, how: _How, values: Array | None, c: Array) -> tuple[Array, Any]:
    g = _solution(factor, how, values, c)
    return g, (values, g)


def _backward(factor: float, how: _How, kept: Any, cotangent: Array) -> tuple[Array | None, Array]:
    values, g = kept
    backwards = None if values is None else jnp.flip(values, 0)
    dc = jnp.flip(_solution(factor, how, backwards, jnp.flip(cotangent, 0)), 0)
    if values is None:
        return None, dc
    wide = WIDE[dtype_name(g)]
    products = dc[:-1].astype(wide) * g[1:].astype(wide)
    shared = [axis for axis, size in enumerate(values.shape) if size == 1 and products.shape[axis] != 1]
    return products.sum(shared, keepdims=True).astype(values.dtype), dc


_solution.defvjp(_forward, _backward)


def _spread(own: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """``(d, m)`` such that channel n of states of this shape has value n // d % m, or None where there is no such."""
    full = [axis for axis, size in enumerate(own) if size != 1]
    if not full:
        return 1, 1
    first, last = full[0], full[-1] + 1
    return (prod(shape[last:]), prod(own)) if own[first:last] == shape[first:last] else None


@dataclass(frozen=True)
class _Maps:
    """How the maps ``v -> a v + c`` of all channels are read."""

    factor: float
    """Every a, where no values are given."""
    divisor: int
    modulus: int
    """Channel n has value n // divisor % modulus."""
    how: _How


def _solve(maps: _Maps, c: Array, *values: Array) -> Array:
    """The solution for ``c``, (L+1, channels)."""
    length, channels = len(c) - 1, c.shape[1]
    chunk = _chunk(length, channels, maps.how.sizes)
    chunks = -(-length // chunk)
    if chunks == 1:
        return _launch(_scan, _Walk(maps, length, channels, chunk, 1), [_like(c)], c, *values)[0]
    wide = WIDE[dtype_name(c)]
    summary = _like(c, (chunks - 1, channels), wide)
    later = _Walk(maps, length, channels, chunk, chunks - 1, skipped=1)
    products, offsets = _launch(_summaries, later, [summary, summary], c, *values)
    between = _Maps(1.0, 1, channels, maps.how)
    carries = _solve(between, jnp.concatenate([offsets, c[-1:].astype(wide)]), products)
    walk = _Walk(maps, length, channels, chunk, chunks)
    return _launch(partial(_scan, carried=True), walk, [_like(c)], c, *values, carries)[0]


def _like(c: Array, shape: tuple[int, ...] | None = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """A result that varies over the same mesh axes of a `jax.shard_map` as ``c`` does."""
    kind: Any = jax.typeof(c) if hasattr(jax, "typeof") else None
    if hasattr(kind, "mat"):
        marks = {"manual_axis_type": kind.mat}
    else:
        marks = {"vma": kind.vma} if hasattr(kind, "vma") else {}
    return jax.ShapeDtypeStruct(shape or c.shape, dtype or c.dtype, **marks)


def _chunk(length: int, channels: int, sizes: Blocks) -> int:
    """The number of steps that one lane takes: all of them where there are channels enough."""
    if channels >= sizes.few or length < 4 * sizes.shortest:
        return length
    return max(-(-length // -(-sizes.many // channels)), sizes.shortest)


@dataclass(frozen=True)
class _Walk:
    """Lanes for each channel and each of some chunks of time."""

    maps: _Maps
    length: int
    channels: int
    chunk: int
    chunks: int
    skipped: int = 0
    """Chunks before the first of them."""

    def lanes(self) -> tuple[Array, Array, Array]:
        """Each lane's row among the chunks and channel of the states, and whether there is such a lane."""
        lanes = self.maps.how.sizes.lanes
        lane = pl.program_id(0) * lanes + jnp.arange(lanes, dtype=jnp.int32)
        valid = lane < self.channels * self.chunks
        row = lane // self.channels if self.chunks > 1 else jnp.zeros_like(lane)
        return row, lane - row * self.channels, valid

    def backwards(self, refs: Any, visit: Callable[..., Any], state: Any) -> Any:
        """``state = visit(state, time, inside, a, c)`` over the maps of each lane's chunk, from its end.

        The next rows are loaded while those before them are visited.
        """
        c, *values = refs
        wide = WIDE[dtype_name(c)]
        row, channel, valid = self.lanes()
        stop = (row + self.skipped + 1) * self.chunk
        place = channel // self.maps.divisor % self.maps.modulus
        rows = self.maps.how.sizes.rows
        tiles, odd = divmod(self.chunk, rows)

        def times(step: Any, count: int) -> list[tuple[Array, Array]]:
            short = self.length % self.chunk != 0  # the last chunk
            every = [stop - (step + k + 1) for k in range(count)]
            return [(time, valid & (time < self.length) if short else valid) for time in every]

        def load(step: Any, count: int) -> list[tuple[Array, Array]]:
            found = []
            for time, inside in times(step, count):
                factor = jnp.where(inside, jnp.asarray(self.maps.factor, wide), 1)
                a = _load(values[0], time, place, inside, 1).astype(wide) if values else factor
                found.append((a, _load(c, time, channel, inside, 0).astype(wide)))
            return found

        def through(state: Any, step: Any, loaded: list[tuple[Array, Array]]) -> Any:
            for where, entries in zip(times(step, len(loaded)), loaded, strict=True):
                state = visit(state, *where, *entries)
            return state

        def body(tile: Any, carried: Any) -> Any:
            state, loaded = carried
            following = load(odd + jnp.minimum(tile + 1, tiles - 1) * rows, rows)
            return through(state, odd + tile * rows, loaded), following

        rest, first = load(0, odd), load(odd, rows) if tiles else []
        state = through(state, 0, rest)
        return jax.lax.fori_loop(0, tiles, body, (state, first))[0] if tiles else state


def _scan(walk: _Walk, *refs: Any, carried: bool = False) -> None:
    """Each chunk's part of the solution, from the values that enter the chunks or from ``c[L]``."""
    *inputs, g = refs
    carries = inputs.pop() if carried else None
    row, channel, valid = walk.lanes()
    last = valid & (row == walk.chunks - 1)
    end = jnp.where(last, walk.length, walk.length + 1)  # the interpreter writes masked entries as they were
    if carries is None:
        carry = _load(inputs[0], end, channel, valid, 0).astype(WIDE[dtype_name(g)])
    else:
        carry = _load(carries, row, channel, valid, 0)
    _store(g, end, channel, last, carry)

    def visit(carry: Array, time: Array, inside: Array, a: Array, offset: Array) -> Array:
        carry = a * carry + offset
        _store(g, time, channel, inside, carry)
        return carry

    walk.backwards(inputs, visit, carry)


def _summaries(walk: _Walk, *refs: Any) -> None:
    """The composed map of each chunk: a product and an offset."""
    *inputs, products, offsets = refs
    row, channel, valid = walk.lanes()

    def visit(state: Any, _time: Array, _inside: Array, a: Array, offset: Array) -> Any:
        return state[0] * a, state[1] * a + offset

    lanes = walk.maps.how.sizes.lanes
    start = jnp.ones(lanes, products.dtype), jnp.zeros(lanes, products.dtype)
    product, offset = walk.backwards(inputs, visit, start)
    _store(products, row, channel, valid, product)
    _store(offsets, row, channel, valid, offset)


def _load(ref: Any, row: Array, column: Array, mask: Array, other: float) -> Array:
    return triton.load(ref.at[row, column], mask=mask, other=jnp.asarray(other, ref.dtype))


def _store(ref: Any, row: Array, column: Array, mask: Array, value: Array) -> None:
    triton.store(ref.at[row, column], value.astype(ref.dtype), mask=mask)


def _launch(kernel: Callable[..., None], walk: _Walk, out: list[jax.ShapeDtypeStruct], *arrays: Array) -> Any:
    def run(*refs: Any) -> None:
        kernel(walk, *refs)

    lanes = walk.maps.how.sizes.lanes
    call = pl.pallas_call(
        run,
        out,
        grid=(-(-walk.channels * walk.chunks // lanes),),
        interpret=walk.maps.how.interpret,
        name="suffix_scan",  # to profilers
        compiler_params=triton.CompilerParams(num_warps=lanes // 32),
    )
    return call(*arrays)
