"""Linearised chains: layers x[i+1] = layer_i(x[i]) reduced to their pullbacks and residual maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol, TypeAlias

from hbp.core.backend import Array, Backend, Pullback, check_count, check_floating, check_shape, dtype_name
from hbp.core.operator import Identity, LinearOperator, Zero, concatenate, stack
from hbp.core.registry import resolve

IDENTITY = Identity()

Block: TypeAlias = Callable[[Array], tuple[Array, Pullback]]
"""A differentiable function: x -> (y, pullback)."""


class Pullbacks(Protocol):
    """The pullbacks of L blocks, applied all at once or one by one."""

    traceable: bool
    """Whether `at` accepts an index known only at run time, as inside a compiled loop."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> Pullbacks: ...

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        """Pull cotangents of the L block outputs, shape (L, ...), back to the L block inputs."""

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        """Pull one cotangent back through block i."""


@dataclass(frozen=True, eq=False)
class PullbackList:
    """Pullbacks given as one callable per block."""

    pullbacks: tuple[Pullback, ...]
    traceable = False

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> PullbackList:
        return PullbackList(self.pullbacks[index])

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        pulled = backend.map(self.pullbacks, [cotangents[i] for i in range(len(self))])
        return backend.stack([_checked(i, new, cotangents[i]) for i, new in enumerate(pulled)])

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return _checked(i, self.pullbacks[i](cotangent), cotangent)


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

    def __post_init__(self) -> None:
        if isinstance(self.pullbacks, Sequence):
            for i, pullback in enumerate(self.pullbacks):
                if not callable(pullback):
                    raise TypeError(f"pullback {i} is a {type(pullback).__name__}; give a callable")
            object.__setattr__(self, "pullbacks", PullbackList(tuple(self.pullbacks)))
        if not isinstance(self.residual, LinearOperator):
            raise TypeError(
                f"residual is a {type(self.residual).__name__}; give an operator: Identity(), Scalar(...), "
                "Diagonal(...), Dense(...) or Zero()"
            )
        if self.residual.length not in (None, len(self)):
            raise ValueError(
                f"the residual {type(self.residual).__name__} has {self.residual.length} maps and the chain "
                f"{len(self)} layers; give one map per layer"
            )

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> LinearizedChain:
        return replace(self, pullbacks=self.pullbacks[index], residual=self.residual[index])

    def bind(self, like: Array, backend: Backend) -> LinearizedChain:
        """This chain with its residual maps checked against states like ``like`` (`LinearOperator.bind`)."""
        return replace(self, residual=self.residual.bind(len(self), like, backend))

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
        return LayerChain(LayerPullbacks(self), residual)

    def coarsen(self, size: int, backend: Backend | str | None = None) -> LinearizedChain:
        """The chain of stages of ``size`` consecutive layers (the last may be shorter).

        A stage is one layer: its residual map is the product of its layers' maps, its pullback exact backprop
        through them. ``backend`` is needed only where it cannot be told from the residual maps' arrays.
        """
        size = min(check_count("chunk", size, 1), max(len(self), 1))
        if size == 1:
            return self
        return LayerChain(Stages(self, size, size), _products(self.residual, len(self), size, backend))


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


def linearize(
    blocks: Sequence[Block],
    x: Array,
    residual: LinearOperator | Callable[[int, Array], LinearOperator] = IDENTITY,
    *,
    backend: Backend | str | None = None,
) -> tuple[Array, LinearizedChain]:
    """Run the chain ``x[i+1] = R[i] x[i] + block_i(x[i])`` and linearise it.

    Args:
        blocks: functions x -> (y, pullback), y of the shape and dtype of x.
        x: the chain's input, real floating point.
        residual: a stack of maps, or a function ``(i, x[i]) -> one map``, which counts as constant in x.

    Returns:
        ``x[L]`` and the chain.

    Raises:
        TypeError, ValueError: a block changes shape or dtype, or the residual maps do not fit.

    >>> import numpy as np
    >>> half = lambda x: (0.5 * x, lambda g: 0.5 * g)
    >>> y, chain = linearize([half, half], np.array([4.0]))
    >>> y.tolist(), len(chain)
    ([9.0], 2)
    """
    resolved = resolve(backend, x)
    maps, pullbacks, state = _ResidualMaps(residual, len(blocks), x, resolved), [], x
    for i, block in enumerate(blocks):
        y, pullback = _run("block", i, block, state)
        state = maps(i, state).mv(state) + y
        pullbacks.append(pullback)
    return state, LinearizedChain(pullbacks, maps.stacked())


