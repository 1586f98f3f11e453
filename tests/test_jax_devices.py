"""Layers spread over devices, and batches: on host devices, which XLA makes when it starts, so in a process apart."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

DEVICES = 4
SETUP = """
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
x, scale = jnp.asarray(rng.normal(size=(B, D))), jnp.asarray(rng.normal(size=D))

def loss(run, *given):
    return jnp.sin(run(*given)).sum()

def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert float(abs(a - b).max()) <= 1e-11 * float(abs(b).max()), float(abs(a - b).max() / abs(b).max())

def refused(message, run, *given):
    try:
        run(*given)
    except (TypeError, ValueError) as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(message)
"""

SPREAD = """
params = {"w": jnp.asarray(0.5 * rng.normal(size=(L, D, D))), "b": jnp.asarray(rng.normal(size=(L, D)))}
mesh = Mesh(np.array(jax.devices()), ("i",))

def layer(own, x, scale):
    return x + scale * jnp.tanh(x @ own["w"] + own["b"])

def mask(own, x):
    return hbp.Diagonal(0.5 + 0.5 * (x > 0))

cases = [(None, 1, hbp.Identity(), True), (0, 1, hbp.Identity(), True), (1, 1, mask, True), (L, 1, mask, True)]
low = hbp.Scalar(0.9) + hbp.LowRank(x[:1, :, None] / 2, x[:1, None] / 4)
cases += [(2, 2, low, True), (2, 1, mask, False), (None, 1, mask, False), (1, 1, hbp.Zero(), True)]
for k, chunk, residual, check in cases:
    run = partial(hb.sequential, layer, iterations=k, chunk=chunk, residual=residual)
    spread = jax.shard_map(
        partial(run, axis_name="i"), mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=P(), check_vma=check
    )
    gradient = jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))
    np.testing.assert_allclose(spread(params, x, scale), run(params, x, scale), rtol=1e-13)
    close(gradient(params, x, scale), jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale))
    text = gradient.lower(params, x, scale).compile().as_text()
    assert "ENTRY" in text, text
    gathered = re.findall(r"f64\\[([0-9,]*)\\][^=]* all-gather", text)
    assert all(int(np.prod([int(n) for n in shape.split(",") if n])) <= devices * B * D for shape in gathered), gathered
    assert "all-to-all" not in text

half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), (params, x, scale))  # its scan adds up in float32
run = partial(hb.sequential, layer, iterations=1, residual=hbp.Scalar(0.9))
spread = jax.shard_map(partial(run, axis_name="i"), mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=P())
found, expected = (jax.jit(jax.grad(partial(loss, one), (0, 1, 2)))(*half) for one in (spread, run))
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert float(abs(a - b).max()) <= 0.05 * float(abs(b).max()), (a, b)

run = partial(hb.sequential, layer, iterations=2)
expected = jax.grad(partial(loss, run), (0, 1, 2))(params, x, scale)
for check in (True, False):
    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("i"), P()), out_specs=P("i"), check_vma=check)
    close(jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))(params, x, scale), expected)
weights = hbp.cells.GRUParameters(*(jnp.asarray(0.3 * rng.normal(size=s)) for s in ((15, D), (15, 5))))
xs = jnp.asarray(rng.normal(size=(6, B, D)))
for options in ({"iterations": 2}, {"iterations": None, "tolerance": 0.1, "rank": 2}):
    def recurrent(weights, xs):
        return hb.gru(weights, xs, jnp.zeros((xs.shape[1], 5)), **options)[1]
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

def spread(axis="i", specs=P("i"), chunk=1):
    run = partial(hb.sequential, layer, iterations=2, chunk=chunk, axis_name=axis)
    return jax.shard_map(run, mesh=mesh, in_specs=(specs, P(), P()), out_specs=P())

refused("chunk=3 does not divide the 2 layers of each device", spread(chunk=3), params, x, scale)
refused("same on all devices along axis_name='i', so each would run all", spread(specs=P()), params, x, scale)
refused("axis_name='j' names no mesh axis here .known: i.", spread("j"), params, x, scale)
alone = partial(hb.sequential, layer, iterations=2, axis_name="i")
refused("axis_name='i' names no mesh axis here .known: none.", alone, params, x, scale)
each = jax.tree.map(lambda leaf: leaf[:, None], params)
refused("names no mesh axis", jax.vmap(alone, (0, None, None), axis_name="i"), each, x, scale)

gentle = {"w": 0.2 * params["w"], "b": params["b"]}
here, there, found = [], [], {}
for seen in (here, there):
    run = partial(hb.sequential, layer, solver=hbp.Solver(tolerance=0.01, watch=seen.append))
    if seen is there:
        run = jax.shard_map(partial(run, axis_name="i"), mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=P())
    found[id(seen)] = jax.jit(jax.grad(partial(loss, run), (0, 1, 2)))(gentle, x, scale)
    jax.effects_barrier()
close(found[id(there)], found[id(here)])
assert len(here) == len(there) == 1
assert 1 < len(here[0].increments) < L
np.testing.assert_allclose(there[0].increments, here[0].increments, rtol=1e-9)
np.testing.assert_allclose(there[0].sizes, here[0].sizes, rtol=1e-9)

