"""Linearised chains: layers x[i+1] = layer_i(x[i]) reduced to their pullbacks and residual maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from hbp.core.backend import Array, Backend, check_count, check_shape, dtype_name
from hbp.core.joining import concatenate
from hbp.core.operator import Identity, LinearOperator, Zero
from hbp.core.pullbacks import PullbackList
from hbp.core.registry import backend_of, load, resolve

IDENTITY = Identity()


@dataclass(frozen=True, eq=False)
class LinearizedChain:
    """A chain of L layers at a point: the pullbacks of its blocks, ``B[i]^T``, and its residual maps ``R[i]``.

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
                if not callable(pullback):
                    raise TypeError(f"pullback {i} is a {type(pullback).__name__}; give a callable")
            object.__setattr__(self, "pullbacks", PullbackList(self.pullbacks, range(len(self.pullbacks))))
        if not isinstance(self.residual, LinearOperator):
            raise TypeError(
                f"residual is a {type(self.residual).__name__}; give an operator: Identity(), Scalar(...), "
                "Diagonal(...), Dense(...) or Zero()"
            )
        if not all(hasattr(self.pullbacks, name) for name in ("__len__", "__getitem__", "at")):
            raise TypeError(f"pullbacks is a {type(self.pullbacks).__name__}; give a list of callables, one per block")
        if self.residual.length not in (None, len(self)):
            raise ValueError(
                f"the residual {type(self.residual).__name__} has {self.residual.length} maps and the chain "
                f"{len(self)} layers; give one map per layer"
            )

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> LinearizedChain:
        if not isinstance(index, slice):
            raise TypeError(f"a chain is cut by slices, chain[i:j], not by a {type(index).__name__}")
        return replace(self, pullbacks=self.pullbacks[index], residual=self.residual[index])

    def bind(self, like: Array, backend: Backend) -> LinearizedChain:
        """This chain, checked against states like ``like``, its residual maps aligned (`LinearOperator.bind`)."""
        if self.state is not None:
            shape, dtype = self.state
            check_shape("the cotangent, as the chain's states,", like, shape)
            if dtype_name(like) != dtype:
                raise TypeError(f"the cotangent is {dtype_name(like)} and the chain's states are {dtype}; cast it")
        inner = (
            self.pullbacks.bind(like, backend)
            if isinstance(self.pullbacks, LayerPullbacks | Stages)
            else self.pullbacks
        )
        return replace(self, pullbacks=inner, residual=self.residual.bind(len(self), like, backend))

    def pull_blocks(self, g: Array, backend: Backend) -> Array:
        """``B[i]^T g[i]`` for all i at once, shapes (L, ...)."""
        return self.pullbacks(g, backend)

    def pull_layers(self, g: Array, backend: Backend) -> Array:
        """``(R[i] + B[i])^T g[i]`` for all i at once, shapes (L, ...)."""
        return self.residual.T.mv(g) + self.pullbacks(g, backend)

    def pull_layer(self, i: Any, g: Array, backend: Backend) -> Array:
        """``(R[i] + B[i])^T g`` for one layer."""
        return self.residual[i].T.mv(g) + self.pullbacks.at(i, g, backend)

    def resplit(self, residual: LinearOperator) -> LinearizedChain:
        """The same layers under another split: the block is whatever ``residual`` leaves of each layer."""
        return LayerChain(LayerPullbacks(self), residual, self.state)

    def coarsen(self, size: int, backend: Backend | str | None = None) -> LinearizedChain:
        """The chain of stages of ``size`` consecutive layers (the last may be shorter).

        A stage is one layer: its residual map is the product of its layers' maps, its pullback exact backprop
        through them. ``backend`` is needed only where it cannot be told from the residual maps' arrays.
        """
        size = min(check_count("chunk", size, 1), max(len(self), 1))
        if size == 1:
            return self
        return LayerChain(Stages(self, size, size), products(self.residual, len(self), size, backend), self.state)


@dataclass(frozen=True, eq=False)
class LayerChain(LinearizedChain):
    """A chain whose pullbacks are those of whole layers: a block's is what the residual map leaves of it."""

    def pull_blocks(self, g: Array, backend: Backend) -> Array:
        whole = self.pullbacks(g, backend)
        return whole if isinstance(self.residual, Zero) else whole - self.residual.T.mv(g)

    def pull_layers(self, g: Array, backend: Backend) -> Array:
        return self.pullbacks(g, backend)

    def pull_layer(self, i: Any, g: Array, backend: Backend) -> Array:
        return self.pullbacks.at(i, g, backend)


@dataclass(frozen=True, eq=False)
class LayerPullbacks:
    """The pullbacks of a chain's whole layers."""

    chain: LinearizedChain

    @property
    def traceable(self) -> bool:
        return bool(self.chain.pullbacks.traceable)

    def __len__(self) -> int:
        return len(self.chain)

    def __getitem__(self, index: slice) -> LayerPullbacks:
        return LayerPullbacks(self.chain[index])

    def bind(self, like: Array, backend: Backend) -> LayerPullbacks:
        return LayerPullbacks(self.chain.bind(like, backend))

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        return self.chain.pull_layers(cotangents, backend)

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self.chain.pull_layer(i, cotangent, backend)


@dataclass(frozen=True, eq=False)
class Stages:
    """The pullbacks of stages of ``size`` layers that start at layers 0, stride, 2 stride, ... of a chain.

    Each is exact backprop through its layers, for all stages at once.
    """

    chain: LinearizedChain
    size: int
    stride: int
    traceable = False

    def __len__(self) -> int:
        return -(-len(self.chain) // self.stride)

    def __getitem__(self, index: slice) -> Stages:
        start, stop, step = index.indices(len(self))
        return Stages(self.chain[start * self.stride : stop * self.stride], self.size, step * self.stride)

    def bind(self, like: Array, backend: Backend) -> Stages:
        return replace(self, chain=self.chain.bind(like, backend))

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        *_, g = self.sweep(cotangents, None, backend)
        return g

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self[i : i + 1](cotangent[None], backend)[0]

    def sweep(self, cotangents: Array, sources: Array | None, backend: Backend) -> Iterator[Array]:
        """Exact backprop from the ends of all stages to their starts.

        Yields, for j = S-1, ..., 0, the cotangents of the states ``x[s S + j]`` of all stages s; where the last
        stage is too short to have that state, its entry stays the cotangent of its end.
        """
        g = cotangents
        for j in reversed(range(self.size)):
            layers = self.chain[j :: self.stride]
            moved = layers.pull_layers(g[: len(layers)], backend) if len(layers) else g[:0]
            if sources is not None:
                moved = moved + sources[j :: self.stride]
            g = moved if len(layers) == len(self) else backend.concat([moved, g[len(layers) :]])
            yield g


def products(residual: LinearOperator, length: int, size: int, backend: Backend | str | None) -> LinearOperator:
    """The composed maps of each run of ``size`` layers and of the shorter rest."""
    full = length - length % size
    product = reduce(_then, (residual[j:full:size] for j in range(size)))
    if full == length:
        return product
    rest = reduce(_then, (residual[i : i + 1] for i in range(full, length)))
    owner = None
    if residual.arrays:
        owner = load(backend_of(*residual.arrays)).backend if backend is None else resolve(backend, *residual.arrays)
    return concatenate(product, rest, (full // size, 1), owner)


def _then(first: LinearOperator, second: LinearOperator) -> LinearOperator:
    return second @ first
