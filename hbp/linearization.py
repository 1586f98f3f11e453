"""From layers to chains: forward passes that linearise, and the residual maps of their layers in one stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from hbp.core.backend import Array, Backend, Pullback, check_floating, check_kind, dtype_name
from hbp.core.chain import IDENTITY, LayerChain, LinearizedChain
from hbp.core.operator import Dense, Diagonal, Identity, LinearOperator, Pair, Scalar, Zero, zero
from hbp.core.pullbacks import check_same
from hbp.core.registry import resolve
from hbp.lowrank import LowRank, stacked

Block: TypeAlias = Callable[[Array], tuple[Array, Pullback]]
"""A differentiable function: x -> (y, pullback)."""

WIDER = (Zero, Identity, Scalar, Diagonal, Dense, Pair)
"""The kinds, each after those that it can stand for; a `Pair` stands for itself alone."""


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
    resolved = _entered("blocks", blocks, x, backend)
    maps, pullbacks, state = _ResidualMaps(residual, len(blocks), x, resolved), [], x
    for i, block in enumerate(blocks):
        y, pullback = _run("block", i, block, state)
        state = maps(i, state).mv(state) + y
        pullbacks.append(pullback)
    return state, LinearizedChain(pullbacks, maps.stacked(), _state(x))


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
    resolved = _entered("layers", layers, x, backend)
    maps, pullbacks, state = _ResidualMaps(residual, len(layers), x, resolved), [], x
    for i, layer in enumerate(layers):
        y, pullback = _run("layer", i, layer, state)
        maps(i, state, y)
        state = y
        pullbacks.append(pullback)
    return state, LayerChain(pullbacks, maps.stacked(), _state(x))


def _entered(kind: str, functions: Any, x: Array, backend: Backend | str | None) -> Backend:
    check_kind(kind, functions, Sequence, "a list of functions x -> (y, pullback)")
    resolved = resolve(backend, x)
    check_floating(x=x)
    return resolved


class _ResidualMaps:
    """The residual maps of a chain being run: a stack given beforehand, or a function called layer by layer."""

    def __init__(self, residual: Any, length: int, x: Array, backend: Backend) -> None:
        if not isinstance(residual, LinearOperator) and (not callable(residual) or isinstance(residual, type)):
            raise TypeError(f"residual is a {type(residual).__name__}; give an operator or a function returning one")
        self._like, self._backend = x, backend
        self._function: Any = residual
        self._maps: list[LinearOperator] = []
        self._given = residual.bind(length, x, backend) if isinstance(residual, LinearOperator) else None

    def __call__(self, i: int, *states: Array) -> LinearOperator:
        if self._given is not None:
            return self._given[i]
        self._maps.append(_check_map(i, self._function(i, *states), self._like))
        return self._maps[-1]

    def stacked(self) -> LinearOperator:
        if self._given is not None:
            return self._given
        return stack_maps(self._maps, self._like, self._backend).bind(len(self._maps), self._like, self._backend)


def _state(x: Array) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape), dtype_name(x)


def _run(kind: str, i: int, fn: Block, x: Array) -> tuple[Array, Pullback]:
    check_kind(f"{kind} {i}", fn, Callable, "a function x -> (y, pullback)")
    result = fn(x)
    if not isinstance(result, tuple) or len(result) != 2 or not callable(result[1]):
        raise TypeError(f"{kind} {i} must return (y, pullback), with a callable pullback")
    check_same(f"the output of {kind} {i}", result[0], x)
    return result


def _check_map(i: int, entry: Any, like: Array) -> LinearOperator:
    """``entry``, after checking that it is a single map on states like ``like``, layer i's."""
    if not isinstance(entry, LinearOperator):
        found = f"the residual function returned a {type(entry).__name__} for layer {i}"
        raise TypeError(f"{found}; return one map: Identity(), Scalar(...), Diagonal(...), Dense(...) or Zero()")
    try:
        entry.check_map(like)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {i}: {error}") from None
    return entry


def stack_maps(maps: Sequence[LinearOperator], like: Array, backend: Backend) -> LinearOperator:
    """Stack single maps on states like ``like``; mixed kinds are promoted to the widest among them.

    Raises:
        TypeError: an entry is no operator, or a `Pair` stands beside another kind.
    """
    for i, entry in enumerate(maps):
        _check_map(i, entry, like)
    if any(isinstance(entry, LowRank) for entry in maps):
        return _with_low_rank(maps, like, backend)
    kinds, arrays = {type(entry) for entry in maps}, [entry.arrays for entry in maps]
    if not kinds or kinds in ({Identity}, {Zero}):
        return maps[0] if maps else Identity()
    if Pair in kinds and len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"one chain mixes the residual kinds {names}; a Pair goes with Pairs only")
    alike = len(kinds) == 1 and len({tuple(tuple(array.shape) for array in own) for own in arrays}) == 1
    if kinds - set(WIDER) and not alike:
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"one chain mixes the residual kinds or shapes of {names}; a kind of your own goes alone")
    kind: Any = type(maps[0]) if kinds - set(WIDER) else max({Scalar, *kinds}, key=WIDER.index)
    zeros = backend.zeros_like(like)
    one = zero(like, backend) + 1 if kind is Scalar else zeros + 1
    if kind is Dense and not alike:
        row = zeros if zeros.ndim == 1 else zeros.sum(tuple(range(zeros.ndim - 1)))
        eye = backend.xp.diag(row + 1)
        arrays = [(m.matrix + zeros[..., None] if isinstance(m, Dense) else m.mv(one)[..., None] * eye,) for m in maps]
    elif kind is Pair:
        arrays = arrays if alike else [tuple(array + zeros for array in own) for own in arrays]
    elif kind in WIDER and (not alike or kind is Scalar):
        arrays = [(entry.mv(one),) for entry in maps]
    found: LinearOperator = kind(*(backend.stack(rows) for rows in zip(*arrays, strict=True)))
    return found


def _with_low_rank(maps: Sequence[LinearOperator], like: Array, backend: Backend) -> LinearOperator:
    """`stack_maps` where some maps are of low rank: beside a `Dense` one they are dense, else the others of rank 0."""
    if any(isinstance(entry, Dense) for entry in maps):
        return stack_maps([one.dense() if isinstance(one, LowRank) else one for one in maps], like, backend)
    path = stack_maps([one.path if isinstance(one, LowRank) else one for one in maps], like, backend)
    return stacked(maps, path, like, backend)
