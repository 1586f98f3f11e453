"""The adjoint equation ``g[i] = R[i]^T g[i+1] + B[i]^T g[i+1] + c[i]``, ``g[L] = c[L]``, and its solvers.

`backprop` solves it layer after layer. `highway` solves it by the stationary iteration
``g <- scan(R^T, c + B^T g)``: after k passes g is the sum over all paths that cross at most k blocks (theorem 2 of
the paper), exact from k = L. Its increments ``d[0] = scan(R^T, c)``, ``d[n+1] = scan(R^T, B^T d[n])`` tell how far
it has come. Everywhere ``g[i]`` belongs to ``x[i]``; ``sources`` (L, ...) enter at x[0..L-1], ``cotangent`` at x[L].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

from hbp.core.backend import Array, Backend, check_count, check_floating, check_shape
from hbp.core.chain import LinearizedChain, Stages
from hbp.core.operator import LinearOperator
from hbp.core.registry import resolve
from hbp.core.scan import loop

ADVICE = "damp the split (Scalar(1 - gamma)), use chunks, or exact backprop"


class DivergenceWarning(UserWarning):
    """The increments of an iteration grow past its solution: the split suits these layers badly."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """Iterate k of Highway-BP.

    Attributes:
        iteration: k, the number of blocks a counted path may cross.
        cotangents: g, shape (L+1, ...).
        increment: the norm of the last increment ``d[k]`` (with chunks, at the stage boundaries).
        size: the norm of the solution so far, likewise.
    """

    iteration: int
    cotangents: Array
    increment: float
    size: float

    @property
    def relative(self) -> float:
        """The increment as a fraction of the solution; 0 where both are zero."""
        return self.increment / self.size if self.size else self.increment


@dataclass(frozen=True)
class Report:
    """What the increments of an iteration say about its split.

    Attributes:
        increments: the norm of each increment ``d[0], d[1], ...``.
        sizes: the norm of the solution after each.
        exact: whether the last iterate counts every path.
    """

    increments: tuple[float, ...]
    sizes: tuple[float, ...]
    exact: bool

    @property
    def finite(self) -> bool:
        """Whether no increment holds NaN or infinity."""
        return all(map(math.isfinite, self.increments))

    @property
    def diverges(self) -> bool:
        """Whether some increment grew, and past the solution."""
        rows = zip(self.increments, self.increments[1:], self.sizes[1:], strict=False)
        return any(last < new > size for last, new, size in rows)

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if not self.finite:
            return "not finite: an increment holds NaN or infinity"
        if self.diverges:
            worst = max(a / b if b else math.inf for a, b in zip(self.increments, self.sizes, strict=True))
            return f"diverges: the increments grow to {worst:.2g} times the solution; {ADVICE}"
        last = self.increments[-1] / self.sizes[-1] if self.sizes[-1] else 0.0
        return f"{'exact' if self.exact else 'converging'}: the last increment is {last:.2g} of the solution"


def backprop(
    chain: LinearizedChain,
    cotangent: Array,
    sources: Array | None = None,
    *,
    backend: Backend | str | None = None,
) -> Array:
    """Exact backpropagation, layer after layer: all of ``g``, shape (L+1, ...).

    Raises:
        TypeError, ValueError: arrays of several libraries or dtypes, shapes that do not fit the chain.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> backprop(chain, np.array([4.0])).tolist()
    [[9.0], [6.0], [4.0]]
    """
    chain, resolved = _enter(chain, cotangent, sources, backend)
    return _exact(chain, cotangent, sources, resolved)


def highway(
    chain: LinearizedChain,
    cotangent: Array,
    iterations: int | None = None,
    *,
    sources: Array | None = None,
    chunk: int = 1,
    tolerance: float | None = None,
    backend: Backend | str | None = None,
) -> Array:
    """Highway backpropagation: the sum over all paths that cross at most ``iterations`` blocks.

    Args:
        chain: L linearised layers.
        cotangent: the loss's cotangent of x[L].
        iterations: k; None for exact backprop. With a tolerance it is the cap (None: as many as are exact).
        sources: cotangents that enter at x[0..L-1], shape (L, ...).
        chunk: layers per stage; blocks are then stages, inside which backprop is exact.
        tolerance: stop when the last increment is below this fraction of the solution.
        backend: a backend or its name, where it shall not be chosen by `resolve`'s rules.

    Returns:
        ``g``, shape (L+1, ...); with chunks it is the coarse iterate at the stage boundaries and exact backprop
        from the stage's end inside.

    Raises:
        TypeError, ValueError: as `backprop`, and for counts or a tolerance that are none.

    Equations 6 and 7 of the paper, in the folded form ``g = scan(R^T, c + B^T g)``.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> [highway(chain, np.array([4.0]), iterations=k)[0].item() for k in (0, 1, 2)]
    [4.0, 8.0, 9.0]
    """
    cap = None if iterations is None else check_count("iterations", iterations, 0)
    chunk, tolerance = check_count("chunk", chunk, 1), _check_tolerance(tolerance)
    chain, resolved = _enter(chain, cotangent, sources, backend)
    if cap is None and tolerance is None:
        return _exact(chain, cotangent, sources, resolved)
    coarse, c = _coarsened(chain, cotangent, sources, chunk, resolved)
    cap = len(coarse) if cap is None else min(cap, len(coarse))
    if tolerance is not None:
        g = _until(coarse, c, tolerance, cap, resolved)
    else:
        g = resolved.propagate(coarse.residual.T, c)
        for _ in range(cap):
            g = step(coarse, g, c, resolved)
    return _filled(coarse, g, chain, sources, resolved)


def step(chain: LinearizedChain, g: Array, c: Array, backend: Backend) -> Array:
    """One iteration, ``scan(R^T, c + B^T g)``: all blocks at once, then one suffix scan. ``c`` is (L+1, ...)."""
    pulled = chain.pull_blocks(g[1:], backend) + c[:-1] if len(chain) else c[:-1]
    return backend.propagate(chain.residual.T, backend.concat([pulled, c[-1:]]))


def propagate(operator: LinearOperator, c: Array, *, backend: Backend | str | None = None) -> Array:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]`` exactly by one suffix scan; ``c`` is (L+1, ...).

    The adjoint of a recurrence whose whole Jacobian is cheap. The maps are applied as they are: give
    ``residual.T`` for a backward pass.

    >>> import numpy as np
    >>> from hbp.core.operator import Scalar
    >>> propagate(Scalar(0.5), np.array([0.0, 0.0, 8.0])).tolist()
    [2.0, 4.0, 8.0]
    """
    resolved = resolve(backend, c, *operator.arrays)
    check_floating(c=c)
    if c.ndim == 0 or not len(c):
        raise ValueError(f"c has shape {tuple(c.shape)}; give one entry per state, (L+1, ...)")
    return resolved.propagate(operator.bind(len(c) - 1, c[-1], resolved), c)