told = []
run = partial(hb.sequential, layer, solver=hbp.Solver(tolerance=0.01, watch=told.append))
specs = (P("i"), P("data"), P())
spread = jax.shard_map(partial(run, axis_name="i"), mesh=both, in_specs=specs, out_specs=P("data"))
close(jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))(gentle, x, scale), found[id(here)])
jax.effects_barrier()
assert len(told) == 1
np.testing.assert_allclose(told[0].increments, here[0].increments, rtol=1e-9)

def centred(own, x, scale, mean=lambda a: a.mean(0, keepdims=True)):  # layers that wait for all shards of the batch
    return x + scale * (jnp.tanh(x @ own["w"]) - mean(jnp.tanh(x @ own["w"])))

def over_batch(a):
    return jax.lax.pmean(a.mean(0, keepdims=True), "i")

expected = jax.grad(partial(loss, partial(hb.sequential, centred, iterations=None, tolerance=0.01)))(gentle, x, scale)
for check in (True, False):
    run = partial(hb.sequential, partial(centred, mean=over_batch), iterations=None, tolerance=0.01)
    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("i"), P()), out_specs=P("i"), check_vma=check)
    gradient = jax.grad(partial(loss, spread))
    if check:
        close(jax.jit(gradient)(gentle, x, scale), expected)
    else:
        refused("needs its check_vma=True, to stop on all of .'i'. at once", gradient, gentle, x, scale)
print("all agree")
"""

TENSOR = """
W = 6  # the width that is split: w is cut by columns, v by rows
params = {"w": jnp.asarray(0.5 * rng.normal(size=(L, D, W))), "v": jnp.asarray(0.5 * rng.normal(size=(L, W, D)))}

def layer(own, x, scale, sum=lambda a: a):
    return x + scale * jnp.tanh(sum(jnp.tanh(x @ own["w"]) @ own["v"]))

def mask(own, x):
    return hbp.Diagonal(0.5 + 0.5 * (x > 0))

def split(mesh, axis=None, x=P(), check=True, **options):
    run = partial(hb.sequential, partial(layer, sum=lambda a: jax.lax.psum(a, "t")), axis_name=axis, **options)
    specs = {"w": P(axis, None, "t"), "v": P(axis, "t")}
    return jax.shard_map(run, mesh=mesh, in_specs=(specs, x, P()), out_specs=x, check_vma=check)

def agree(mesh, axis=None, where=P(), check=True, **options):
    run, spread = partial(hb.sequential, layer, **options), split(mesh, axis, where, check, **options)
    expected = jax.jit(jax.value_and_grad(partial(loss, run), (0, 1, 2)))(params, x, scale)
    close(jax.jit(jax.value_and_grad(partial(loss, spread), (0, 1, 2)))(params, x, scale), expected)

tensor = Mesh(np.array(jax.devices()[:2]), ("t",))
for k, chunk, residual in ((None, 1, hbp.Identity()), (1, 1, hbp.Identity()), (2, 3, hbp.Identity()), (2, 1, mask)):
    agree(tensor, iterations=k, chunk=chunk, residual=residual)
agree(tensor, check=False, iterations=1)
agree(Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "t")), where=P("data"), iterations=1)
depth = Mesh(np.array(jax.devices()).reshape(2, 2), ("i", "t"))
for options in ({"iterations": None}, {"iterations": 1}, {"iterations": 1, "chunk": 2, "residual": mask}):
    agree(depth, "i", **options)

def own_maps(own, x):
    return hbp.Diagonal(own["v"].sum() + 0 * x)

refused("the residual maps vary over the mesh axes .'t'. and the states do not",
        jax.grad(partial(loss, split(tensor, iterations=1, residual=own_maps))), params, x, scale)

def cell(own, h, x, sum=lambda a: a):
    update = sum(jnp.tanh(h @ own["w"]) @ own["v"])
    return jax.nn.sigmoid(x + update), jnp.tanh(update)

first = {"w": params["w"][0], "v": params["v"][0]}
xs = jnp.asarray(rng.normal(size=(6, B, D)))
whole = hbp.directions(first["w"].T, 2)  # of a weight of which each device has a part

def steps(own, x, xs, k, rank, weight=None, **options):
    return hb.scan(partial(cell, **options), own, x, xs, iterations=k, rank=rank, weight=weight)[1]

for k, rank, weight in ((None, 0, None), (2, 0, None), (1, whole, None), (1, 2, lambda own: own["w"].T)):
    run = partial(steps, k=k, rank=rank, weight=weight)
    spread = jax.shard_map(partial(run, sum=lambda a: jax.lax.psum(a, "t")), mesh=tensor,
                           in_specs=({"w": P(None, "t"), "v": P("t")}, P(), P()), out_specs=P())
    if weight is not None:
        refused("the residual maps vary over the mesh axes .'t'. and the states do not", spread, first, x, xs)
        continue
    expected = jax.jit(jax.grad(partial(loss, run), (0, 1, 2)))(first, x, xs)
    close(jax.jit(jax.grad(partial(loss, spread), (0, 1, 2)))(first, x, xs), expected)
print("all agree")
"""


@pytest.mark.parametrize("script", [SPREAD, TENSOR], ids=["depth", "tensor"])
def test_host_devices(script):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", SETUP + script, str(DEVICES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all agree" in run.stdout
