"""What the gated cells share: checks, matrix products over all steps, and the solve for the states' cotangents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Literal, TypeAlias, get_args

from hbp.core.adjoint import highway
from hbp.core.backend import Array, Backend, check_floating, check_kind, check_shape
from hbp.core.chain import LinearizedChain
from hbp.core.operator import LinearOperator
from hbp.core.registry import resolve
from hbp.core.solver import Solver
from hbp.directions import Directions, Rank, check_directions, directions

Whole: TypeAlias = Callable[..., tuple[Any, Any, Any]]
"""``(pullback, cotangents, with_inputs) -> (dparams, dx, dinitial)``."""
Rounds: TypeAlias = Callable[[LinearizedChain, Array, Solver], Array]
"""``(chain, c, solver)`` -> all of g, along the chain's own path and the directions that it knows."""


Keep: TypeAlias = Literal["states", "gates"]
"""What a forward keeps for the pullback, where it has the choice."""


def check_keep(keep: Any) -> None:
    """Raise ValueError unless ``keep`` is one of its values."""
    if keep not in get_args(Keep):
        raise ValueError(f"keep={keep!r}; give 'gates', or 'states' to compute the gates again")


def sigmoid(x: Array, backend: Backend) -> Array:
    """The logistic function, by tanh so that nothing overflows."""
    return 0.5 * backend.xp.tanh(0.5 * x) + 0.5


def matmul(x: Array, weight: Array) -> Array:
    """``x @ weight`` over the last axis as one matrix product, whatever the leading axes."""
    rows = x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))
    return (rows @ weight).reshape((*x.shape[:-1], weight.shape[-1]))


def project(x: Array, weight: Array, *biases: Array | None) -> Array:
    """``x @ weight.T + biases`` over the last axis; a bias may be None."""
    y = matmul(x, weight.T)
    for bias in biases:
        y = y if bias is None else y + bias
    return y


def previous(initial: Array, states: Array, backend: Backend) -> Array:
    """The state before each step, (T, ...), from the initial state and the states after each step."""
    return backend.concat([initial[None], states[:-1]])


def first(g: Array, backend: Backend) -> Array:
    """The cotangent of the initial state, without the others' memory."""
    return backend.concat([g[:1]])[0]


def weight_gradient(preactivations: Array, inputs: Array) -> Array:
    """The gradient of W in ``a = inputs @ W.T``, from a's cotangents (T, B, N) and the inputs (T, B, M): (N, M)."""
    count = math.prod(inputs.shape[:-1])
    return preactivations.reshape((count, preactivations.shape[-1])).T @ inputs.reshape((count, inputs.shape[-1]))


def sum_of_gates(gains: Array, left: Array) -> Array:
    """``sum_g gains[g] left[g]``, (T, B, H, r), from (T, B, gates, H) and (gates * H, r)."""
    size = gains.shape[-1]
    parts = [gains[..., g, :, None] * left[g * size : (g + 1) * size] for g in range(gains.shape[-2])]
    return reduce(add, parts)


def merged(x: Array) -> Array:
    """The last two axes, gates and units, as one."""
    return x.reshape((*x.shape[:-2], x.shape[-2] * x.shape[-1]))


def own_code(
    cell: str,
    solver: Solver,
    split: LinearOperator | Directions | None,
    backend: Backend,
    arrays: Sequence[Array | None],
) -> tuple[Whole | None, Rounds | None]:
    """Which code of the backend's own computes a cell's backward pass; where it has none, the core does.

    The whole pass: "adjoint", which knows tolerance, reports, and chunks or, on single steps, directions; else
    "in_place", exact or on single steps, which knows none of these. Else the rounds alone, on single steps: "rounds",
    or with directions "low_rank_rounds". This is the only place that decides.
    """
    if isinstance(split, LinearOperator):
        return None, None
    given, whole, rounds = [array for array in arrays if array is not None], None, None
    if split is None or solver.exact or solver.chunk == 1:
        whole = backend.kernel(f"{cell}_adjoint", *given)
        whole = whole and partial(whole, solver=solver, directions=split)
    if whole is None and split is None and (solver.exact or solver == Solver(solver.iterations)):
        whole = backend.kernel(f"{cell}_in_place", *given)
        whole = whole and partial(whole, iterations=solver.iterations)
    if whole is None and not solver.exact and solver.chunk == 1:
        rounds = backend.kernel(f"{cell}_rounds" if split is None else f"{cell}_low_rank_rounds", *given)
        rounds = rounds if rounds is None or split is None else partial(rounds, directions=split)
    return whole, rounds


