"""Linearised chains: layers x[i+1] = layer_i(x[i]) reduced to their pullbacks and residual maps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Self

from hbp.core.backend import Array, Backend, check_count, check_kind, check_shape, dtype_name
from hbp.core.joining import concatenate, one_each
from hbp.core.operator import Identity, LinearOperator, Zero
from hbp.core.pullbacks import PullbackList, Pullbacks

IDENTITY = Identity()


@dataclass(frozen=True, eq=False)
class LinearizedChain(Pullbacks):
    """A chain of L layers at a point: the pullbacks of its blocks, ``B[i]^T``, and its residual maps ``R[i]``.

    It is itself the pullbacks of its whole layers, ``(R[i] + B[i])^T``.

    Args:
        pullbacks: one callable per block (cotangent -> cotangent of the same shape), or a `Pullbacks`.
        residual: a stack of L maps, in forward orientation.

    >>> from hbp.core.operator import Scalar
    >>> chain = LinearizedChain([lambda g: 0.5 * g, lambda g: 0.25 * g], Scalar(0.9))
    >>> len(chain), len(chain.coarsen(2))
    (2, 1)
    """

    pullbacks: Any
    residual: LinearOperator = IDENTITY
    state: tuple[tuple[int, ...], str] | None = None
    """The shape and dtype of the states, where known."""

    def __post_init__(self) -> None:
        if isinstance(self.pullbacks, Sequence):
            for i, pullback in enumerate(self.pullbacks):
                check_kind(f"pullback {i}", pullback, Callable, "a callable")
            object.__setattr__(self, "pullbacks", PullbackList(self.pullbacks, range(len(self.pullbacks))))
        check_kind("residual", self.residual, LinearOperator, "an operator, as Identity()")
        if not all(hasattr(self.pullbacks, name) for name in ("__len__", "__getitem__", "at")):
            raise TypeError(f"pullbacks is a {type(self.pullbacks).__name__}; give a list of callables, one per block")
        self.residual.check_length(len(self))

    @property
    def traceable(self) -> bool:  # type: ignore[override]
        return bool(self.pullbacks.traceable)

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> LinearizedChain:
        check_kind("an index", index, slice, "chain[i:j]: a chain is cut by slices")
        if index.step is not None and check_count("a slice's step", index.step, -sys.maxsize) < 1:
            raise ValueError(f"a chain is cut in its own order, by slices of a positive step, not of {index.step}")
        return replace(self, pullbacks=self.pullbacks[index], residual=self.residual[index])

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        return self.residual.T.mv(cotangents) + self.pullbacks(cotangents, backend)

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self.residual[i].T.mv(cotangent) + self.pullbacks.at(i, cotangent, backend)

    def pull_blocks(self, g: Array, backend: Backend) -> Array:
        """``B[i]^T g[i]`` for all i at once, shapes (L, ...)."""
        return self.pullbacks(g, backend)

    def bind(self, like: Array, backend: Backend) -> Self:
        if self.state is not None:
            shape, dtype = self.state
            check_shape("the cotangent, as the chain's states,", like, shape)
            if dtype_name(like) != dtype:
                raise TypeError(f"the cotangent is {dtype_name(like)} and the chain's states are {dtype}; cast it")
        inner = self.pullbacks.bind(like, backend) if isinstance(self.pullbacks, Pullbacks) else self.pullbacks
        return replace(self, pullbacks=inner, residual=self.residual.bind(len(self), like, backend))

    def resplit(self, residual: LinearOperator) -> LinearizedChain:
        """The same layers under another split: the block is whatever ``residual`` leaves of each layer."""
        return LayerChain(self, residual, self.state)

    def coarsen(self, size: int) -> LinearizedChain:
        """The chain of stages of ``size`` consecutive layers (the last may be shorter).

        A stage is one layer: its residual map is the product of its layers' maps, its pullback exact backprop
        through them.
        """
        size = min(check_count("chunk", size, 1), max(len(self), 1))
        if size == 1:
            return self
        maps = Composed(self.residual, len(self), size, size)
        return LayerChain(Stages(self, size, size), maps, self.state)


@dataclass(frozen=True, eq=False)
class LayerChain(LinearizedChain):
    """A chain whose pullbacks are those of whole layers: a block's is what the residual map leaves of it."""

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        return self.pullbacks(cotangents, backend)

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self.pullbacks.at(i, cotangent, backend)

    def pull_blocks(self, g: Array, backend: Backend) -> Array:
        whole = self.pullbacks(g, backend)
        return whole if isinstance(self.residual, Zero) else whole - self.residual.T.mv(g)


@dataclass(frozen=True, eq=False)
class Stages(Pullbacks):
    """The pullbacks of stages of ``size`` layers that start at layers 0, stride, 2 stride, ... of a chain.

    Each is exact backprop through its layers, for all stages at once.
    """

    chain: LinearizedChain
    size: int
    stride: int

    def __len__(self) -> int:
        return -(-len(self.chain) // self.stride)

    def __getitem__(self, index: slice) -> Stages:
        layers, step = _layers_of(index, len(self), self.stride)
        return Stages(self.chain[layers], self.size, step)

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        *_, g = self.sweep(cotangents, None, backend)
        return g

    def bind(self, like: Array, backend: Backend) -> Stages:
        return replace(self, chain=self.chain.bind(like, backend))

    def sweep(self, cotangents: Array, sources: Array | None, backend: Backend) -> Iterator[Array]:
        """Exact backprop from the ends of all stages to their starts.

        Yields, for j = S-1, ..., 0, the cotangents of the states ``x[s S + j]`` of all stages s; where the last
        stage is too short to have that state, its entry stays the cotangent of its end.
        """
        g = cotangents
        for j in reversed(range(self.size)):
            layers = self.chain[j :: self.stride]
            moved = layers(g[: len(layers)], backend) if len(layers) else g[:0]
            if sources is not None:
                moved = moved + sources[j :: self.stride]
            g = moved if len(layers) == len(self) else backend.concat([moved, g[len(layers) :]])
            yield g


@dataclass(frozen=True, eq=False)
class Composed(LinearOperator):
    """The composed maps of the stages of `Stages`, which are multiplied when they are bound."""

    maps: LinearOperator
    count: int
    """The number of layers."""
    size: int
    stride: int

    def __post_init__(self) -> None:
        """Made by `coarsen` alone."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.maps.arrays

    def check_length(self, length: int) -> None:
        self.maps.check_length(self.count)

    def __getitem__(self, index: slice) -> Composed:
        layers, step = _layers_of(index, -(-self.count // self.stride), self.stride)
        return Composed(self.maps[layers], len(range(self.count)[layers]), self.size, step)

    def bind(self, length: int, like: Array, backend: Backend) -> LinearOperator:
        maps, size, stride = self.maps.bind(self.count, like, backend), self.size, self.stride
        product: Any = partial(reduce, lambda first, second: second @ first)
        last = (-(-self.count // stride) - 1) * stride
        if last + size <= self.count:  # the last stage is complete
            return product(maps[j::stride] for j in range(size))  # type: ignore[no-any-return]
        maps = one_each(maps, self.count, like, backend)
        complete = product(maps[j:last:stride] for j in range(size))
        return concatenate(complete, product(maps[i : i + 1] for i in range(last, self.count)), backend)


def _layers_of(index: slice, count: int, stride: int) -> tuple[slice, int]:
    """The layers of a slice of ``count`` stages, and the new stride."""
    start, stop, step = index.indices(count)
    return slice(start * stride, stop * stride), step * stride
