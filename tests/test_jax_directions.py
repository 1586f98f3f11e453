"""Strong directions in JAX's recurrences: NumPy's iterates, path sums of explicit Jacobians, and what transforms do."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from oracles import chunked_path_sum

import hbp

jax = pytest.importorskip("jax")
hb: Any = pytest.importorskip("hbp.backends.jax")
jnp = jax.numpy

T, B, I, H = 6, 2, 3, 4  # noqa: E741


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def arrays(seed: int, *shapes: Any) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(abs(b).max()))


def problem(name: str) -> tuple[Any, Any, Any, Any]:
    """Parameters, inputs, initial states and cotangents of h."""
    kind, gates = (hbp.cells.GRUParameters, 3) if name == "gru" else (hbp.cells.LSTMParameters, 4)
    n = gates * H
    params = kind(*arrays(1, (n, I), (n, H), (n,), (n,)))
    xs, h0, c0, dh = arrays(2, (T, B, I), (B, H), (B, H), (T, B, H))
    return params, xs, h0 if name == "gru" else (h0, c0), dh


def gradient(name: str, rank: Any, **options: Any) -> Any:
    """A function of parameters, inputs and initial states: their gradients, where directions are given a function."""
    dh = problem(name)[-1]

    def loss(params: Any, xs: Any, h0: Any) -> Any:
        taken = rank(params) if callable(rank) else rank
        return (dh * getattr(hb, name)(params, xs, h0, rank=taken, **options)[1]).sum()

    return jax.grad(loss, (0, 1, 2))


def by_numpy(name: str, rank: Any, **options: Any) -> Any:
    params, xs, h0, dh = jax.tree.map(np.asarray, problem(name))
    pullback = getattr(hbp.cells, name)(params, xs, h0)[1]
    return jax.tree.map(jnp.asarray, tuple(pullback(dh if name == "gru" else (dh, None), rank=rank, **options)))


def quick(f: Any) -> Any:
    """Compiled, with more regard to the time this takes than to that of the result."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


both = pytest.mark.parametrize("name", ["gru", "lstm"])
SETTINGS = [{"iterations": 0}, {"iterations": 1, "chunk": 4}, {"iterations": None, "tolerance": 0.1}]


@both
def test_iterates_are_numpys(name):
    given = problem(name)[:3]
    found = [quick(gradient(name, 3, **options))(*given) for options in SETTINGS]
    for one, options in zip(found, SETTINGS, strict=True):
        close(one, by_numpy(name, 3, **options))
        other = by_numpy(name, 2, **options)  # which would not have passed
        assert float(abs(one[2][0] - other[2][0]).max()) > 1e-6 * float(abs(other[2][0]).max())
    close(quick(gradient(name, H, iterations=0))(*given), by_numpy(name, 0))


def test_directions_from_outside_are_followed_by_one_program():
    """They go in and out of a compiled training step, whose gradients are those of a decomposition at each step."""
    params, xs, h0, dh = problem("gru")
    traced = []

    def loss(params: Any, rank: Any) -> Any:
        return (dh * hb.gru(params, xs, h0, iterations=1, rank=rank)[1]).sum()

    @jax.jit
    def step(params: Any, found: Any) -> Any:
        traced.append(found.rank)
        found = hbp.directions(params.weight_hh, 2, start=found)
        return jax.grad(loss)(params, found), found

    found = hbp.directions(params.weight_hh, 2)
    expected = jax.grad(loss)(params, 2)
    for _ in range(3):
        gradients, found = step(params, found)
        close(gradients, expected)
    moved = params._replace(weight_hh=params.weight_hh[::-1, ::-1])
    for _ in range(60):
        gradients, found = step(moved, found)
    close(gradients, jax.grad(loss)(moved, 2), 1e-9)
    assert traced == [2]
    stale = jax.grad(loss)(params, hbp.directions(moved.weight_hh, 2))  # a worse split than the weight's own
    assert float(abs(stale[1] - expected[1]).max()) > 1e-3


