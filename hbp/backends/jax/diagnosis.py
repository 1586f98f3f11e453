"""How far Highway-BP's gradients of a loss are from exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends.jax.chains import Tree
from hbp.backends.jax.watching import watching
from hbp.core.backend import Array
from hbp.core.increments import Report
from hbp.core.registry import load
from hbp.core.solver import Solver
from hbp.diagnosis import Diagnosis, Settings, diagnosed
from hbp.directions import Rank


def diagnose(
    loss: Callable[..., Array],
    params: Tree,
    batch: Any,
    *,
    iterations: Sequence[int] = (0, 1, 2, 3, 5, 8),
    chunks: Sequence[int] = (1,),
    target: float = 0.05,
    plot: str | Path | None = None,
) -> Diagnosis:
    """Compare Highway-BP's gradient of one batch with the exact one, for several k and chunks.

    Rows are printed as they come; each setting is compiled twice, once with and once without its increments watched.
    Then all compiled settings are timed in turns, and the table is printed with the medians.

    Args:
        loss: ``loss(params, batch, iterations=k, chunk=S)``, a scalar, which hands k and S on to this library's
            transforms.
        params: a pytree; its top-level entries are the "layers" of the rows.
        batch: what the loss takes.
        iterations, chunks: the settings to try.
        target: the relative error of the gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The figures: ``exact`` and ``rows``; ``within``, the rows within the target; ``recommended``, the fastest of
        those and exact backprop, whose ``iterations`` and ``chunk`` are the setting; ``advice``.

    Raises:
        ValueError: the loss is no finite scalar, counts that are none, a target that is no number, or arrays of which
            other processes hold a part.
        ImportError, ValueError, OSError: the picture could not be drawn or written.

    >>> import hbp.backends.jax as hb
    >>> layer = lambda w, x: x + jnp.tanh(x @ w)
    >>> def loss(params, x, iterations, chunk):
    ...     return (hb.sequential(layer, params, x, iterations=iterations, chunk=chunk) ** 2).sum()
    >>> found = diagnose(loss, 0.1 * jnp.ones((4, 3, 3)), jnp.ones(3), iterations=(0, 4))
    ... # doctest: +ELLIPSIS
        k chunk  rank    error  cosine ...
    >>> [row.iterations for row in found.within], found.recommended.overall.error <= 0.05
    ([4], True)
    """
    settings = Settings(iterations, chunks, target, plot)
    _check_at_hand("params", params)
    _check_at_hand("batch", batch)
    value = loss(params, batch, iterations=None, chunk=1)
    if jnp.shape(value) or not jnp.isfinite(value):
        raise ValueError(f"the loss is {value}; a diagnosis needs a finite scalar")
    programs: dict[tuple[Solver, Rank], Callable[..., Tree]] = {}

    def gradient(solver: Solver, rank: Rank) -> tuple[dict[str, list[Array]], dict[str, Report]]:
        one = partial(loss, iterations=solver.iterations, chunk=solver.chunk)
        programs[solver, rank] = jax.jit(jax.grad(one)).lower(params, batch).compile()  # outlives the caches
        reports = {} if solver.exact else _reports(one, params, batch)
        found: dict[str, list[Array]] = {}
        on_host = jax.device_get(programs[solver, rank](params, batch))
        for path, leaf in jax.tree_util.tree_leaves_with_path(on_host):
            found.setdefault(jax.tree_util.keystr(path[:1]), []).append(leaf)
        return found, reports

    def seconds(solver: Solver, rank: Rank) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[solver, rank](params, batch))
        return time.perf_counter() - start

    # On the host, where comparing gradients compiles nothing.
    return diagnosed(settings, load("numpy").backend, gradient, seconds)


def _check_at_hand(name: str, tree: Tree) -> None:
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} lie on devices of other processes too, each of which would measure other times and recommend "
            "another setting; diagnose a model that fits into one process, or on fewer layers"
        )


def _reports(loss: Callable[..., Array], params: Tree, batch: Any) -> dict[str, Report]:
    """The reports on the backward passes of this loss."""
    reports: list[Report] = []
    jax.clear_caches()  # a loss that is compiled by itself is traced anew, to be watched, and again afterwards
    with watching(reports.append):
        jax.block_until_ready(jax.jit(jax.grad(lambda params, batch: loss(params, batch)))(params, batch))
    jax.effects_barrier()
    jax.clear_caches()
    return {f"pass {i}": report for i, report in enumerate(reports)}
