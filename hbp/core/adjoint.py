"""The adjoint equation ``g[i] = R[i]^T g[i+1] + B[i]^T g[i+1] + c[i]``, ``g[L] = c[L]``, and its solvers.

`backprop` solves it layer after layer. `highway` solves it by the stationary iteration
``g <- scan(R^T, c + B^T g)``: after k passes g is the sum over all paths that cross at most k blocks (theorem 2 of
the paper), exact from k = L. Its increments ``d[0] = scan(R^T, c)``, ``d[n+1] = scan(R^T, B^T d[n])`` tell how far
it has come. Everywhere ``g[i]`` belongs to ``x[i]``; ``sources`` (L, ...) enter at x[0..L-1], ``cotangent`` at x[L].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

from hbp.core.backend import Array, Backend, check_count, check_floating, check_shape
from hbp.core.chain import LinearizedChain, Stages
from hbp.core.increments import DivergenceWarning, Iterate, Report
from hbp.core.operator import LinearOperator
from hbp.core.registry import resolve
from hbp.core.scan import loop
from hbp.core.solver import Solver


def backprop(
    chain: LinearizedChain,
    cotangent: Array,
    sources: Array | None = None,
    *,
    backend: Backend | str | None = None,
) -> Array:
    """Exact backpropagation, layer after layer: all of ``g``, shape (L+1, ...), rounded at each layer.

    Raises:
        TypeError, ValueError: arrays of several libraries or dtypes, shapes that do not fit the chain.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> backprop(chain, np.array([4.0])).tolist()
    [[9.0], [6.0], [4.0]]
    """
    return _posed(chain, cotangent, sources, 1, backend).exact()


def highway(
    chain: LinearizedChain,
    cotangent: Array,
    iterations: int | None = None,
    *,
    sources: Array | None = None,
    chunk: int = 1,
    tolerance: float | None = None,
    watch: Callable[[Report], None] | None = None,
    solver: Solver | None = None,
    backend: Backend | str | None = None,
) -> Array:
    """Highway backpropagation: the sum over all paths that cross at most ``iterations`` blocks.

    Args:
        chain: L linearised layers.
        cotangent: the loss's cotangent of x[L].
        iterations: k; None for exact backprop. With a tolerance it is the cap.
        sources: cotangents that enter at x[0..L-1], shape (L, ...).
        chunk, tolerance, watch: as in `Solver`.
        solver: all of these four in one value, instead.
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
    solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance, watch=watch).fixed()
    cap: int | None = solver.iterations  # type: ignore[assignment]
    tolerance, watch = solver.tolerance, solver.watch
    problem = _posed(chain, cotangent, sources, solver.chunk, backend)
    if tolerance is not None or (watch is not None and cap is not None):
        return problem.filled(problem.until(tolerance, cap, watch))
    if cap is None:
        return problem.exact()
    g = problem.backend.propagate(problem.coarse.residual.T, problem.c)
    for _ in range(min(cap, len(problem.coarse))):
        g = step(problem.coarse, g, problem.c, problem.backend)
    return problem.filled(g)


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
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"operator is a {type(operator).__name__}; give a residual operator, as Diagonal(...)")
    resolved = resolve(backend, c, *operator.arrays)
    check_floating(c=c)
    if c.ndim == 0 or not len(c):
        raise ValueError(f"c has shape {tuple(c.shape)}; give one entry per state, (L+1, ...)")
    g = resolved.propagate(operator.bind(len(c) - 1, c[-1], resolved), c)
    return resolved.concat([c]) if g is c else g  # the caller's array is not handed back


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
    problem = _posed(chain, cotangent, sources, chunk, backend)
    copy = problem.backend.concat  # the iteration goes on from its own arrays, whatever becomes of these
    return (replace(it, cotangents=copy([problem.filled(it.cotangents)])) for it in problem.increments())


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
    problem = _posed(chain, cotangent, sources, chunk, backend)
    seen = [replace(it, cotangents=None) for it in islice(problem.increments(), None if cap is None else cap + 1)]
    return Report.of(seen, len(problem.coarse))