@both
def test_automatic_takes_numbers_or_is_refused(name):
    given = problem(name)[:3]
    strong = given[0]._replace(weight_hh=0.1 * given[0].weight_hh.at[:].add(9.0))
    assert hbp.directions(strong.weight_hh, "auto").rank == H  # one above the edge, and the others
    found = gradient(name, "auto", iterations=0)(strong, *given[1:])
    close(found, gradient(name, H, iterations=0)(strong, *given[1:]))
    outside = hbp.directions(strong.weight_hh, "auto")
    close(quick(gradient(name, outside, iterations=0))(strong, *given[1:]), found)
    run = partial(getattr(hb, name), iterations=0, rank="auto")
    for program in (run, gradient(name, "auto", iterations=0)):
        with pytest.raises(TypeError, match=r"rank='auto' needs the weight's numbers; inside jax\.jit"):
            jax.jit(program)(*given)
    value = jax.jit(lambda params: run(params, *given[1:])[1].sum())
    with pytest.raises(TypeError, match="rank='auto' needs the weight's numbers"):
        jax.grad(value)(given[0])


def gru_cell(params: Any, h: Any, x: Any) -> Any:
    a = jnp.split(x @ params.weight_ih.T + params.bias_ih, 3, -1)
    b = jnp.split(h @ params.weight_hh.T + params.bias_hh, 3, -1)
    r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
    return z, (1 - z) * jnp.tanh(a[2] + r * b[2])


def own_cell(params: Any, h: Any, x: Any) -> Any:
    """A cell of no known kind: its gate reads h by one weight, its update by another."""
    return jax.nn.sigmoid(h @ params["gate"] + x), jnp.tanh(jnp.sin(3 * h @ params["inner"]) @ params["outer"])


def own_problem() -> tuple[Any, Any, Any, Any]:
    gate, inner, outer = arrays(3, (H, H), (H, 6), (6, H))
    return {"gate": gate, "inner": inner, "outer": outer}, *arrays(4, (B, H), (T, B, H), (T, B, H))


def own_gradient(rank: Any, cell: Any = own_cell, **options: Any) -> Any:
    """The gradients of parameters, first state and inputs, with the directions of the update's weight."""
    *_, dh = own_problem()
    options = {"weight": lambda params: params["inner"].T} | options

    def loss(params: Any, h0: Any, xs: Any) -> Any:
        return (dh * hb.scan(cell, params, h0, xs, rank=rank, **options)[1]).sum()

    return jax.grad(loss, (0, 1, 2))


@cache
def jacobians() -> tuple[Any, Any, Any]:
    """The states before the steps, their gates as matrices, and the steps' Jacobians."""
    params, h0, xs, _ = own_problem()
    before = [h0]
    for x in xs:
        before.append(own_step(params, before[-1], x))
    states = jnp.stack(before[:-1])
    whole = jax.jit(jax.vmap(jax.vmap(jax.jacrev(partial(own_step, params)))))(states, xs)
    return states, np.asarray(own_cell(params, states, xs)[0])[..., None] * np.eye(H), np.asarray(whole)


def own_step(params: Any, h: Any, x: Any) -> Any:
    gate, update = own_cell(params, h, x)
    return gate * h + update


def explicit(rank: int, k: int, chunk: int) -> Any:
    """The same by path sums of explicit Jacobians, R = diag(gate) + B V^T V with the rows V by NumPy."""
    params, _, xs, dh = own_problem()
    rows = np.linalg.svd(np.asarray(params["inner"]).T)[2][:rank]
    before, gates, whole = jacobians()
    residual = gates + (whole - gates) @ rows.T @ rows
    c = np.concatenate([np.zeros((1, B, H)), np.asarray(dh)])
    sums = [chunked_path_sum(residual[:, b], (whole - residual)[:, b], c[:, b], k, chunk) for b in range(B)]
    g = jnp.asarray(np.stack(sums, 1))
    dparams, _, dxs = jax.vjp(own_step, params, before, xs)[1](g[1:])
    return dparams, g[0], dxs


@pytest.mark.parametrize("chunk", [1, 4])
def test_iterates_of_ones_own_cell_are_those_of_explicit_jacobians(chunk):
    given = own_problem()[:3]
    for rank, k in ((1, 0), (3, 1)):
        close(quick(own_gradient(rank, iterations=k, chunk=chunk))(*given), explicit(rank, k, chunk))
    close(quick(own_gradient(H, iterations=0, chunk=chunk))(*given), explicit(0, T, 1))


