"""CUDA kernels for CuPy's arrays, compiled when first used and cached by CuPy on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import cupy

from hbp.backends._measured import Place, settings
from hbp.core.backend import Array, dtype_name
from hbp.core.operator import Diagonal, Identity, LinearOperator, Scalar

WIDE = {"float16": "float32", "float32": "float32", "float64": "float64"}
"""The dtypes of states, and those their sums are accumulated in."""


@dataclass(frozen=True)
class Blocks:
    """The sizes that a search may choose."""

    threads: int = 128
    """Of a block."""
    few: int = 128
    """Threads per multiprocessor below which time is split ..."""
    many: int = 512
    """... until there are as many."""
    shortest: int = 32
    """The least number of steps of a chunk; shorter ones cost more in carries than they save."""


GUESSED = Blocks()


def place(c: Array) -> Place:
    """Where the kernel on states ``c``, (L+1, ...), would run."""
    return Place(f"sm_{cupy.cuda.Device().compute_capability}", dtype_name(c), len(c), prod(c.shape[1:]))


def suffix_scan(operator: LinearOperator, c: Array, sizes: Blocks | None = None) -> Array:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]``, in one pass over memory.

    The contract is that of `hbp.core.scan.sequential` for `Diagonal`, `Scalar` and `Identity` bound to the states
    (`LinearOperator.bind`), on the current device. Where the channels are too few to fill the device, the scan over
    chunks of time takes three passes (the reduce-then-scan of Blelloch, 1990). A chunk's product may then overflow
    where the sequential products, applied to a carry of zero, would not.

    Args:
        operator: the L maps, in the direction they are applied.
        c: (L+1, ...), float16, float32 or float64, of any memory layout. float16 accumulates in float32 and is rounded
            once.
        sizes: of the blocks; those measured at this size, or guesses, if not given.

    Raises:
        TypeError: another operator or dtype.
    """
    if dtype_name(c) not in WIDE:
        raise TypeError(f"the CUDA suffix scan takes {', '.join(WIDE)}, not {dtype_name(c)}; cast the states")
    values, factor = _values(operator, c)
    g = cupy.empty(c.shape, c.dtype)
    if c.size:
        sizes = sizes or replace(GUESSED, **settings("cupy.suffix_scan", place(c)))
        _solve(_channels(values, factor, c), g, sizes)
    return g


def _values(operator: LinearOperator, c: Array) -> tuple[Array | None, float]:
    """The maps as an array like ``c[:-1]``, or as one number."""
    match operator:
        case Identity():
            return None, 1.0
        case Scalar(float(number)):
            return None, number
        case Scalar(values) if hasattr(values, "shape"):
            values = values.reshape((-1,) + (1,) * (c.ndim - 1))
        case Diagonal(values):
            pass
        case _:
            raise TypeError(
                f"the CUDA suffix scan takes Diagonal, Scalar (a number or an array) and Identity, not "
                f"{type(operator).__name__}"
            )
    return cupy.broadcast_to(values.astype(c.dtype, copy=False), (len(c) - 1, *c.shape[1:])), 1.0


@dataclass(frozen=True)
class _Maps:
    """The maps of independent channels, as the kernels read them."""

    values: Array | None
    factor: float
    offsets: Array
    sizes: tuple[int, int]
    """Those of the outer and inner axis that all axes but time collapse into."""
    strides: tuple[int, ...]
    """In elements: time, outer and inner, of the values and then of the offsets."""

    @property
    def length(self) -> int:
        return len(self.offsets) - 1

    @property
    def channels(self) -> int:
        return prod(self.sizes)

    def arguments(self, chunk: int) -> tuple[Any, ...]:
        values = 0 if self.values is None else self.values  # CuPy would pass None as no argument at all
        return (values, self.offsets, self.factor, *self.strides, self.length, self.channels, self.sizes[1], chunk)


def _channels(values: Array | None, factor: float, c: Array) -> _Maps:
    """``values`` and ``c`` without a copy where two axes are enough to walk through their channels."""
    arrays = [c] if values is None else [values, c]
    sizes, strides = _collapsed(arrays)
    if len(sizes) > 2:
        arrays = [cupy.ascontiguousarray(array) for array in arrays]
        sizes, strides = _collapsed(arrays)
    time = [array.strides[0] // array.itemsize for array in arrays]
    padding = (1,) * (2 - len(sizes))
    entries = [(t, *(0 for _ in padding), *own) for t, own in zip(time, strides, strict=True)]
    if values is None:
        entries.insert(0, (0, 0, 0))
    outer, inner = (*padding, *sizes)
    return _Maps(None if values is None else arrays[0], factor, arrays[-1], (outer, inner), (*entries[0], *entries[1]))


def _collapsed(arrays: Sequence[Array]) -> tuple[list[int], list[list[int]]]:
    """The sizes and each array's strides of as few axes as hold all but axis 0 in order."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in arrays]
    for axis in range(1, arrays[0].ndim):
        size = arrays[0].shape[axis]
        steps = [array.strides[axis] // array.itemsize for array in arrays]
        if size == 1:
            continue
        if sizes and all(own[-1] == step * size for own, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for own, step in zip(strides, steps, strict=True):
                own[-1] = step
        else:
            sizes.append(size)
            for own, step in zip(strides, steps, strict=True):
                own.append(step)
    return sizes, strides


def _solve(maps: _Maps, g: Array, sizes: Blocks) -> None:
    """Write the solution into ``g``, contiguous."""
    chunk = _chunk(maps.length, maps.channels, sizes)
    chunks = -(-maps.length // chunk)
    if chunks <= 1:
        _launch("scan", maps, chunk, 1, sizes.threads, 0, g)
        return
    wide = WIDE[dtype_name(maps.offsets)]
    products = cupy.empty((chunks - 1, maps.channels), wide)
    offsets = cupy.empty((chunks, maps.channels), wide)
    carries = cupy.empty((chunks, maps.channels), wide)
    _launch("summaries", maps, chunk, chunks - 1, sizes.threads, products, offsets)
    _solve(_channels(products, 1.0, offsets), carries, sizes)
    _launch("scan", maps, chunk, chunks, sizes.threads, carries, g)


def _chunk(length: int, channels: int, sizes: Blocks) -> int:
    """The number of steps that one thread takes: all of them where there are channels enough."""
    processors: int = cupy.cuda.Device().attributes["MultiProcessorCount"]
    if channels >= sizes.few * processors or length < 4 * sizes.shortest:
        return max(length, 1)
    chunks = -(-sizes.many * processors // channels)
    return max(-(-length // chunks), sizes.shortest)


def _launch(name: str, maps: _Maps, chunk: int, chunks: int, threads: int, *arguments: Any) -> None:
    kernel = _kernel(f"{name}_{dtype_name(maps.offsets)}", cupy.cuda.Device().id)
    blocks = -(-maps.channels * chunks // threads)
    kernel((blocks,), (threads,), (*maps.arguments(chunk), *arguments))


@cache
def _kernel(name: str, device: int) -> Any:  # noqa: ARG001 - a loaded kernel belongs to one device
    """One kernel, compiled."""
    code = Path(__file__).with_name("scan.cu").read_text()
    return cupy.RawModule(code=code, options=("-std=c++17",)).get_function(name)
