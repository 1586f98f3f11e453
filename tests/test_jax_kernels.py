"""The Pallas suffix scan against a plain loop: in Pallas's interpreter, lowered for CUDA, and on a device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from hbp import Dense, Diagonal, Identity, Scalar

jax = pytest.importorskip("jax")
kernels: Any = pytest.importorskip("hbp.backends.jax.kernels")
jnp = jax.numpy

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

LENGTHS = (0, 1, 2, 3, 127, 128, 129, 1000)
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


interpret = partial(kernels.suffix_scan, interpret=True)


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, with more regard to the time this takes than to that of the result."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The scan in the interpreter, compiled; with short tiles, of which a test's lengths have several."""
    monkeypatch.setattr(kernels, "GUESSED", replace(kernels.GUESSED, rows=2))
    return quick(interpret)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of splits in time, and a length that leaves the last chunk shorter."""
    monkeypatch.setattr(kernels, "GUESSED", replace(kernels.GUESSED, shortest=7, lanes=32))


def loop(a: Any, c: Any) -> np.ndarray:
    """The definition, in float64."""
    g = np.array(c, float)
    a = np.broadcast_to(np.asarray(a, float), (len(g) - 1, *g.shape[1:]))
    for i in reversed(range(len(a))):
        g[i] += a[i] * g[i + 1]
    return g


def definition(operator: Diagonal, c: Any) -> Any:
    """The same in JAX, to differentiate."""
    g = [c[-1]]
    for i in reversed(range(len(c) - 1)):
        g.append(operator.values[i] * g[-1] + c[i])
    return jnp.stack(g[::-1])


def close(found: Any, a: Any, c: Any) -> None:
    assert found.dtype == c.dtype
    assert found.shape == c.shape
    unit, scale = UNITS[str(c.dtype)], loop(np.abs(np.asarray(a, float)), np.abs(np.asarray(c, float)))
    relative, subnormal = (4 * (len(c) + 2) * unit, 0.0) if unit < 2.0**-20 else (1.1 * unit, 2.0**-24)
    np.testing.assert_array_less(np.abs(np.asarray(found, float) - loop(a, c)), relative * scale + subnormal)


def problem(rng: np.random.Generator, n: int, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    a = jnp.asarray(rng.uniform(0.5, 1.05, (n, *shape))).astype(dtype)
    return a, jnp.asarray(rng.uniform(0, 0.1, (n + 1, *shape))).astype(dtype)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_the_interpreted_kernel_computes_the_loop(n, dtype, interpreted, rng):
    a, c = problem(rng, n, (2, 5), dtype)
    found = interpreted(Diagonal(a), c)
    assert isinstance(found, jax.Array)
    close(found, a, c)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(("n", "launches", "dtype"), [(29, 3, "bfloat16"), (200, 5, "float64")])
def test_splits_of_splits_compute_the_loop(n, launches, dtype, interpreted, rng):
    a, c = problem(rng, n, (13,), dtype)
    assert str(jax.make_jaxpr(interpret)(Diagonal(a), c)).count("pallas_call[") == launches
    close(interpreted(Diagonal(a), c), a, c)
    close(interpreted(Identity(), c), 1.0, c)


@pytest.mark.parametrize("own", [(), (1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 2, 4), (3, 1, 4), (3, 2, 4)], ids=str)
def test_values_that_broadcast(own, interpreted, rng):
    _, c = problem(rng, 5, (3, 2, 4), "float32")
    a = jnp.asarray(rng.uniform(0.5, 1, (5, *own)), jnp.float32)
    if own:
        close(interpreted(Diagonal(a), c), a, c)
    else:
        close(interpreted(Scalar(a), c), a.reshape(5, 1, 1, 1), c)


@pytest.mark.parametrize("n", [1, 130])
def test_numbers_and_single_channels(n, interpreted, rng):
    a, c = problem(rng, n, (), "float32")
    close(interpreted(Identity(), c), 1.0, c)
    close(interpreted(Scalar(-0.998), c), -0.998, c)
    close(interpreted(Diagonal(a), c), a, c)


def test_more_channels_than_lanes_and_none(interpreted, rng):
    a, c = problem(rng, 4, (2 * kernels.GUESSED.lanes + 1,), "float32")
    close(interpreted(Diagonal(a), c), a, c)
    assert interpreted(Diagonal(a[:, :0]), c[:, :0]).shape == (5, 0)


def test_default_tiles(rng):
    a, c = problem(rng, 2 * kernels.GUESSED.rows + 1, (3,), "float32")
    close(quick(interpret)(Diagonal(a), c), a, c)


@pytest.mark.usefixtures("split", "interpreted")
def test_under_vmap(rng):
    a, c = problem(rng, 30, (2, 5), "float64")
    close(quick(jax.vmap(lambda a, c: interpret(Diagonal(a), c), 1, 1))(a, c), a, c)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_definition(shared, rng):
    a, c = problem(rng, 3, (2, 3), "float64")
    a = a[:, :1] if shared else a
    weights = jnp.asarray(rng.normal(size=c.shape))

    def gradients(scan: Any) -> Any:
        def loss(a: Any, c: Any) -> Any:
            return (weights * jnp.sin(scan(Diagonal(a), c))).sum()

        def second(a: Any, c: Any) -> Any:
            return sum(jnp.cos(g).sum() for g in jax.grad(loss, (0, 1))(a, c))

        return quick(jax.grad(loss, (0, 1)))(a, c), quick(jax.grad(second, (0, 1)))(a, c)

    for found, expected in zip(*map(jax.tree.leaves, (gradients(interpret), gradients(definition))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_what_is_refused_is_named():
    with pytest.raises(TypeError, match="bfloat16, float16, float32, float64, not int32"):
        kernels.suffix_scan(Identity(), jnp.arange(3, dtype="int32"))
    with pytest.raises(TypeError, match=r"Diagonal, Scalar .* Identity, not Dense"):
        kernels.suffix_scan(Dense(jnp.ones((2, 3, 3))), jnp.ones((3, 3)))


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize(("n", "shape", "launches"), [(40, (64, 257), 1), (1000, (2, 5), 3)])
def test_lowered_for_a_device(n, shape, launches, dtype):
    a, c = jax.ShapeDtypeStruct((n, *shape), dtype), jax.ShapeDtypeStruct((n + 1, *shape), dtype)
    kind = jax.sharding.AbstractDevice
    device = kind("NVIDIA H200", 132, *["gpu"][: len(inspect.signature(kind).parameters) - 2])  # JAX 0.10's third
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        for scan in (kernels.suffix_scan, jax.vmap(kernels.suffix_scan, 1, 1)):
            lowered = jax.jit(scan).trace(Diagonal(a), c).lower(lowering_platforms=("cuda",))
            assert lowered.as_text().count("triton") == launches


@pytest.mark.parametrize("replicated", ["neither", "values", "states"])
def test_mesh_axes_are_kept_account_of(replicated):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = jax.P(None, "x"), jax.P()
    specs = whole if replicated == "values" else spread, whole if replicated == "states" else spread
    scan = jax.shard_map(lambda a, c: kernels.suffix_scan(Diagonal(a), c), mesh=mesh, in_specs=specs, out_specs=spread)
    gradient = jax.grad(lambda a, c: scan(a, c).sum(), (0, 1))
    assert str(jax.make_jaxpr(gradient)(jnp.ones((300, 4)), jnp.ones((301, 4)))).count("pallas_call[") == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", UNITS)
def test_on_a_device(dtype, rng):
    if jax.default_backend() != "gpu":
        pytest.skip(f"jax {jax.__version__} finds no CUDA device")
    scan = jax.jit(kernels.suffix_scan)
    for n, shape in [*((n, (2, 5)) for n in LENGTHS), (20000, ()), (200, (64, 257))]:
        a, c = problem(rng, n, shape, dtype)
        close(scan(Diagonal(a), c), a, c)
    for values in (a[:, :1], a[..., :1]):
        close(scan(Diagonal(values), c), values, c)
    close(scan(Scalar(a[:, 0, 0]), c), a[:, :1, :1], c)
    close(scan(Scalar(0.998), c), 0.998, c)
    close(scan(Identity(), c), 1.0, c)
    close(jax.vmap(lambda a, c: kernels.suffix_scan(Diagonal(a), c), 1, 1)(a, c), a, c)