def iterates(
    chain: LinearizedChain,
    cotangent: Array,
    *,
    sources: Array | None = None,
    chunk: int = 1,
    backend: Backend | str | None = None,
) -> Iterator[Iterate]:
    """Iterates k = 0, 1, ... of `highway` one after another, up to the exact one, each with its increment's size.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> [(it.iteration, it.cotangents[0].item()) for it in iterates(chain, np.array([4.0]))]
    [(0, 4.0), (1, 8.0), (2, 9.0)]
    """
    chunk = check_count("chunk", chunk, 1)
    chain, resolved = _enter(chain, cotangent, sources, backend)
    coarse, c = _coarsened(chain, cotangent, sources, chunk, resolved)
    return (
        Iterate(it.iteration, _filled(coarse, it.cotangents, chain, sources, resolved), it.increment, it.size)
        for it in _increments(coarse, c, resolved)
    )


def report(
    chain: LinearizedChain,
    cotangent: Array,
    iterations: int | None = None,
    *,
    sources: Array | None = None,
    chunk: int = 1,
    backend: Backend | str | None = None,
) -> Report:
    """The increments of up to ``iterations`` iterations (None: all), with a verdict on the split.

    >>> import numpy as np
    >>> damped = LinearizedChain([lambda g: -0.9 * g] * 9)  # blocks that cancel most of the stream
    >>> report(damped, np.array([1.0])).verdict.split(":")[0]
    'diverges'
    """
    cap = None if iterations is None else check_count("iterations", iterations, 0)
    chunk = check_count("chunk", chunk, 1)
    chain, resolved = _enter(chain, cotangent, sources, backend)
    coarse, c = _coarsened(chain, cotangent, sources, chunk, resolved)
    seen = list(islice(_increments(coarse, c, resolved), None if cap is None else cap + 1))
    return _report(seen, len(coarse))


