"""Layers spread over devices, and batches: on host devices, which XLA makes when it starts, so in a process apart."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

SCRIPT = """
import re
import sys
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import hbp
import hbp.backends.jax as hb

jax.config.update("jax_enable_x64", True)
devices = int(sys.argv[1])
assert len(jax.devices()) == devices
L, B, D = 2 * devices, 8, 5
rng = np.random.default_rng(0)
params = {"w": jnp.asarray(0.5 * rng.normal(size=(L, D, D))), "b": jnp.asarray(rng.normal(size=(L, D)))}
x, scale = jnp.asarray(rng.normal(size=(B, D))), jnp.asarray(rng.normal(size=D))
mesh = Mesh(np.array(jax.devices()), ("i",))

def layer(own, x, scale):
    return x + scale * jnp.tanh(x @ own["w"] + own["b"])

def mask(own, x):
    return hbp.Diagonal(0.5 + 0.5 * (x > 0))

def loss(run, *given):
    return jnp.sin(run(*given)).sum()

def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert float(abs(a - b).max()) <= 1e-11 * float(abs(b).max()), float(abs(a - b).max() / abs(b).max())

cases = [(None, 1, hbp.Identity(), True), (0, 1, hbp.Identity(), True), (1, 1, mask, True), (L, 1, mask, True)]
cases += [(2, 2, hbp.Scalar(0.9), True), (2, 1, mask, False), (None, 1, mask, False), (1, 1, hbp.Zero(), True)]
for k, chunk, residual, check in cases:
    run = partial(hb.sequential, layer, iterations=k, chunk=chunk, residual=residual)
    spread = jax.shard_map(
        partial(run, axis_name="i"), mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=P(), check_vma=check
    )
    gradient = jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))
    np.testing.assert_allclose(spread(params, x, scale), run(params, x, scale), rtol=1e-13)
    close(gradient(params, x, scale), jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale))
    text = gradient.lower(params, x, scale).compile().as_text()
    gathered = re.findall(r"f64\\[([0-9,]*)\\][^=]* all-gather", text)
    assert all(int(np.prod([int(n) for n in shape.split(",") if n])) <= devices * B * D for shape in gathered), gathered
    assert "all-to-all" not in text

run = partial(hb.sequential, layer, iterations=2)
expected = jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale)
for check in (True, False):
    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("i"), P()), out_specs=P("i"), check_vma=check)
    close(jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))(params, x, scale), expected)
weights = hbp.cells.GRUParameters(*(jnp.asarray(0.3 * rng.normal(size=s)) for s in ((15, D), (15, 5))))
def recurrent(weights, xs):
    return hb.gru(weights, xs, jnp.zeros((xs.shape[1], 5)), iterations=2)[1]
xs = jnp.asarray(rng.normal(size=(6, B, D)))
spread = jax.shard_map(recurrent, mesh=mesh, in_specs=(P(), P(None, "i")), out_specs=P(None, "i"))
expected = jax.grad(partial(loss, recurrent), (0, 1))(weights, xs)
close(jax.jit(jax.grad(partial(loss, spread), (0, 1)))(weights, xs), expected)
both = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "i"))
for k in (None, 2):
    run = partial(hb.sequential, layer, iterations=k)
    spread = jax.shard_map(
        partial(run, axis_name="i"), mesh=both, in_specs=(P("i"), P("data"), P()), out_specs=P("data")
    )
    expected = jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale)
    close(jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))(params, x, scale), expected)
def narrow(w, x):
    return jnp.sqrt(x - w)
w, at = jnp.concatenate([-8.0 * jnp.ones((L // 2, 1)), jnp.zeros((L // 2, 1))]), jnp.array([-4.0])
run = partial(hb.sequential, narrow, iterations=None)
spread = jax.shard_map(partial(run, axis_name="i"), mesh=mesh, in_specs=(P("i"), P()), out_specs=P())
close(jax.jit(jax.grad(lambda w: spread(w, at).sum()))(w), jax.grad(lambda w: run(w, at).sum())(w))
run = partial(hb.sequential, layer, iterations=2)
expected = jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale)
sharded = jax.device_put(x, NamedSharding(mesh, P("i")))
close(jax.jit(jax.grad(partial(loss, run), (0, 1, 2)))(params, sharded, scale), expected)

try:
    jax.shard_map(partial(run, axis_name="i", chunk=3), mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=P())(
        params, x, scale
    )
except ValueError as error:
    assert "chunk=3 does not divide the 2 layers of each device" in str(error), error
else:
    raise AssertionError("a stage that crosses devices")
print("all agree")
"""


@pytest.mark.parametrize("devices", [4, 8])
def test_host_devices(devices):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(devices)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all agree" in run.stdout