def test_a_gru_written_as_ones_own_cell_is_the_gru():
    params, xs, h0, dh = problem("gru")

    def loss(params: Any, h0: Any, xs: Any, rank: Any, **options: Any) -> Any:
        return (dh * hb.scan(gru_cell, params, h0, xs, rank=rank, **options)[1]).sum()

    own, given = {"weight": lambda params: params.weight_hh}, hbp.directions(params.weight_hh, 2)
    expected = gradient("gru", 2, iterations=1)(params, xs, h0)
    for rank, options in ((2, own), (given, {})):
        first = quick(jax.grad(partial(loss, rank=rank, iterations=1, **options), (0, 1, 2)))
        dparams, dh0, dxs = first(params, h0, xs)
        close((dparams, dxs, dh0), expected)
    strong = params._replace(weight_hh=0.1 * (params.weight_hh + 9.0))
    with_auto = jax.grad(loss)(strong, h0, xs, "auto", iterations=0, **own)
    close(with_auto, jax.grad(loss)(strong, h0, xs, H, iterations=0, **own))
    with pytest.raises(TypeError, match="rank='auto' needs the weight's numbers"):
        jax.grad(jax.jit(partial(loss, rank="auto", iterations=0, **own)))(params, h0, xs)


def test_cells_without_forward_derivatives_have_directions_too():
    @jax.custom_vjp
    def tanh(x: Any) -> Any:
        return jnp.tanh(x)

    tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

    def cell(params: Any, h: Any, x: Any) -> Any:
        gate, _ = own_cell(params, h, x)
        return gate, tanh(jnp.sin(3 * h @ params["inner"]) @ params["outer"])

    given = own_problem()[:3]
    close(own_gradient(2, cell, iterations=1)(*given), own_gradient(2, iterations=1)(*given))


def test_a_tolerance_stops_as_numpys_and_is_reported():
    params, xs, h0, dh = jax.tree.map(np.asarray, problem("gru"))
    expected: list[Any] = []
    hbp.cells.gru(params, xs, h0)[1](dh, rank=2, tolerance=0.05, watch=expected.append)
    seen: list[Any] = []
    how = hbp.Solver(tolerance=0.05, watch=seen.append)
    given = problem("gru")

    def as_scan(params: Any, xs: Any, h0: Any) -> Any:
        run = partial(hb.scan, gru_cell, solver=how, rank=2, weight=lambda params: params.weight_hh)
        return jax.grad(lambda *own: (dh * run(own[0], own[2], own[1])[1]).sum(), (0, 1, 2))(params, xs, h0)

    for program in (gradient("gru", 2, solver=how), as_scan):
        jax.block_until_ready(quick(program)(*given[:3]))
        jax.effects_barrier()
        report = seen.pop()
        assert not seen
        assert 1 < len(report.increments) < T
        np.testing.assert_allclose(report.increments, expected[0].increments, rtol=1e-9)
        np.testing.assert_allclose(report.sizes, expected[0].sizes, rtol=1e-9)


def test_transforms_compose():
    params, xs, h0, dh = problem("gru")

    def loss(params: Any, xs: Any, rank: Any) -> Any:
        return (dh * hb.gru(params, xs, h0, iterations=1, rank=rank)[1]).sum()

    first = jax.grad(loss)
    expected = first(params, xs, 2)
    many = jax.tree.map(lambda leaf: jnp.stack([0.5 * leaf, leaf]), params)
    directions = jax.vmap(lambda weight: hbp.directions(weight, 2))(many.weight_hh)
    for found in (
        jax.vmap(lambda params: first(params, xs, 2))(many),
        jax.vmap(lambda params, rank: first(params, xs, rank))(many, directions),
        jax.vmap(lambda xs: first(params, xs, 2))(jnp.stack([2 * xs, xs])),
    ):
        close(jax.tree.map(lambda leaf: leaf[1], found), expected)
    close(jax.grad(jax.checkpoint(partial(loss, rank=2)))(params, xs), expected)
    inside = jax.grad(lambda params: loss(params, xs, hbp.directions(params.weight_hh, 2)))
    close(inside(params), expected)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda params: loss(params, xs, 2), (params,), (params,))


