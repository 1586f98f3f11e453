"""hb.sequential under optax, Equinox and Flax NNX, as small examples."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")
hb: Any = pytest.importorskip("hbp.backends.jax")
jnp = jax.numpy

L, D = 6, 4


def data() -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (16, D))
    return x, jnp.roll(x, 1, axis=-1)


def test_optax():
    optax: Any = pytest.importorskip("optax")
    params = {"w": 0.1 * jax.random.normal(jax.random.key(0), (L, D, D)), "b": jnp.zeros((L, D))}
    x, target = data()

    def loss(params: Any, iterations: int | None) -> Any:
        def layer(own: Any, x: Any) -> Any:
            return x + jnp.tanh(x @ own["w"] + own["b"])

        return jnp.square(hb.sequential(layer, params, x, iterations=iterations) - target).mean()

    optimiser = optax.adam(3e-2)
    state = optimiser.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, 2)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_equinox():
    eqx: Any = pytest.importorskip("equinox")
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(D, D, 8, 1, key=key))
    params, static = eqx.partition(make(jax.random.split(jax.random.key(0), L)), eqx.is_inexact_array)
    x, target = data()

    def loss(params: Any, iterations: int | None) -> Any:
        def layer(own: Any, x: Any) -> Any:
            return x + jax.vmap(eqx.combine(own, static))(x)

        return jnp.square(hb.sequential(layer, params, x, iterations=iterations) - target).mean()

    exact, found = (eqx.filter_grad(loss)(params, k) for k in (None, L))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert float(abs(a - b).max()) <= 1e-4 * float(abs(b).max())


def test_flax_nnx():
    nnx: Any = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.linear = nnx.Linear(D, D, rngs=rngs)
            self.norm = nnx.LayerNorm(D, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(self.linear(self.norm(x)))

    blocks = [Block(nnx.Rngs(i)) for i in range(L)]
    graph = nnx.split(blocks[0])[0]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(block)[1] for block in blocks))
    x, target = data()

    def loss(params: Any, iterations: int | None) -> Any:
        run = hb.sequential(lambda own, x: nnx.merge(graph, own)(x), params, x, iterations=iterations)
        return jnp.square(run - target).mean()

    exact, found = (jax.grad(loss)(params, k) for k in (None, L))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert float(abs(a - b).max()) <= 1e-4 * float(abs(b).max())
