"""hb.sequential, hb.scan, hb.gru and hb.lstm: exact ends are JAX's own gradients, iterates path sums or NumPy's."""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles import chunked_path_sum

import hbp

jax = pytest.importorskip("jax")
hb: Any = pytest.importorskip("hbp.backends.jax")
jnp = jax.numpy

L, B, D, T, I, H = 7, 3, 4, 7, 2, 5  # noqa: E741


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def arrays(seed: int, *shapes: Any) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(0.6 * rng.normal(size=shape)) for shape in shapes]


def close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float(abs(a - b).max()) <= tolerance * max(float(abs(b).max()), 1e-3 * largest)


def layer(params: Any, x: Any, scale: Any = 1.0) -> Any:
    return x + scale * jnp.tanh(x @ params["w"] + params["b"])


def stack() -> tuple[Any, Any]:
    w, b, x = arrays(0, (L, D, D), (L, D), (B, D))
    return {"w": w, "b": b}, x


def plain(params: Any, x: Any, scale: Any = 1.0) -> Any:
    for i in range(L):
        x = layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), x, scale)
    return x


def value(y: Any) -> Any:
    return sum(jnp.sin((i + 1) * leaf).sum() for i, leaf in enumerate(jax.tree.leaves(y)))


def gradient(run: Any, *given: Any) -> Any:
    return jax.grad(lambda *given: value(run(*given)), tuple(range(len(given))))(*given)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("k", "chunk"), [(None, 1), (L, 1), (9, 1), (4, 2), (3, 3), (2, 4), (1, 7), (1, 20)])
def test_a_stack_is_exact_in_the_end(k, chunk, jitted):
    params, x = stack()
    scale = jnp.asarray(0.7)
    run = partial(hb.sequential, layer, iterations=k, chunk=chunk)
    np.testing.assert_allclose(run(params, x, scale), plain(params, x, scale), rtol=1e-14)
    expected = gradient(plain, params, x, scale)
    found = (jax.jit(partial(gradient, run)) if jitted else partial(gradient, run))(params, x, scale)
    close(found, expected)


LEFT, RIGHT = np.linspace(-1, 1, D)[:, None], np.linspace(0.5, -0.5, D)[None]
RESIDUALS = {
    "identity": hbp.Identity(),
    "strong directions": hbp.Scalar(0.8) + hbp.LowRank(jnp.asarray(LEFT[None]), jnp.asarray(RIGHT[None])),
    "fixed point": hbp.Zero(),
    "mask": lambda params, x: hbp.Diagonal((x > 0).astype(x.dtype)),
    "matrix": lambda params, x: hbp.Dense(params["w"].T),
}


