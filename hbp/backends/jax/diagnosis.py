"""How far Highway-BP's gradients of a loss are from exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hbp import cells
from hbp.backends.jax.chains import BACKEND, Tree
from hbp.backends.jax.watching import watching
from hbp.core.backend import Array
from hbp.core.increments import Report
from hbp.core.registry import load
from hbp.core.solver import Solver
from hbp.diagnosis import Diagnosis, Settings, Spectrum, diagnosed
from hbp.directions import Rank


def diagnose(
    loss: Callable[..., Array],
    params: Tree,
    batch: Any,
    *,
    iterations: Sequence[int] = (0, 1, 2, 3, 5, 8),
    chunks: Sequence[int] = (1,),
    ranks: Sequence[int] = (0,),
    target: float = 0.05,
    plot: str | Path | None = None,
) -> Diagnosis:
    """Compare Highway-BP's gradient of one batch with the exact one, for several k, chunks and ranks.

    Rows are printed as they come; each setting is compiled twice, once with and once without its increments watched.
    Then all compiled settings are timed in turns, and the table is printed with the medians, and with the spectra of
    recurrent weights beside the flat edge that `hbp.directions` judges them by.

    Args:
        loss: ``loss(params, batch, iterations=k, chunk=S)``, a scalar, which hands k and S on to this library's
            transforms; where there are ranks, also ``rank=r``.
        params: a pytree; its top-level entries are the "layers" of the rows.
        batch: what the loss takes.
        iterations, chunks: the settings to try.
        ranks: how many strong directions of recurrent weights, each with every k and chunk, as numbers: "auto" needs
            the weights' own (``hbp.directions(weight, "auto").rank``), which a compiled loss does not know.
        target: the relative error of the gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The figures: ``exact`` and ``rows``; ``within``, the rows within the target; ``recommended``, the fastest of
        those and exact backprop, whose ``iterations``, ``chunk`` and ``rank`` are the setting; ``worse``, the rows
        whose rank is worse than none; ``spectra``, where there are ranks, of each `hbp.cells.GRUParameters` and
        `hbp.cells.LSTMParameters` in params; ``advice``.

    Raises:
        TypeError, ValueError: the loss is no finite scalar, or takes no rank where there are ranks, counts or ranks
            that are none, a target that is no number, or arrays of which other processes hold a part.
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
    settings = Settings(iterations, chunks, target, plot, ranks)
    if "auto" in settings.ranks:
        raise ValueError(
            "ranks holds 'auto', which needs the weights' numbers; here each setting is compiled: give "
            "hbp.directions(weight, 'auto').rank"
        )
    ranked = settings.ranks if any(settings.ranks) else ()
    _check_at_hand("params", params)
    _check_at_hand("batch", batch)

    def asked(solver: Solver, rank: Rank) -> dict[str, Any]:
        given = {"iterations": solver.iterations, "chunk": solver.chunk}
        return {**given, "rank": rank} if ranked else given

    value = loss(params, batch, **asked(Solver(), 0))
    if jnp.shape(value) or not jnp.isfinite(value):
        raise ValueError(f"the loss is {value}; a diagnosis needs a finite scalar")
    for rank in ranked:  # one that is not taken is told before any work
        jax.eval_shape(partial(loss, **asked(Solver(1), rank)), params, batch)
    programs: dict[tuple[Solver, Rank], Callable[..., Tree]] = {}

    def gradient(solver: Solver, rank: Rank) -> tuple[dict[str, list[Array]], dict[str, Report]]:
        one = partial(loss, **asked(solver, rank))
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
    return diagnosed(settings, load("numpy").backend, gradient, seconds, _spectra(params) if ranked else {})


def _spectra(params: Tree) -> dict[str, Spectrum]:
    """Of the recurrent weights of the cells inside of params, by their place; of stacked cells each its own."""
    kinds, found = (cells.GRUParameters, cells.LSTMParameters), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda part: isinstance(part, kinds)):
        if isinstance(leaf, kinds):
            name, shape = f"{jax.tree_util.keystr(path)}.weight_hh", leaf.weight_hh.shape[-2:]
            values = jnp.linalg.svd(BACKEND.widened(leaf.weight_hh), compute_uv=False)
            for index in product(*map(range, values.shape[:-1])):
                found[name + "".join(f"[{i}]" for i in index)] = Spectrum(tuple(values[index].tolist()), shape)
    return found


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