def test_second_derivatives_see_the_whole_weight():
    """At rank H and k = 0, and at k = T, the Hessian by a weight is the exact one: no direction is differentiated."""
    params = hbp.cells.GRUParameters(*arrays(5, (6, 2), (6, 2)))
    xs, h0 = arrays(6, (3, 1, 2), (1, 2))

    def gru(weight: Any, rank: int, k: int | None) -> Any:
        return hb.gru(params._replace(weight_hh=weight), xs, h0, iterations=k, rank=rank)[1]

    def scan(weight: Any, rank: int, k: int | None) -> Any:
        def cell(weight: Any, h: Any, x: Any) -> Any:
            own = params._replace(weight_hh=weight, bias_ih=jnp.zeros(6), bias_hh=jnp.zeros(6))
            return gru_cell(own, h, x)

        return hb.scan(cell, weight, h0, xs, iterations=k, rank=rank, weight=lambda weight: weight)[1]

    def hessian(run: Any, *how: Any) -> Any:
        return quick(jax.hessian(lambda weight: jnp.sin(3 * run(weight, *how)).sum()))(params.weight_hh)

    exact = hessian(gru, 0, None)
    for run, *how in ((gru, 2, 0), (gru, 1, 3), (scan, 2, 0)):
        close(hessian(run, *how), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_stay(dtype):
    tolerance = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 1e-5}[dtype]
    exact = gradient("gru", 0, iterations=None)(*problem("gru")[:3])
    params, xs, h0, dh = jax.tree.map(lambda leaf: leaf.astype(dtype), problem("gru"))

    def scan(params: Any, xs: Any, h0: Any) -> Any:
        run = partial(hb.scan, gru_cell, iterations=0, rank=H, weight=lambda params: params.weight_hh)
        return (dh * run(params, h0, xs)[1]).sum()

    def gru(params: Any, xs: Any, h0: Any) -> Any:
        return (dh * hb.gru(params, xs, h0, iterations=0, rank=H)[1]).sum()

    for loss in (gru, scan):
        found = quick(jax.grad(loss, (0, 1, 2)))(params, xs, h0)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {dtype}
        close(jax.tree.map(lambda leaf: leaf.astype("float64"), found), exact, tolerance)


@both
def test_nothing_has_gradients_of_zero(name):
    params, xs, h0, _ = problem(name)
    h0 = jax.tree.map(lambda state: state[:0], h0)
    run = getattr(hb, name)
    found = jax.grad(lambda *given: run(*given, iterations=1, chunk=2, rank=2)[1].sum(), (0, 1, 2))(
        params, xs[:, :0], h0
    )
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, (params, xs[:, :0], h0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))


OTHERS = hbp.directions(np.ones((4, 3)), 1)
INNER = {"weight": lambda params: params["inner"].T}


@pytest.mark.parametrize("k", [None, 1])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 2}, ValueError, r"rank=2 is given without weight; give a function params -> the matrix \(N, 4\)"),
        ({"rank": 2, "weight": "inner"}, TypeError, "weight is a str; give a function, params -> the matrix"),
        ({"rank": 0, "weight": "inner"}, TypeError, "weight is a str; give a function"),
        (
            {"rank": 2, "weight": lambda params: params["inner"]},
            ValueError,
            r"weight\(params\) is a .* of shape \(4, 6\); return the matrix \(N, 4\) .* as lambda params",
        ),
        ({"rank": 2, "weight": lambda params: params}, ValueError, r"weight\(params\) is a dict of shape \(\); return"),
        ({"rank": 5, **INNER}, ValueError, r"rank=5 is more than a weight of shape \(6, 4\) has"),
        ({"rank": -1, **INNER}, ValueError, "rank=-1 is too small"),
        ({"rank": "all", **INNER}, ValueError, "rank='all'; give a number of directions, 'auto'"),
        ({"rank": True, **INNER}, TypeError, "rank=True is a bool"),
        ({"rank": OTHERS}, TypeError, "the backend is 'jax' and the arrays belong to numpy"),
        ({"rank": OTHERS, **INNER}, TypeError, "the backend is 'jax' and the arrays belong to numpy"),
    ],
)
def test_bad_directions_of_ones_own_cell(options, error, message, k):
    with pytest.raises(error, match=message):
        hb.scan(own_cell, *own_problem()[:3], iterations=k, **options)


