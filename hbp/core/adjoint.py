"""The adjoint equation ``g[i] = R[i]^T g[i+1] + B[i]^T g[i+1] + c[i]``, ``g[L] = c[L]``, and its solvers.

`backprop` solves it layer after layer. `highway` solves it by the stationary iteration
``g <- scan(R^T, c + B^T g)``: after k passes g is the sum over all paths that cross at most k blocks (theorem 2 of
the paper), exact from k = L. Its increments ``d[0] = scan(R^T, c)``, ``d[n+1] = scan(R^T, B^T d[n])`` tell how far
it has come. Everywhere ``g[i]`` belongs to ``x[i]``; ``sources`` (L, ...) enter at x[0..L-1], ``cotangent`` at x[L].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hbp.core.backend import Array, Backend, check_floating, check_kind, check_shape
from hbp.core.chain import LinearizedChain
from hbp.core.equation import Equation
from hbp.core.increments import Iterate, Report
from hbp.core.operator import LinearOperator
from hbp.core.registry import resolve
from hbp.core.solver import Solver


def backprop(
    chain: LinearizedChain, cotangent: Array, sources: Array | None = None, *, backend: Backend | str | None = None
) -> Array:
    """Exact backpropagation, layer after layer: all of ``g``, shape (L+1, ...), rounded at each layer.

    Raises:
        TypeError, ValueError: arrays of several libraries or dtypes, shapes that do not fit the chain.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> backprop(chain, np.array([4.0])).tolist()
    [[9.0], [6.0], [4.0]]
    """
    return _posed(chain, cotangent, sources, Solver(), backend).solved()


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
        solver: iterations, chunk, tolerance and watch in one value, instead.
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
    solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance, watch=watch)
    return _posed(chain, cotangent, sources, solver, backend).solved()


def propagate(operator: LinearOperator, c: Array, *, backend: Backend | str | None = None) -> Array:
    """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]`` exactly by one suffix scan; ``c`` is (L+1, ...).

    The adjoint of a recurrence whose whole Jacobian is cheap. The maps are applied as they are: give
    ``residual.T`` for a backward pass.

    >>> import numpy as np
    >>> from hbp.core.operator import Scalar
    >>> propagate(Scalar(0.5), np.array([0.0, 0.0, 8.0])).tolist()
    [2.0, 4.0, 8.0]
    """
    check_kind("operator", operator, LinearOperator, "a residual operator, as Diagonal(...)")
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
    solver: Solver | None = None,
    backend: Backend | str | None = None,
) -> Iterator[Iterate]:
    """Iterates k = 0, 1, ... of `highway` one after another, each with its increment's size.

    They go up to the exact one, or to where ``solver`` stops; its ``watch`` is not called.

    >>> import numpy as np
    >>> chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    >>> [(it.iteration, it.cotangents[0].item()) for it in iterates(chain, np.array([4.0]))]
    [(0, 4.0), (1, 8.0), (2, 9.0)]
    """
    return _posed(chain, cotangent, sources, Solver.of(solver, chunk=chunk), backend).iterates()


def report(
    chain: LinearizedChain,
    cotangent: Array,
    iterations: int | None = None,
    *,
    sources: Array | None = None,
    chunk: int = 1,
    solver: Solver | None = None,
    backend: Backend | str | None = None,
) -> Report:
    """The increments of up to ``iterations`` iterations (None: all), with a verdict on the split.

    With a ``solver``, of those that it would go through; its ``watch`` is not called.

    >>> import numpy as np
    >>> damped = LinearizedChain([lambda g: -0.9 * g] * 9)  # blocks that cancel most of the stream
    >>> report(damped, np.array([1.0])).verdict.split(":")[0]
    'diverges'
    """
    posed = _posed(chain, cotangent, sources, Solver.of(solver, iterations=iterations, chunk=chunk), backend)
    return Report.of([(it.increment, it.size) for it in posed.iterates(filled=False)], len(posed.coarse))


def _posed(
    chain: LinearizedChain, cotangent: Array, sources: Array | None, solver: Solver, backend: Backend | str | None
) -> Equation:
    """Check all input before any work."""
    check_kind("chain", chain, LinearizedChain, "a LinearizedChain, as linearize returns")
    given = {"cotangent": cotangent} if sources is None else {"cotangent": cotangent, "sources": sources}
    resolved = resolve(backend, *given.values(), *chain.residual.arrays)
    check_floating(**given)
    if sources is not None:
        check_shape("sources", sources, (len(chain), *cotangent.shape))
    return Equation(chain.bind(cotangent, resolved), cotangent, sources, solver.fixed(), resolved)