def _increments(chain: LinearizedChain, c: Array, backend: Backend) -> Iterator[Iterate]:
    """The iterates of an unchunked chain, by increments."""
    increment = g = backend.propagate(chain.residual.T, c)
    for k in range(len(chain) + 1):
        if k:
            increment = step(chain, increment, backend.zeros_like(c), backend)
            g = g + increment
        yield Iterate(k, g, backend.norm(increment), backend.norm(g))


def _until(chain: LinearizedChain, c: Array, tolerance: float, cap: int, backend: Backend) -> Array:
    seen: list[Iterate] = []
    for iterate in islice(_increments(chain, c, backend), cap + 1):
        seen.append(Iterate(iterate.iteration, None, iterate.increment, iterate.size))
        if iterate.relative <= tolerance:
            break
    found = _report(seen, len(chain))
    if found.diverges:
        warnings.warn(found.verdict, DivergenceWarning, stacklevel=3)
    return iterate.cotangents


def _report(seen: list[Iterate], length: int) -> Report:
    return Report(tuple(it.increment for it in seen), tuple(it.size for it in seen), seen[-1].iteration == length)


def _exact(chain: LinearizedChain, cotangent: Array, sources: Array | None, backend: Backend) -> Array:
    if not len(chain):
        return cotangent[None]

    def layer_by_layer(g: Array, i: int) -> Array:
        g = chain.pull_layer(i, g, backend)
        return g if sources is None else g + sources[i]

    scan = backend.scan if chain.pullbacks.traceable else partial(loop, backend=backend)
    return backend.concat([scan(layer_by_layer, cotangent, len(chain), reverse=True), cotangent[None]])


def _coarsened(
    chain: LinearizedChain, cotangent: Array, sources: Array | None, chunk: int, backend: Backend
) -> tuple[LinearizedChain, Array]:
    """The chain of stages and the sources of its states, (number of stages + 1, ...)."""
    coarse = chain.coarsen(chunk, backend)
    if sources is None:
        zero = backend.zeros_like(cotangent)
        sources = backend.xp.broadcast_to(zero, (len(coarse), *cotangent.shape))
    elif coarse is not chain:
        *_, sources = coarse.pullbacks.sweep(backend.zeros_like(sources[: len(coarse)]), sources, backend)
    return coarse, backend.concat([sources, cotangent[None]])


def _filled(
    coarse: LinearizedChain, g: Array, chain: LinearizedChain, sources: Array | None, backend: Backend
) -> Array:
    """``g`` at all states of the chain, from its values at the stage boundaries."""
    if coarse is chain:
        return g
    stages: Stages = coarse.pullbacks
    inside = list(islice(stages.sweep(g[1:], sources, backend), stages.size - 1))
    rows = backend.stack([g[:-1], *reversed(inside)], axis=1)
    states = rows.reshape((len(coarse) * stages.size, *g.shape[1:]))
    return backend.concat([states[: len(chain)], g[-1:]])


def _enter(
    chain: LinearizedChain, cotangent: Array, sources: Array | None, backend: Backend | str | None
) -> tuple[LinearizedChain, Backend]:
    """Check all input before any work: the bound chain and the backend."""
    if not isinstance(chain, LinearizedChain):
        raise TypeError(f"chain is a {type(chain).__name__}; give a LinearizedChain, as linearize returns")
    given = {"cotangent": cotangent} if sources is None else {"cotangent": cotangent, "sources": sources}
    resolved = resolve(backend, *given.values(), *chain.residual.arrays)
    check_floating(**given)
    if sources is not None:
        check_shape("sources", sources, (len(chain), *cotangent.shape))
    return chain.bind(cotangent, resolved), resolved


def _check_tolerance(tolerance: Any) -> float | None:
    if tolerance is None:
        return None
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not float(tolerance) >= 0:
        raise ValueError(f"tolerance={tolerance!r}; give a non-negative number, a fraction of the solution")
    return float(tolerance)