@both
@pytest.mark.parametrize("k", [None, 1])
def test_bad_directions(name, k):
    params, xs, h0, _ = problem(name)
    run = partial(getattr(hb, name), params, xs, h0, iterations=k)
    given = jax.tree.map(jnp.asarray, OTHERS)
    for rank, error, message in (
        (5, ValueError, r"rank=5 is more than a weight of shape \(\d+, 4\) has; give less"),
        (1.5, TypeError, "rank=1.5 is a float"),
        (OTHERS, TypeError, "several libraries"),
        (given, ValueError, r"the directions' left factor has shape \(4, 1\), expected"),
        (jax.tree.map(lambda leaf: leaf.astype("float32"), given), TypeError, "all arrays need one dtype"),
    ):
        with pytest.raises(error, match=message):
            run(rank=rank)
    with pytest.raises(TypeError, match="rank is traced; give a Python int, as a static argument of jit"):
        jax.jit(lambda rank: run(rank=rank))(2)
    with pytest.raises(ValueError, match=r"right factor has shape \(1, 3\), expected \(1, 4\)"):
        hb.scan(own_cell, *own_problem()[:3], iterations=k, rank=given)


def test_diagnosis_of_ranks(capsys):
    """Errors against JAX's own exact gradient, spectra against NumPy's; a loss that drops the rank is told."""
    weights = hbp.cells.GRUParameters(*arrays(3, (3 * H, I), (3 * H, H)))
    params, xs = {"cell": weights, "head": jnp.ones(H)}, arrays(4, (T, B, I))[0]

    def loss(params: Any, xs: Any, iterations: Any, chunk: int, rank: int) -> Any:
        h = hb.gru(params["cell"], xs, jnp.zeros((B, H)), iterations=iterations, chunk=chunk, rank=rank)[1]
        return jnp.square(h @ params["head"]).sum()

    def flat(iterations: Any, rank: int) -> Any:
        found = jax.grad(loss)(params, xs, iterations, 1, rank)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    found = hb.diagnose(loss, params, xs, iterations=(0,), ranks=(0, 2, H))
    assert [(row.iterations, row.rank) for row in found.rows] == [(0, 0), (0, 2), (0, H)]
    exact = flat(None, 0)
    errors = [np.linalg.norm(flat(row.iterations, row.rank) - exact) / np.linalg.norm(exact) for row in found.rows]
    np.testing.assert_allclose([row.overall.error for row in found.rows], errors, rtol=1e-6, atol=1e-9)
    assert errors[2] < 1e-9 < errors[1] != errors[0]  # of full rank, the path is all there is
    ((name, spectrum),) = found.spectra.items()
    assert name == "['cell'].weight_hh"
    np.testing.assert_allclose(spectrum.values, np.linalg.svd(weights.weight_hh, compute_uv=False))
    assert f"{name}: {spectrum}" in capsys.readouterr().out
    assert "does the loss hand rank on" not in found.advice

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def dropping(params: Any, *given: Any, rank: int, **how: Any) -> Any:
        return loss(jax.tree.map(lambda leaf: leaf[1], params), *given, **how, rank=0)

    found = hb.diagnose(dropping, stacked, xs, iterations=(1,), ranks=(0, 2))
    assert list(found.spectra) == [f"{name}[0]", f"{name}[1]"]
    np.testing.assert_allclose(found.spectra[f"{name}[1]"].values, [2 * value for value in spectrum.values])
    assert found.advice.endswith("no rank changed the gradient: does the loss hand rank on?")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        hb.diagnose(lambda params, xs, iterations, chunk: xs.sum(), params, xs, ranks=(2,))
    for ranks, message in (((0, "auto"), "give hbp.directions"), ((-1,), "rank"), ((H + 1,), "more than a weight")):
        with pytest.raises(ValueError, match=message):
            hb.diagnose(loss, params, xs, iterations=(1,), ranks=ranks)
    assert "exact" not in capsys.readouterr().out.rpartition("hand rank on?")[2]  # nothing was computed for these