@dataclass(frozen=True, eq=False)
class _Problem:
    """An adjoint equation whose input has been checked: a bound chain, and what enters at its states."""

    chain: LinearizedChain
    cotangent: Array
    sources: Array | None
    chunk: int
    backend: Backend

    @cached_property
    def coarse(self) -> LinearizedChain:
        """The chain of stages; with chunks of one layer, the chain itself."""
        coarse = self.chain.coarsen(self.chunk, self.backend)
        return coarse if coarse is self.chain else coarse.bind(self.cotangent, self.backend)

    @cached_property
    def c(self) -> Array:
        """What enters at the states of the chain of stages, (number of stages + 1, ...)."""
        sources, count = self.sources, len(self.coarse)
        if sources is None:
            zero = self.backend.zeros_like(self.cotangent)
            sources = self.backend.xp.broadcast_to(zero, (count, *self.cotangent.shape))
        elif self.coarse is not self.chain:
            *_, sources = self.coarse.pullbacks.sweep(self.backend.zeros_like(sources[:count]), sources, self.backend)
        return self.backend.concat([sources, self.cotangent[None]])

    def exact(self) -> Array:
        """Layer after layer."""
        if not len(self.chain):
            return self.backend.stack([self.cotangent])

        def layer_by_layer(g: Array, i: int) -> Array:
            g = self.chain.pull_layer(i, g, self.backend)
            return g if self.sources is None else g + self.sources[i]

        scan = self.backend.scan if self.chain.pullbacks.traceable else partial(loop, backend=self.backend)
        g = scan(layer_by_layer, self.cotangent, len(self.chain), reverse=True)
        return self.backend.concat([g, self.cotangent[None]])

    def increments(self) -> Iterator[Iterate]:
        """The iterates on the chain of stages, by increments."""
        increment = g = self.backend.propagate(self.coarse.residual.T, self.c)
        nothing = self.backend.zeros_like(self.c)
        for k in range(len(self.coarse) + 1):
            if k:
                increment = step(self.coarse, increment, nothing, self.backend)
                g = g + increment
            yield Iterate(k, g, self.backend.norm(increment), self.backend.norm(g))

    def until(self, tolerance: float | None, cap: int | None, watch: Callable[[Report], None] | None) -> Array:
        """The first iterate whose increment is below the tolerance, or the one at the cap."""
        seen = []
        for iterate in islice(self.increments(), None if cap is None else cap + 1):
            seen.append(replace(iterate, cotangents=None))
            if tolerance is not None and iterate.relative <= tolerance:
                break
        report = Report.of(seen, len(self.coarse))
        if tolerance is not None and report.diverges:
            warnings.warn(report.verdict, DivergenceWarning, stacklevel=3)
        if watch is not None:
            watch(report)
        return iterate.cotangents

    def filled(self, g: Array) -> Array:
        """``g`` at all states of the chain, from its values at the stage boundaries."""
        if self.coarse is self.chain:
            return g
        stages: Stages = self.coarse.pullbacks
        inside = list(islice(stages.sweep(g[1:], self.sources, self.backend), stages.size - 1))
        rows = self.backend.stack([g[:-1], *reversed(inside)], axis=1)
        states = rows.reshape((len(stages) * stages.size, *g.shape[1:]))
        return self.backend.concat([states[: len(self.chain)], g[-1:]])


def _posed(
    chain: LinearizedChain, cotangent: Array, sources: Array | None, chunk: int, backend: Backend | str | None
) -> _Problem:
    """Check all input before any work."""
    chunk = check_count("chunk", chunk, 1)
    if not isinstance(chain, LinearizedChain):
        raise TypeError(f"chain is a {type(chain).__name__}; give a LinearizedChain, as linearize returns")
    given = {"cotangent": cotangent} if sources is None else {"cotangent": cotangent, "sources": sources}
    resolved = resolve(backend, *given.values(), *chain.residual.arrays)
    check_floating(**given)
    if sources is not None:
        check_shape("sources", sources, (len(chain), *cotangent.shape))
    return _Problem(chain.bind(cotangent, resolved), cotangent, sources, chunk, resolved)
