"""Forward passes that linearise: from blocks or whole layers and an input to the output and its chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hbp.core.backend import Array, Backend, Pullback, check_floating, dtype_name
from hbp.core.chain import IDENTITY, LayerChain, LinearizedChain
from hbp.core.joining import stack
from hbp.core.operator import LinearOperator
from hbp.core.pullbacks import Block, check_same
from hbp.core.registry import resolve


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
    if not isinstance(functions, Sequence):
        raise TypeError(f"{kind} is a {type(functions).__name__}; give a list of functions x -> (y, pullback)")
    resolved = resolve(backend, x)
    check_floating(x=x)
    return resolved


class _ResidualMaps:
    """The residual maps of a chain being run: a stack given beforehand, or a function called layer by layer."""

    def __init__(self, residual: Any, length: int, x: Array, backend: Backend) -> None:
        if not isinstance(residual, LinearOperator) and (not callable(residual) or isinstance(residual, type)):
            raise TypeError(
                f"residual is a {type(residual).__name__}; give an operator or a function returning one map"
            )
        self._length, self._x, self._backend = length, x, backend
        self._given = residual.bind(length, x, backend) if isinstance(residual, LinearOperator) else None
        self._function: Any = residual
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


def _state(x: Array) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape), dtype_name(x)


def _run(kind: str, i: int, fn: Block, x: Array) -> tuple[Array, Pullback]:
    if not callable(fn):
        raise TypeError(f"{kind} {i} is a {type(fn).__name__}; give a function x -> (y, pullback)")
    result = fn(x)
    if not isinstance(result, tuple) or len(result) != 2 or not callable(result[1]):
        raise TypeError(f"{kind} {i} must return (y, pullback), with a callable pullback")
    check_same(f"the output of {kind} {i}", result[0], x)
    return result
