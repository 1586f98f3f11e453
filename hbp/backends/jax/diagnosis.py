"""How far Highway-BP's gradients of a loss are from exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends.jax.chains import Tree
from hbp.backends.jax.watching import watching
from hbp.core.backend import Array
from hbp.core.increments import Report
from hbp.diagnosis import Agreement, Diagnosis, Row, check_settings, diagnosed

REPEATS = 3


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

    Args:
        loss: ``loss(params, batch, iterations=k, chunk=S)``, a scalar, which hands k and S on to this library's
            transforms.
        params: a pytree; its top-level entries are the "layers" of the rows.
        batch: what the loss takes.
        iterations, chunks: the settings to try.
        target: the relative error of the gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The figures: ``rows``, ``recommended`` (a row, or None), ``advice``.

    Raises:
        ValueError: the loss is no finite scalar, or counts that are none.

    >>> import hbp.backends.jax as hb
    >>> layer = lambda w, x: x + jnp.tanh(x @ w)
    >>> def loss(params, x, iterations, chunk):
    ...     return (hb.sequential(layer, params, x, iterations=iterations, chunk=chunk) ** 2).sum()
    >>> found = diagnose(loss, 0.1 * jnp.ones((4, 3, 3)), jnp.ones(3), iterations=(0, 4))
    ... # doctest: +ELLIPSIS
       k  chunk     error   cosine ...
    >>> found.recommended.iterations
    4
    """
    settings = check_settings(iterations, chunks)
    value = loss(params, batch, iterations=None, chunk=1)
    if jnp.shape(value) or not jnp.isfinite(value):
        raise ValueError(f"the loss is {value}; a diagnosis needs a finite scalar")

    def run(k: int | None, chunk: int) -> tuple[Tree, float, dict[str, Report]]:
        def one(params: Tree, batch: Any) -> Array:
            return loss(params, batch, iterations=k, chunk=chunk)

        timed = jax.jit(jax.grad(one))
        found, best = jax.block_until_ready(timed(params, batch)), float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(timed(params, batch))
            best = min(best, time.perf_counter() - start)
        reports: list[Report] = []
        jax.clear_caches()  # a loss that is compiled by itself is traced anew, to be watched, and again afterwards
        with watching(reports.append):
            jax.block_until_ready(jax.jit(jax.grad(lambda params, batch: one(params, batch)))(params, batch))
        jax.effects_barrier()
        jax.clear_caches()
        return found, best, {f"pass {i}": report for i, report in enumerate(reports)}

    exact, exact_seconds, _ = run(None, 1)

    def row(k: int, chunk: int) -> Row:
        found, seconds, reports = run(k, chunk)
        squares: dict[str, list[tuple[float, ...]]] = {}
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True):
            squares.setdefault(jax.tree_util.keystr(path[:1]), []).append(_squares(a, b))
        layers = {name: Agreement.summed(own) for name, own in squares.items()}
        overall = Agreement.summed(one for own in squares.values() for one in own)
        return Row(k, chunk, overall, layers, reports, seconds)

    return diagnosed(row, settings, exact_seconds, target, plot)


def _squares(found: Array, exact: Array) -> tuple[float, ...]:
    a, b = found.ravel(), exact.ravel()
    return tuple(map(float, (jnp.vdot(a - b, a - b), jnp.vdot(b, b), jnp.vdot(a, a), jnp.vdot(a, b))))