def linearize_layers(
    layers: Sequence[Block],
    x: Array,
    residual: LinearOperator | Callable[[int, Array, Array], LinearOperator] = IDENTITY,
    *,
    backend: Backend | str | None = None,
) -> tuple[Array, LinearizedChain]:
    """Run the chain ``x[i+1] = layer_i(x[i])`` of whole layers, skip included, and linearise it.

    ``residual`` may be a function ``(i, x[i], x[i+1]) -> one map`` (gates, masks, norms); whatever it leaves of a
    layer's Jacobian is the block. Arguments, results and errors otherwise as in `linearize`.

    >>> import numpy as np
    >>> layer = lambda x: (1.5 * x, lambda g: 1.5 * g)
    >>> y, chain = linearize_layers([layer, layer], np.array([4.0]))
    >>> y.tolist(), len(chain)
    ([9.0], 2)
    """
    resolved = resolve(backend, x)
    maps, pullbacks, state = _ResidualMaps(residual, len(layers), x, resolved), [], x
    for i, layer in enumerate(layers):
        y, pullback = _run("layer", i, layer, state)
        maps(i, state, y)
        state = y
        pullbacks.append(pullback)
    return state, LayerChain(pullbacks, maps.stacked())


class _ResidualMaps:
    """The residual maps of a chain being run: a stack given beforehand, or a function called layer by layer."""

    def __init__(self, residual: Any, length: int, x: Array, backend: Backend) -> None:
        check_floating(x=x)
        if not isinstance(residual, LinearOperator) and not callable(residual):
            raise TypeError(
                f"residual is a {type(residual).__name__}; give an operator or a function returning one map"
            )
        self._length, self._x, self._backend = length, x, backend
        self._given = residual.bind(length, x, backend) if isinstance(residual, LinearOperator) else None
        self._function = residual
        self._maps: list[LinearOperator] = []

    def __call__(self, i: int, *states: Array) -> LinearOperator:
        if self._given is not None:
            return self._given[i]
        self._maps.append(self._function(i, *states))
        if not isinstance(self._maps[-1], LinearOperator):
            raise TypeError(
                f"the residual function returned a {type(self._maps[-1]).__name__} for layer {i}; "
                "return one map: Identity(), Scalar(...), Diagonal(...), Dense(...) or Zero()"
            )
        return self._maps[-1]

    def stacked(self) -> LinearOperator:
        if self._given is not None:
            return self._given
        return stack(self._maps, self._x, self._backend).bind(self._length, self._x, self._backend)


def _products(residual: LinearOperator, length: int, size: int, backend: Backend | str | None) -> LinearOperator:
    """The composed maps of each run of ``size`` layers and of the shorter rest."""
    full = length - length % size
    product = reduce(_then, (residual[j:full:size] for j in range(size)))
    if full == length:
        return product
    rest = reduce(_then, (residual[i : i + 1] for i in range(full, length)))
    return concatenate(
        product, rest, (full // size, 1), resolve(backend, *residual.arrays) if residual.arrays else None
    )


def _then(first: LinearOperator, second: LinearOperator) -> LinearOperator:
    return second @ first


def _run(kind: str, i: int, fn: Block, x: Array) -> tuple[Array, Pullback]:
    result = fn(x)
    if not isinstance(result, tuple) or len(result) != 2 or not callable(result[1]):
        raise TypeError(f"{kind} {i} must return (y, pullback), with a callable pullback")
    _same(f"the output of {kind} {i}", result[0], x)
    return result


def _checked(i: Any, pulled: Array, cotangent: Array) -> Array:
    return _same(f"what the pullback of block {i} returned", pulled, cotangent)


def _same(what: str, new: Array, old: Array) -> Array:
    """``new``, after checking that it has the shape and dtype of ``old``, as a chain needs."""
    if not hasattr(new, "shape") or not hasattr(new, "dtype"):
        raise TypeError(f"{what} is a {type(new).__name__}; expected an array of shape {tuple(old.shape)}")
    check_shape(what, new, old.shape)
    if dtype_name(new) != dtype_name(old):
        raise TypeError(f"{what} is {dtype_name(new)}, its input {dtype_name(old)}; keep one dtype along the chain")
    return new