def own_split(
    solver: Solver, residual: LinearOperator | None, rank: Rank, weight: Array, backend: Backend
) -> LinearOperator | Directions | None:
    """What a cell's residual path is instead of its gate's, or the directions of its weight beside that; else None.

    Raises:
        TypeError, ValueError: both are given, or ``rank`` is none of this weight.
    """
    check_directions(weight, rank, backend)
    check_kind("residual", residual, LinearOperator | None, "an operator, as hbp.Zero(), or None for the cell's own")
    if residual is not None and rank != 0:
        raise ValueError("residual and rank are given; directions go with the cell's own path, give one of them")
    if rank == 0 or (solver.exact and residual is None):
        return residual
    return directions(weight, rank, backend=backend)


def state_cotangents(
    chain: LinearizedChain,
    d: Array,
    solver: Solver,
    rounds: Rounds | None,
    backend: Backend,
) -> Array:
    """The cotangents of the initial state and of all T others, (T+1, ...), from those given from outside, (T, ...)."""
    sources = backend.concat([backend.zeros_like(d[:1]), d[:-1]])
    if rounds is not None:
        return rounds(chain, backend.concat([sources, d[-1:]]), solver)
    return highway(chain, d[-1], sources=sources, solver=solver, backend=backend)


def check_cell(gates: int, params: Any, x: Array, states: dict[str, Array], backend: Backend | str | None) -> Backend:
    """Check a cell's weights, input (T, B, I) and initial states (B, H) before any work; returns the backend.

    Raises:
        TypeError: no arrays, or arrays of several libraries or dtypes, or not real floating point.
        ValueError: shapes that do not fit each other, or no step at all.
    """
    if not hasattr(params, "_asdict") or not hasattr(params, "weight_hh"):
        raise TypeError(f"params is a {type(params).__name__}; give the cell's parameters, as hbp.cells.GRUParameters")
    for name in ("weight_ih", "weight_hh"):
        if getattr(params, name) is None:
            raise TypeError(f"{name} is None; only the biases may be left out")
    weights = {name: array for name, array in params._asdict().items() if array is not None}
    resolved = resolve(backend, x, *states.values(), *weights.values())
    check_floating(x=x, **states, **weights)
    if x.ndim != 3 or not len(x):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (T, B, I) with at least one step")
    if params.weight_hh.ndim != 2:
        raise ValueError(f"weight_hh has shape {tuple(params.weight_hh.shape)}; expected ({gates} H, H)")
    hidden = params.weight_hh.shape[-1]
    check_shape("weight_hh", params.weight_hh, (gates * hidden, hidden))
    check_shape("weight_ih", params.weight_ih, (gates * hidden, x.shape[-1]))
    for name in ("bias_ih", "bias_hh"):
        if name in weights:
            check_shape(name, weights[name], (gates * hidden,))
    for name, state in states.items():
        check_shape(name, state, (x.shape[1], hidden))
    return resolved


def check_cotangent(name: str, d: Array, like: Array, backend: Backend) -> None:
    """Check a cotangent given to a cell's pullback against the output it belongs to."""
    resolve(backend, d)
    check_floating(**{name: d, "the output": like})
    check_shape(name, d, like.shape)