def residual_matrices(name: str, w: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The residual maps on flattened states (B D), (L, n, n)."""
    eye = np.eye(B * D)
    if name == "mask":
        return (states[:-1] > 0).reshape(L, 1, B * D) * eye
    if name == "matrix":
        return np.stack([np.kron(np.eye(B), W.T) for W in w])
    if name == "strong directions":
        return np.repeat(np.kron(np.eye(B), 0.8 * np.eye(D) + LEFT @ RIGHT)[None], L, 0)
    return np.repeat({"identity": 1.0, "fixed point": 0.0}[name] * eye[None], L, 0)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("name", RESIDUALS)
def test_iterates_of_a_stack_are_path_sums(name, chunk):
    """And all parameters' gradients what each layer's derivative, by hand, makes of g[i+1] of that iterate."""
    params, x = stack()
    w, b = (np.asarray(params[key]) for key in ("w", "b"))
    states = [np.asarray(x)]
    for i in range(L):
        states.append(states[-1] + np.tanh(states[-1] @ w[i] + b[i]))
    x = np.stack(states)
    slope = 1 - np.tanh(x[:-1] @ w + b[:, None]) ** 2
    block = np.einsum("lbv,luv,bc->lbvcu", slope, w, np.eye(B)).reshape(L, B * D, B * D)
    R, c = residual_matrices(name, w, x), np.zeros((L + 1, B * D))
    c[-1] = np.cos(x[-1]).reshape(-1)
    iterates = []
    for k in range(4):
        g = chunked_path_sum(R, np.eye(B * D) + block - R, c, k, chunk).reshape(L + 1, B, D)
        into = g[1:] * slope
        run = partial(hb.sequential, layer, iterations=k, chunk=chunk, residual=RESIDUALS[name])
        found = gradient(run, params, jnp.asarray(x[0]))
        expected = {"w": x[:-1].swapaxes(1, 2) @ into, "b": into.sum(1)}, g[0]
        close(found, jax.tree.map(jnp.asarray, expected))
        iterates.append(expected[0]["w"])
    for one, other in pairwise(iterates[: -(-L // chunk)]):  # no other iterate would have passed
        assert abs(one - other).max() > 1e-4 * abs(other).max()


def test_states_may_be_trees_and_layers_may_close_over_what_needs_gradients():
    params, x = stack()
    (scale,) = arrays(1, (D,))
    mask = jnp.arange(D) > 1

    def run(params: Any, x: Any, scale: Any, k: int | None) -> Any:
        def body(own: Any, state: Any) -> Any:
            a, b = state["a"], state["b"]
            return {"a": a + jnp.tanh(b @ own["w"]) * scale, "b": b + jnp.where(mask, a * own["b"], 0).sum(0)}

        return hb.sequential(body, params, {"a": x, "b": x[0]}, iterations=k)

    expected = gradient(partial(run, k=None), params, x, scale)
    assert float(abs(expected[2]).max()) > 0.01
    close(gradient(partial(run, k=L), params, x, scale), expected)
    close(jax.jit(partial(gradient, partial(run, k=L)))(params, x, scale), expected)


def test_rows_and_arguments_that_are_no_floats():
    params, x = stack()
    numbers, switch = jnp.arange(L), jnp.asarray(2)

    def body(own: Any, state: Any, switch: Any) -> Any:
        return layer(own[0], state) * jnp.where(own[1] > switch, 1.0, 0.5)

    def run(params: Any, x: Any, k: int | None) -> Any:
        return hb.sequential(body, (params, numbers), x, switch, iterations=k, chunk=2)

    close(gradient(partial(run, k=4), params, x), gradient(partial(run, k=None), params, x))


def cell(params: Any, h: Any, x: Any) -> Any:
    gates = x["x"] @ params["in"] + h @ params["hidden"]
    return jax.nn.sigmoid(gates[..., :H]), jnp.tanh(gates[..., H:])


def recurrence() -> tuple[Any, Any, Any]:
    w, v, h0, xs = arrays(2, (I, 2 * H), (H, 2 * H), (B, H), (T, B, I))
    return {"in": w, "hidden": v}, h0, {"x": xs}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("k", "chunk"), [(None, 1), (T, 1), (4, 2), (3, 3), (1, T)])
def test_a_scan_is_laxs(k, chunk, reverse):
    params, h0, xs = recurrence()

    def expected_run(params: Any, h0: Any, xs: Any) -> Any:
        def body(h: Any, x: Any) -> Any:
            gate, update = cell(params, h, x)
            return (h := gate * h + update), h

        return jax.lax.scan(body, h0, xs, reverse=reverse)

    run = partial(hb.scan, cell, iterations=k, chunk=chunk, reverse=reverse)
    close(run(params, h0, xs), expected_run(params, h0, xs))
    close(gradient(run, params, h0, xs), gradient(expected_run, params, h0, xs))


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("k", [0, 1, 2, T, None])
def test_a_gru_in_three_ways(k, chunk):
    shapes = ((3 * H, I), (3 * H, H), (3 * H,), (3 * H,))
    params = hbp.cells.GRUParameters(*arrays(3, *shapes))
    xs, h0 = arrays(4, (T, B, I), (B, H))

    def as_cell(params: Any, h: Any, x: Any) -> Any:
        a = jnp.split(x @ params.weight_ih.T + params.bias_ih, 3, -1)
        b = jnp.split(h @ params.weight_hh.T + params.bias_hh, 3, -1)
        r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
        return z, (1 - z) * jnp.tanh(a[2] + r * b[2])

    run = partial(hb.gru, iterations=k, chunk=chunk)
    found = gradient(run, params, xs, h0)
    dparams, dh0, dxs = gradient(partial(hb.scan, as_cell, iterations=k, chunk=chunk), params, h0, xs)
    close(found, (dparams, dxs, dh0))
    _, pullback = hbp.cells.gru(jax.tree.map(np.asarray, params), np.asarray(xs), np.asarray(h0))
    last, h = run(params, xs, h0)
    assert (last == h[-1]).all()
    dh = np.array(2 * jnp.cos(2 * h))
    dh[-1] += np.cos(last)
    expected = pullback(dh, iterations=k, chunk=chunk)
    close(found, jax.tree.map(jnp.asarray, tuple(expected)))


@pytest.mark.parametrize(("k", "chunk"), [(0, 1), (2, 1), (1, 3), (T, 1), (3, 3)])
def test_an_lstm(k, chunk):
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    params = hbp.cells.LSTMParameters(*arrays(5, *shapes))
    xs, h0, c0 = arrays(6, (T, B, I), (B, H), (B, H))
    found = gradient(partial(hb.lstm, iterations=k, chunk=chunk), params, xs, (h0, c0))
    exact = gradient(partial(hb.lstm, iterations=None), params, xs, (h0, c0))
    (last, memory), h = hb.lstm(params, xs, (h0, c0), iterations=k)
    as_numpy = jax.tree.map(np.asarray, (params, xs, (h0, c0)))
    _, pullback = hbp.cells.lstm(*as_numpy)
    dh, dc = np.array(3 * jnp.cos(3 * h)), np.zeros((T, B, H))
    dh[-1] += np.cos(last)
    dc[-1] = 2 * np.cos(2 * memory)
    close(found, jax.tree.map(jnp.asarray, tuple(pullback((dh, dc), iterations=k, chunk=chunk))))
    if k * chunk >= T:
        close(found, exact)


def test_transforms_compose():
    params, x = stack()
    run = partial(hb.sequential, layer, iterations=3)

    def loss(params: Any, x: Any) -> Any:
        return value(run(params, x))

    expected = jax.grad(loss)(params, x)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    found = jax.vmap(jax.grad(loss), (0, None))(many, x)  # over models
    close(jax.tree.map(lambda leaf: leaf[0], found), expected)
    found = jax.vmap(jax.grad(loss), (None, 0))(params, jnp.stack([2 * x, x]))  # over data
    close(jax.tree.map(lambda leaf: leaf[1], found), expected)
    found = jax.lax.map(lambda x: jax.grad(loss)(params, x), jnp.stack([x, x]))
    close(jax.tree.map(lambda leaf: leaf[1], found), expected)
    close(jax.grad(jax.checkpoint(loss))(params, x), expected)
    close(jax.jit(jax.value_and_grad(loss))(params, x)[1], expected)
    jax.jvp(partial(hb.sequential, layer, iterations=None), (params, x), (params, x))  # the plain program


def test_a_layer_may_close_over_a_vmapped_array():
    params, x = stack()
    (scales,) = arrays(7, (2, D))

    def run(scale: Any, params: Any) -> Any:
        return value(hb.sequential(lambda own, state: layer(own, state, scale), params, x, iterations=L))

    def expected(scale: Any, params: Any) -> Any:
        return value(plain(params, x, scale))

    close(jax.vmap(jax.grad(run, (0, 1)), (0, None))(scales, params),
          jax.vmap(jax.grad(expected, (0, 1)), (0, None))(scales, params))  # fmt: skip


PROGRAMS = {
    "grad": lambda f: jax.grad(f),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of checkpoint": lambda f: jax.grad(lambda w, m: jax.checkpoint(f)(w, m)),
    "grad of vmap": lambda f: jax.grad(lambda w, m: jax.vmap(lambda m: f(w, m))(jnp.stack([m, m])).mean()),
    "grad of scan": lambda f: jax.grad(lambda w, m: jax.lax.scan(lambda c, m: (c, f(w, m)), 0, m[None])[1].sum()),
    "grad of cond": lambda f: jax.jit(jax.grad(lambda w, m: jax.lax.cond(m[0], lambda: f(w, m), lambda: 0.0))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_masks_and_traced_residuals_may_be_closed_over(name):
    params, x = stack()
    mask = jnp.array([True, False, True, True])

    def loss(w: Any, mask: Any, k: int | None = L) -> Any:
        def masked(own: Any, x: Any) -> Any:
            return x + jnp.where(mask, jnp.tanh(x @ own), 0)

        def residual(_: Any, x: Any) -> Any:
            return hbp.Diagonal(jnp.where(mask, 0.9, 1.0) + 0 * x)

        y = value(hb.sequential(masked, w, x, iterations=k, residual=residual))
        return y + value(
            hb.sequential(masked, w, x, iterations=k, residual=hbp.Scalar(jnp.full(L, mask.mean().astype(x.dtype))))
        )

    expected = jax.grad(partial(loss, k=None))(params["w"], mask)
    close(PROGRAMS[name](loss)(params["w"], mask), expected)


def test_the_padding_of_the_last_stage_has_no_derivatives():
    w, x = jnp.array([1.0, 2.0, 0.0]), jnp.array([4.0])  # the last layer has none at its own result

    def loss(w: Any, chunk: int) -> Any:
        run = hb.sequential(lambda w, x: w * jnp.sqrt(x), w, x, iterations=3, chunk=chunk, residual=hbp.Zero())
        return run.sum()

    close(jax.grad(loss)(w, 2), jax.grad(loss)(w, 1))


def test_numbers_for_states_and_no_steps():
    found = jax.grad(lambda h: hb.scan(lambda p, h, x: (x, jnp.tanh(p * h)), 2.0, h, jnp.ones(4), iterations=9)[0])(0.3)
    assert np.isfinite(found)
    last, h = hb.scan(cell, *recurrence()[:2], {"x": jnp.ones((0, B, I))}, iterations=1)
    assert h.shape == (0, B, H)
    assert (last == recurrence()[1]).all()


def test_empty_batches():
    params, x = stack()
    dparams, dx = gradient(partial(hb.sequential, layer, iterations=2, chunk=3), params, x[:0])
    assert dx.shape == (0, D)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dparams))
    params, h0, xs = recurrence()
    found = gradient(partial(hb.scan, cell, iterations=2, chunk=2), params, h0[:0], {"x": xs["x"][:, :0]})
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))
    assert found[2]["x"].shape == (T, 0, I)


def transforms() -> dict[str, Any]:
    """Each transform as a function of its first state, (1, 2), and of k, over three layers or steps."""
    w, xs, hidden = arrays(8, (3, 2, 2), (3, 1, 2), (2, 2))
    grus = hbp.cells.GRUParameters(*arrays(9, (6, 2), (6, 2)))
    lstms = hbp.cells.LSTMParameters(*arrays(10, (8, 2), (8, 2)))

    def gated(w: Any, h: Any, x: Any) -> Any:
        return jax.nn.sigmoid(h @ w + x), jnp.tanh(h @ w - x)

    return {
        "sequential": lambda x, k: hb.sequential(lambda w, x: x + jnp.tanh(x @ w), w, x, iterations=k),
        "scan": lambda h, k: hb.scan(gated, hidden, h, xs, iterations=k)[1],
        "gru": lambda h, k: hb.gru(grus, xs, h, iterations=k)[1],
        "lstm": lambda h, k: hb.lstm(lstms, xs, (h, 2 * h), iterations=k)[1],
    }


@pytest.mark.parametrize("name", transforms())
def test_second_derivatives_are_those_of_the_truncated_gradient(name):
    run = transforms()[name]

    def first(x: Any, k: int | None) -> Any:
        return jax.grad(lambda x: jnp.sin(3 * run(x[None], k)).sum())(x)

    at, step = jnp.asarray([0.3, -0.8]), 1e-5
    exact = jax.jit(jax.jacfwd(partial(first, k=None)))(at)
    for k in (1, 3):
        hessian = jax.jit(jax.hessian(lambda x, k=k: jnp.sin(3 * run(x[None], k)).sum()))(at)
        own = jax.jit(partial(first, k=k))
        moved = [(own(at + step * e) - own(at - step * e)) / (2 * step) for e in jnp.eye(2)]
        np.testing.assert_allclose(hessian, jnp.stack(moved, -1), rtol=0, atol=1e-8)
        assert (abs(hessian - hessian.T).max() < 1e-12) == (k == 3)
        assert (abs(hessian - exact).max() < 1e-12) == (k == 3)


@pytest.mark.parametrize("name", transforms())
def test_forward_mode_is_the_plain_programs(name):
    run, (x, dx) = transforms()[name], arrays(11, (1, 2), (1, 2))
    tangent = jax.jvp(partial(run, k=None), (x,), (dx,))[1]
    np.testing.assert_allclose(tangent, (run(x + 1e-6 * dx, None) - run(x - 1e-6 * dx, None)) / 2e-6, atol=1e-8)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(run, k=2), (x,), (dx,))


def test_one_compilation_per_k():
    params, x = stack()
    traced = []

    @partial(jax.jit, static_argnames="k", donate_argnums=1)
    def step(params: Any, x: Any, k: int | None) -> Any:
        traced.append(k)
        return jax.grad(lambda params: value(hb.sequential(layer, params, x, iterations=k)))(params), x

    schedule = hbp.Schedule({0: 1, 3: 2, 5: None})
    for i in range(7):
        step(params, x + i, schedule(i))
    assert traced == [1, 2, None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_stay(dtype):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), stack())
    found = gradient(partial(hb.sequential, layer, iterations=2), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    mixed = {**params, "b": params["b"].astype("float32")}

    def cast(own: Any, state: Any) -> Any:
        return layer(own, state).astype(state.dtype)

    found = gradient(partial(hb.sequential, cast, iterations=2), mixed, x)
    assert found[0]["b"].dtype == jnp.float32


def test_without_x64():
    with jax.enable_x64(False):
        params, x = jax.tree.map(lambda leaf: leaf.astype("float32"), stack())
        found = gradient(partial(hb.sequential, layer, iterations=L), params, x)
        close(found, gradient(plain, params, x), 1e-4)
        assert not jax.config.jax_enable_x64


def test_no_layers_and_no_gradient():
    params, x = stack()
    assert (hb.sequential(layer, jax.tree.map(lambda leaf: leaf[:0], params), x, iterations=2) == x).all()


def test_diagnosis(capsys):
    params, x = stack()

    def loss(params: Any, x: Any, iterations: Any, chunk: int) -> Any:
        return value(hb.sequential(layer, params, x, iterations=iterations, chunk=chunk))

    found = hb.diagnose(loss, params, x, iterations=(0, 1, L), chunks=(1, 2))
    exact = jax.grad(loss)(params, x, None, 1)
    for row in found.rows:
        ours = jax.grad(loss)(params, x, row.iterations, row.chunk)
        a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (ours, exact))
        assert row.overall.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-6, abs=1e-9)
        assert row.overall.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        (report,) = row.reports.values()
        assert len(report.increments) == min(row.iterations, -(-L // row.chunk)) + 1
        assert report.exact == (row.iterations == L)
    assert list(found.rows[0].layers) == ["['b']", "['w']"]
    assert found.advice in capsys.readouterr().out

    def recurrent(params: Any, xs: Any, iterations: Any, chunk: int) -> Any:
        return value(hb.gru(params, xs, jnp.zeros((B, H)), iterations=iterations, chunk=chunk))

    weights = hbp.cells.GRUParameters(*arrays(3, (3 * H, I), (3 * H, H)))
    assert hb.diagnose(recurrent, weights, arrays(4, (T, B, I))[0], iterations=(T,)).rows[0].overall.error < 1e-6

    compiled = hb.diagnose(jax.jit(loss, static_argnames=("iterations", "chunk")), params, x, iterations=(1,))
    assert len(compiled.rows[0].reports) == 1
    found = hb.diagnose(lambda p, x, iterations, chunk: value(plain(p, x)), params, x, iterations=(1,))
    assert found.advice.startswith("no backward pass by Highway-BP was seen")

    def cancelling(w: Any, x: Any, iterations: Any, chunk: int) -> Any:
        return hb.sequential(lambda w, x: w * x, w, x, iterations=iterations, chunk=chunk).sum()

    hb.diagnose(cancelling, 0.1 * jnp.ones(9), jnp.ones(2), iterations=(2,))
    assert "damp the split" in capsys.readouterr().out


def test_the_fastest_median_within_the_target_is_recommended(monkeypatch, tmp_path, capsys):
    """On a clock of our own, on which k = L is once very fast; what is timed is compiled before, and not anew."""
    params, x = stack()
    costs = {None: (9, 9, 9), 0: (1, 1, 1), 3: (50, 7, 7), L: (1, 20, 20)}
    clock = iter([t for i in range(3) for own in costs.values() for t in (0, own[i])])
    monkeypatch.setattr(hb.diagnosis, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    traced = []

    def loss(params: Any, x: Any, iterations: Any, chunk: int) -> Any:
        traced.append("timing" in capsys.readouterr().out)
        return value(hb.sequential(layer, params, x, iterations=iterations, chunk=chunk))

    found = hb.diagnose(loss, params, x, iterations=(0, 3, L), target=0.1)
    assert not any(traced)
    assert next(clock, None) is None
    assert [row.seconds for row in (found.exact, *found.rows)] == [9, 1, 7, 20]
    assert [row.iterations for row in found.within] == [3, L]
    assert found.recommended.solver == hbp.Solver(iterations=3)
    assert (found.exact.solver, found.exact.overall.error) == (hbp.Solver(), 0)

    traced.clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        hb.diagnose(loss, params, x, plot=tmp_path / "found.png")
    assert not traced


PARAMS, X = (lambda: stack()[0]), (lambda: stack()[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hb.sequential(layer, {"w": jnp.asarray(1.0)}, X(), iterations=1), ValueError, r"params\['w'\] has no"),
        (
            lambda: hb.sequential(layer, {**PARAMS(), "b": jnp.ones((3, D))}, X(), iterations=1),
            ValueError,
            "different lengths on axis 0, the axis of the layers: .*'b'.*: 3, .*'w'.*: 7",
        ),
        (
            lambda: hb.sequential(layer, [{"b": jnp.ones(4), "u": jnp.ones(4), "w": jnp.ones(2)}], X(), iterations=1),
            ValueError,
            r"the layers: {\"params\[0\]\['b'\]\": 4, \"params\[0\]\['w'\]\": 2}; stack each array of all layers",
        ),
        (lambda: hb.sequential(layer, {}, X(), iterations=1), ValueError, "params holds no arrays"),
        (lambda: hb.sequential(lambda p, x: x[:1], PARAMS(), X(), iterations=1),
         ValueError, r"the layer returns float64 of shape \(1, 4\); its state"),
        (lambda: hb.sequential(lambda p, x: x.astype("float32"), PARAMS(), X(), iterations=1),
         ValueError, "must keep both"),
        (lambda: hb.sequential(lambda p, x: (x, x), PARAMS(), X(), iterations=1),
         TypeError, "the layer returns PyTreeDef"),
        (lambda: hb.sequential(layer, PARAMS(), X().astype(int), iterations=1), TypeError, "x is int64; give real"),
        (lambda: hb.sequential(layer, PARAMS(), X(), iterations=-1), ValueError, "iterations=-1 is too small"),
        (lambda: hb.sequential(layer, PARAMS(), X(), iterations=1, chunk=0), ValueError, "chunk=0 is too small"),
        (
            lambda: jax.jit(lambda k: hb.sequential(layer, PARAMS(), X(), iterations=k))(2),
            TypeError,
            "iterations is traced; give a Python int",
        ),
        (
            lambda: hb.sequential(layer, PARAMS(), X(), iterations=hbp.Schedule({0: 1})),
            TypeError,
            "iterations is a Schedule; call it",
        ),
        (
            lambda: hb.sequential(lambda p, s: s, PARAMS(), (X(), X()), iterations=1, residual=hbp.Diagonal(X())),
            TypeError,
            "states that are pytrees take",
        ),
        (
            lambda: gradient(partial(hb.sequential, layer, iterations=1, residual=lambda p, x: 1.0), PARAMS(), X()),
            TypeError,
            "residual returned a float; return one of hbp's operators",
        ),
        (lambda: hb.sequential("layer", PARAMS(), X(), iterations=1), TypeError, "layer is a str; give a function"),
        (lambda: hb.sequential(None, PARAMS(), X(), iterations=None), TypeError, "layer is a NoneType; give a func"),
        (lambda: hb.sequential(layer, "params", X(), iterations=1), TypeError, "params is a str; give arrays"),
        (lambda: hb.sequential(layer, PARAMS(), None, iterations=1), ValueError, "x holds no arrays"),
        (lambda: hb.sequential(layer, PARAMS(), X(), iterations=1, residual=0.5),
         TypeError, r"residual is a float; give a function, .* or an operator, as hbp.Scalar\(0.5\)"),
        (lambda: hb.sequential(layer, PARAMS(), X(), iterations=1, residual=hbp.Diagonal(jnp.ones((3, D)))),
         ValueError, "the residual Diagonal has 3 maps and the chain 7 layers"),
        (lambda: hb.sequential(layer, PARAMS(), X(), iterations=1, axis_name="i"),
         ValueError, "axis_name='i' names no mesh axis here .known: none.; call inside jax.shard_map"),
        (lambda: jax.vmap(lambda p: hb.sequential(layer, p, X(), iterations=1, axis_name="i"), axis_name="i")(PARAMS()),
         ValueError, "axis_name='i' names no mesh axis here"),
        (lambda: hb.scan("cell", *recurrence(), iterations=1), TypeError, "cell is a str; give a function"),
        (lambda: hb.scan(lambda p, h, x: h, *recurrence(), iterations=1),
         TypeError, "the cell returns a .*; expected two"),
        (lambda: hb.scan(lambda p, h, x: (h, h[0]), *recurrence(), iterations=1),
         ValueError, r"the cell's update is .* of shape \(5,\)"),
        (lambda: hb.scan(cell, *recurrence()[:2], {"x": 1.0}, iterations=1), ValueError, r"xs\['x'\] has no axis"),
        (lambda: hb.diagnose(lambda *_, **__: jnp.ones(2), 1.0, 1.0), ValueError, "a diagnosis needs a finite scalar"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
