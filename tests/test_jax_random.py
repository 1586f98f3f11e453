"""Layers and cells that draw random numbers: gradients of what the forward drew, or a refusal."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import hbp

jax = pytest.importorskip("jax")
hb: Any = pytest.importorskip("hbp.backends.jax")
jnp = jax.numpy

L, D = 5, 4
OTHERS = ("rbg", "unsafe_rbg")
REFUSAL = r"the layers draw random numbers \(.*\) that come out otherwise .* threefry keys"


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def weights() -> Any:
    return 0.5 * jnp.asarray(np.random.default_rng(0).normal(size=(L, D, D)))


def masked(w: Any, x: Any, key: Any) -> Any:
    return x + jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.5, x.shape)


def rows(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
    params = (w, jax.random.split(key, L))
    return hb.sequential(lambda own, x: masked(own[0], x, own[1]), params, jnp.ones((2, D)), iterations=k, chunk=chunk)


def shared(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
    def layer(own: Any, x: Any, key: Any) -> Any:
        return masked(own[0], x, jax.random.fold_in(key, own[1]))

    return hb.sequential(layer, (w, jnp.arange(L)), jnp.ones((2, D)), key, iterations=k, chunk=chunk)


def closed_over(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
    def layer(own: Any, x: Any) -> Any:
        return masked(own[0], x, jax.random.fold_in(key, own[1]))

    return hb.sequential(layer, (w, jnp.arange(L)), jnp.ones((2, D)), iterations=k, chunk=chunk)


def in_a_scan(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
    def cell(w: Any, h: Any, key: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.5, h.shape)
        return jax.nn.sigmoid(h @ w), jnp.tanh(h @ w) * kept

    return hb.scan(cell, w[0], jnp.ones((2, D)), jax.random.split(key, L), iterations=k, chunk=chunk)[1]


def in_a_gate(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
    def cell(w: Any, h: Any, step: Any) -> Any:
        return jax.random.uniform(jax.random.fold_in(key, step), h.shape, h.dtype), jnp.tanh(h @ w)

    return hb.scan(cell, w[0], jnp.ones((2, D)), jnp.arange(L), iterations=k, chunk=chunk)[1]


PLACES = [rows, shared, closed_over, in_a_scan, in_a_gate]


def gradient(place: Any, key: Any, k: int | None, chunk: int = 1) -> Any:
    return jax.jit(jax.grad(lambda w: jnp.sin(place(key, w, k, chunk)).sum()))(weights())


def refused(place: Any, key: Any, k: int, chunk: int = 1) -> None:
    with pytest.raises(ValueError, match=REFUSAL):
        jax.eval_shape(lambda key: gradient(place, key, k, chunk), key)


@pytest.mark.parametrize("place", PLACES)
def test_threefry_draws_again_what_the_forward_drew(place):
    key = jax.random.key(1, impl="threefry2x32")
    np.testing.assert_allclose(gradient(place, key, 3, 2), gradient(place, key, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_other_generators_are_refused_where_gradients_are_taken(place):
    for impl in OTHERS:
        key = jax.random.key(1, impl=impl)
        for k, chunk in ((0, 1), (L, 1), (3, 2)):
            refused(place, key, k, chunk)
    value = jax.jit(partial(place, k=2, chunk=2))(key, weights())
    np.testing.assert_array_equal(value, jax.jit(partial(place, k=None))(key, weights()))
    assert jnp.isfinite(gradient(place, key, None)).all()


@pytest.mark.parametrize("impl", OTHERS)
def test_raw_keys_are_of_the_generator_that_jax_is_set_to(impl):
    with jax.default_prng_impl(impl):
        key = jax.random.PRNGKey(1)
        assert key.shape == (4,)
        for place in PLACES:
            refused(place, key, L)


@jax.custom_vjp
def rounded(x: Any, key: Any) -> Any:
    return x


rounded.defvjp(
    lambda x, key: (x, key),
    lambda key, g: (g + jax.random.uniform(key, g.shape, g.dtype), np.zeros((), jax.dtypes.float0)),
)

INSIDE = {
    "jit": lambda draw: jax.jit(draw),
    "checkpoint": lambda draw: jax.checkpoint(draw),
    "scan": lambda draw: lambda x, key: jax.lax.scan(lambda x, _: (draw(x, key), None), x, jnp.arange(2))[0],
    "cond": lambda draw: lambda x, key: jax.lax.cond(x.sum() > 1e3, lambda: x, lambda: draw(x, key)),
    "backward": lambda draw: lambda x, key: rounded(x, key),
    "gamma": lambda draw: lambda x, key: x + jax.random.gamma(key, 1.0 + 0 * x),
    "no key": lambda draw: lambda x, key: x * jax.lax.rng_uniform(0.0, 1.0, x.shape),
    "bits": lambda draw: lambda x, key: x * (jax.lax.rng_bit_generator(jax.random.key_data(key), x.shape)[1] % 2),
}


@pytest.mark.parametrize("name", INSIDE)
def test_draws_are_found_wherever_they_are(name):
    def place(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
        draw = INSIDE[name](lambda x, key: x * jax.random.uniform(key, x.shape, x.dtype))

        def layer(own: Any, x: Any) -> Any:
            return draw(x + jnp.tanh(x @ own[0]), own[1])

        return hb.sequential(layer, (w, jax.random.split(key, L)), jnp.ones((2, D)), iterations=k, chunk=chunk)

    refused(place, jax.random.key(1, impl="rbg"), L)


def test_a_residual_path_that_is_drawn():
    def place(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
        def residual(own: Any, x: Any) -> Any:
            return hbp.Diagonal(jax.random.uniform(own[1], x.shape, x.dtype))

        return hb.sequential(
            lambda own, x: x + jnp.tanh(x @ own[0]),
            (w, jax.random.split(key, L)),
            jnp.ones((2, D)),
            iterations=k,
            residual=residual,
        )

    jax.eval_shape(lambda key: gradient(place, key, 1), jax.random.key(1, impl="threefry2x32"))
    refused(place, jax.random.key(1, impl="rbg"), 1)


def test_draws_outside_of_the_layers_may_be_of_any_generator():
    def place(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
        kept = jax.random.bernoulli(key, 0.5, (L, 2, D))
        return hb.sequential(
            lambda own, x: x + jnp.tanh(x @ own[0]) * own[1], (w, kept), jnp.ones((2, D)), iterations=k
        )

    key = jax.random.key(1, impl="rbg")
    np.testing.assert_allclose(gradient(place, key, L), gradient(place, key, None), rtol=0, atol=1e-13)


def test_host_callbacks_are_called_for_each_layer():
    def place(key: Any, w: Any, k: int | None, chunk: int = 1) -> Any:
        def layer(own: Any, x: Any) -> Any:
            wanted = jax.ShapeDtypeStruct((), x.dtype)
            factor = jax.pure_callback(
                lambda w: np.asarray(w).sum(), wanted, jax.lax.stop_gradient(own), vmap_method="sequential"
            )
            return x + jnp.tanh(x @ own) * factor

        return hb.sequential(layer, w, jnp.ones((2, D)), iterations=k, chunk=chunk)

    np.testing.assert_allclose(gradient(place, None, L, 2), gradient(place, None, None), rtol=0, atol=1e-12)
