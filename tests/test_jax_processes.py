"""Layers spread over processes: `axis_name=` where a mesh axis crosses two of them, on gloo's collectives.

Their sets of names differ in order, as those of strings do from process to process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("jax")

PROCESSES = 2

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

rank, processes, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, processes, rank, initialization_timeout=100)
mesh = Mesh(np.array(jax.devices()), ("i",))
both = Mesh(np.array(jax.devices()).reshape(processes, -1).T, ("data", "i"))
assert jax.process_count() == processes == mesh.size / 2
L, B, D = 8, 4, 3
rng = np.random.default_rng(0)
params = {"w": 0.5 * rng.normal(size=(L, D, D)), "b": rng.normal(size=(L, D))}
x, scale = rng.normal(size=(B, D)), rng.normal(size=D)

def layer(own, x, scale):
    return x + scale * jnp.tanh(x @ own["w"] + own["b"])

def mask(own, x):
    return hbp.Diagonal(0.5 + 0.5 * (x > 0))

def loss(run, *given):
    return jnp.sin(run(*given)).sum()

def put(array, spec, grid=mesh):  # of an array that every process has: what its own devices hold
    return jax.make_array_from_callback(array.shape, NamedSharding(grid, spec), lambda index: array[index])

def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        size = float(abs(b).max())
        for shard in a.addressable_shards:
            assert float(abs(np.asarray(shard.data) - np.asarray(b)[shard.index]).max()) <= 1e-12 * size

def agree(given=params, check=True, grid=mesh, **options):
    here, own = partial(hb.sequential, layer, **options), P(*grid.axis_names[:-1])  # a batch along data
    spread = jax.shard_map(
        partial(here, axis_name="i"), mesh=grid, in_specs=(P("i"), own, P()), out_specs=own, check_vma=check
    )
    placed = jax.tree.map(lambda leaf: put(leaf, P("i"), grid), given), put(x, own, grid), put(scale, P(), grid)
    program = jax.jit(jax.grad(partial(loss, spread), (0, 1, 2))).lower(*placed).compile()
    close(program(*placed), jax.jit(jax.grad(partial(loss, here), (0, 1, 2)))(given, x, scale))
    text = program.as_text()
    assert "ENTRY" in text, text
    gathered = re.findall(r"f64\\[([0-9,]*)\\][^=]* all-gather", text)
    assert all(int(np.prod([int(n) for n in shape.split(",") if n])) <= mesh.size * B * D for shape in gathered)
    jax.effects_barrier()

agree(iterations=None)
agree(iterations=0)
agree(iterations=1, residual=mask)
agree(iterations=2, chunk=2, residual=hbp.Scalar(0.9), check=False)
agree(iterations=L)

told = []
agree(params | {"w": 0.2 * params["w"]}, grid=both, solver=hbp.Solver(tolerance=0.01, watch=told.append))
assert len(told) == (2 if rank == 0 else 1)  # of both programs, of that of this process alone
assert 1 < len(told[0].increments) < L
np.testing.assert_allclose(told[0].increments, told[-1].increments, rtol=1e-9)

placed = jax.tree.map(lambda leaf: put(leaf, P("i")), params)
def diagnosed(params, x, **options):
    return loss(partial(hb.sequential, layer, **options), params, x, scale)

try:
    hb.diagnose(diagnosed, placed, x)
except ValueError as error:
    assert re.search("params lie on devices of other processes too.*one process", str(error)), error
else:
    raise AssertionError("a diagnosis in several processes would let each recommend another setting")
print("all agree", list({"data", "i"}))
"""


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(PROCESSES), address],
            env=environment | {"PYTHONHASHSEED": str(2 * rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        ends = [(*child.communicate(timeout=300), child.returncode) for child in children]
        for printed, errors, code in ends:
            assert code == 0, errors[-3000:]
            assert "all agree" in printed
        assert ends[0][0] != ends[1][0], "the order of a set does not depend on the process here"
    finally:
        for child in children:
            child.kill()  # a process that waits for another one hears no SIGTERM
            child.communicate()
