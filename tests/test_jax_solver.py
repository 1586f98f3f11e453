"""The solver inside compiled programs: loops that stop early, reports, and programs that do not grow with k."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hbp
from hbp import Solver
from hbp.cells import GRUParameters, LSTMParameters

jax: Any = pytest.importorskip("jax")
hb: Any = pytest.importorskip("hbp.backends.jax")
jnp = jax.numpy

L, B, D = 12, 2, 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def layer(w: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ w)


def cell(w: Any, h: Any, x: Any) -> Any:
    return jax.nn.sigmoid(x + h @ w), jnp.tanh(x - h @ w)


def losses(rng: np.random.Generator) -> dict[str, Any]:
    """Name -> loss of weights and the transform's keywords, and the weights."""
    x, h0 = jnp.asarray(rng.normal(size=(L, B, D))), jnp.asarray(rng.normal(size=(B, D)))
    deep = jnp.asarray(0.3 * rng.normal(size=(L, D, D)))
    gru = GRUParameters(*(jnp.asarray(0.5 * rng.normal(size=(3 * D, D))) for _ in range(2)))
    lstm = LSTMParameters(*(jnp.asarray(0.5 * rng.normal(size=(4 * D, D))) for _ in range(2)))
    return {
        "sequential": (lambda w, **how: jnp.sin(hb.sequential(layer, w, h0, **how)).sum(), deep),
        "scan": (lambda w, **how: jnp.sin(hb.scan(cell, w, h0, x, **how)[1]).sum(), deep[0]),
        "gru": (lambda w, **how: jnp.sin(hb.gru(w, x, h0, **how)[1]).sum(), gru),
        "lstm": (lambda w, **how: jnp.sin(hb.lstm(w, x, (h0, h0), **how)[1]).sum(), lstm),
    }


def gradient(loss: Any, w: Any, **how: Any) -> np.ndarray:
    found = jax.jit(jax.grad(lambda w: loss(w, **how)))(w)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_compiled_loop_ends_at_once_where_nothing_is_finite(bad, rng):
    loss, w = losses(rng)["sequential"]
    reports: list[Any] = []
    how = Solver(tolerance=0.1, watch=reports.append)
    found = gradient(lambda w, **how: bad * loss(w, **how), w, solver=how)
    jax.effects_barrier()
    assert not np.isfinite(found).any()
    assert (len(reports), len(reports[0].increments), reports[0].finite) == (1, 1, False)


@pytest.mark.parametrize("name", ["sequential", "scan", "gru", "lstm"])
def test_a_compiled_loop_stops_at_the_tolerance(name, rng):
    loss, w = losses(rng)[name]
    reports: list[Any] = []
    capped = gradient(loss, w, solver=Solver(L, watch=reports.append))
    jax.effects_barrier()
    (full,) = reports
    shares = [a / b for a, b in zip(full.increments, full.sizes, strict=True)]
    assert len(shares) == L + 1
    assert full.exact
    np.testing.assert_allclose(capped, gradient(loss, w, iterations=None), rtol=1e-9, atol=1e-12)
    tolerance = (shares[3] * shares[2]) ** 0.5
    stop = next(k for k, share in enumerate(shares) if share <= tolerance)
    assert 1 < stop < L
    found = gradient(loss, w, iterations=None, tolerance=tolerance)
    np.testing.assert_allclose(found, gradient(loss, w, iterations=stop), rtol=1e-10, atol=1e-13)
    neighbours = [gradient(loss, w, iterations=k) for k in (stop - 1, stop + 1)]
    assert all(abs(found - other).max() > 1e-6 * abs(found).max() for other in neighbours)
    np.testing.assert_array_equal(
        gradient(loss, w, iterations=1, tolerance=tolerance), gradient(loss, w, solver=Solver(1, tolerance=tolerance))
    )
    np.testing.assert_allclose(
        gradient(loss, w, iterations=1, tolerance=tolerance), gradient(loss, w, iterations=1), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_program_does_not_grow_with_k(chunk, rng):
    deep = jnp.asarray(0.1 * rng.normal(size=(64, D, D)))
    x = jnp.asarray(rng.normal(size=(B, D)))

    def lines(k: int) -> int:
        def loss(w: Any) -> Any:
            return hb.sequential(layer, w, x, iterations=k, chunk=chunk).sum()

        return len(jax.jit(jax.grad(loss)).lower(deep).as_text().splitlines())

    assert lines(15) == lines(31) < 2 * lines(2)


def test_many_rounds_are_the_same_rounds(rng):
    loss, w = losses(rng)["sequential"]
    for k in (9, 11):  # compiled as a loop, and beyond it the exact gradient
        with_loop = gradient(loss, w, iterations=k)
        written_out = gradient(loss, w, solver=Solver(k, watch=lambda _: None))
        np.testing.assert_allclose(with_loop, written_out, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(gradient(loss, w, iterations=L), gradient(loss, w, iterations=None), rtol=1e-10)


def test_what_is_not_static_or_missing_is_refused(rng):
    loss, w = losses(rng)["sequential"]
    with pytest.raises(TypeError, match="give iterations=k, or None for exact backprop, or solver="):
        loss(w)
    for name in ("iterations", "chunk", "tolerance"):
        with pytest.raises(TypeError, match=f"{name} is traced"):
            jax.jit(lambda value, name=name: loss(w, **({"iterations": 1} | {name: value})))(1)
    with pytest.raises(TypeError, match="give one or the other"):
        loss(w, iterations=1, solver=Solver(2))
    with pytest.raises(TypeError, match="iterations is a Schedule"):
        loss(w, iterations=hbp.Schedule({0: 1}))
