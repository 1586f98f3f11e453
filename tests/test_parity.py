"""Every array library against NumPy in float64 on the same numbers, and against its own autograd."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hbp
from hbp.cells import GRUParameters, LSTMParameters

if TYPE_CHECKING:
    from conftest import Library

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}  # of an array's largest entry
STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
LAYERS = 5

both_cells = pytest.mark.parametrize("cell", ["gru", "lstm"])
RESIDUALS = {"own": None, "zero": hbp.Zero()}


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers that float32 holds exactly, so that every dtype starts from the same."""
    return rng.uniform(-0.8, 0.8, shape).astype("float32").astype("float64")


def numbers(cell: str, rng: np.random.Generator) -> Any:
    """The cell's arguments and cotangents: (params, x, initial, d); gates so open that the blocks carry much."""
    kind, gates = (GRUParameters, 3) if cell == "gru" else (LSTMParameters, 4)
    rows = gates * HIDDEN
    opened = np.repeat([4, -4, 0] if cell == "gru" else [2, 0, 0, 2], HIDDEN)
    bias = (opened + drawn(rng, rows)).astype("float32").astype("float64")
    params = kind(drawn(rng, rows, INPUTS), 2 * drawn(rng, rows, HIDDEN), bias, drawn(rng, rows))
    x = drawn(rng, BATCH, STEPS, INPUTS).swapaxes(0, 1)  # not contiguous
    states = [(drawn(rng, BATCH, HIDDEN), drawn(rng, STEPS, BATCH, HIDDEN)) for _ in range(gates - 2)]
    initial, d = zip(*states, strict=True)
    return (params, x, initial[0], d[0]) if cell == "gru" else (params, x, initial, d)


def apart(cell: str, given: Any, dtype: str, chunk: int = 1, residual: Any = None) -> None:
    """Neighbouring iterates differ by so much more than the tolerance that none passes for another."""
    ks = range(-(-STEPS // chunk) + 1)
    iterates = [gradients(cell, given, [{"iterations": k, "chunk": chunk, "residual": residual}]) for k in ks]
    for one, other in pairwise(iterates):
        assert max(abs(a - b).max() / abs(b).max() for a, b in zip(one, other, strict=True) if b.any()) > (
            3 * TOLERANCE[dtype]
        )


def cast(value: Any, dtype: str) -> Any:
    """The arrays of a tree in another dtype."""
    if isinstance(value, tuple):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.astype(dtype)


def flat(tree: Any) -> list[Any]:
    return [leaf for item in tree for leaf in flat(item)] if isinstance(tree, tuple | list) else [tree]


def gradients(cell: str, given: Any, options: Any) -> list[Any]:
    """The states and all gradients, for each set of options."""
    params, x, initial, d = given
    states, pullback = getattr(hbp.cells, cell)(params, x, initial)
    return flat([states, *(pullback(d, **row) for row in options)])


def close(library: Library, actual: list[Any], expected: list[np.ndarray], dtype: str) -> None:
    """The library's arrays: its own kind, of the dtype, and equal to NumPy's in float64."""
    assert len(actual) == len(expected)
    assert hbp.backend_of(*actual) == library.name
    assert {str(a.dtype).removeprefix("torch.") for a in actual} == {dtype}
    for a, b in zip(actual, expected, strict=True):
        found = as_float64(library, a)
        assert found.shape == b.shape
        np.testing.assert_allclose(found, b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())


def as_float64(library: Library, a: Any) -> np.ndarray:
    return library.numpy(a.double() if library.name == "torch" else a).astype("float64")


def compiled(library: Library, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The front end's ``jit``; where it compiles, little optimised, which is half the time."""
    options = {"compiler_options": {"xla_backend_optimization_level": 0}} if library.name == "jax" else {}
    return library.front_end.jit(function, **options)


def not_the_reference(library: Library, dtype: str = "float64") -> None:
    if library.name == "numpy" and dtype == "float64":
        pytest.skip("NumPy in float64 is the reference")


@both_cells
@pytest.mark.parametrize(
    ("dtype", "chunk", "residual"),
    [("float64", s, r) for s in (1, 3) for r in RESIDUALS] + [("float32", 1, "own"), ("float32", 3, "zero")],
)
def test_cells(library: Library, cell: str, dtype: str, chunk: int, residual: str, rng: np.random.Generator) -> None:
    not_the_reference(library, dtype)
    options = [{"iterations": k, "chunk": chunk, "residual": RESIDUALS[residual]} for k in (None, 0, 1, 2, 4, STEPS)]
    options += [{"iterations": 1, "chunk": chunk, "rank": 2}] if residual == "own" else []
    given = numbers(cell, rng)
    apart(cell, given, dtype, chunk, RESIDUALS[residual])
    run = compiled(library, lambda arrays: gradients(cell, arrays, options))  # all at once: one compilation
    close(library, run(library.tree(cast(given, dtype))), gradients(cell, given, options), dtype)


@both_cells
def test_cells_without_jit(library: Library, cell: str, rng: np.random.Generator) -> None:
    not_the_reference(library)
    given = numbers(cell, rng)
    options = [{"iterations": 1}, {"tolerance": 1e-2}, {"iterations": 1, "rank": 2}, {"tolerance": 0.1, "rank": "auto"}]
    close(library, gradients(cell, library.tree(given), options), gradients(cell, given, options), "float64")


@both_cells
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays(library: Library, cell: str, dtype: str, rng: np.random.Generator) -> None:
    if library.name in ("numpy", "cupy") and dtype == "bfloat16":
        pytest.skip(f"{library.name} has no bfloat16")
    given, options = numbers(cell, rng), [{"iterations": 1, "chunk": 3}, {"iterations": 0, "rank": HIDDEN}]
    apart(cell, given, dtype, chunk=3)
    arrays = in_half(library, library.tree(given), dtype)
    actual = compiled(library, lambda arrays: gradients(cell, arrays, options))(arrays)
    close(library, actual, gradients(cell, given, options), dtype)


def in_half(library: Library, value: Any, dtype: str) -> Any:
    if isinstance(value, tuple):
        items = [in_half(library, item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.to(getattr(library.front_end.backend.xp, dtype)) if library.name == "torch" else value.astype(dtype)


@both_cells
def test_arrays_of_two_libraries_are_refused(library: Library, cell: str, rng: np.random.Generator) -> None:
    not_the_reference(library)
    params, x, initial, d = numbers(cell, rng)
    run = getattr(hbp.cells, cell)
    with pytest.raises(
        TypeError, match=rf"several libraries: \['{library.name}', 'numpy'\]|\['numpy', '{library.name}'\]"
    ):
        run(library.tree(params), x, initial)
    with pytest.raises(TypeError, match=f"backend is 'numpy' and the arrays belong to {library.name}"):
        run(params, x, initial)[1](library.tree(d))


# Chains: blocks tanh(x W), linearised with the library's own vjp.

KINDS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda _: hbp.Identity(),
    "zero": lambda _: hbp.Zero(),
    "number": lambda _: hbp.Scalar(0.75),
    "scalar": lambda a: hbp.Scalar(a["scalar"]),
    "diagonal": lambda a: hbp.Diagonal(a["diagonal"]),
    "dense": lambda a: hbp.Dense(a["dense"]),
    "mixed": lambda a: (
        lambda i, *_: [
            hbp.Identity(),
            hbp.Scalar(0.5),
            hbp.Diagonal(a["diagonal"][i]),
            hbp.Dense(a["dense"][i]),
            hbp.Zero(),
        ][i]
    ),
    "directions": lambda a: hbp.Diagonal(a["diagonal"]) + hbp.LowRank(a["dense"][..., :2], a["dense"][:1, :2]),
    "mixed directions": lambda a: (
        lambda i, *_: (
            (hbp.Diagonal(a["diagonal"][i]) + hbp.LowRank(a["dense"][i][:, :i], a["dense"][i][:i]))
            if i % 2
            else hbp.Identity()
        )
    ),
    "mixed diagonal": lambda a: lambda i, *_: hbp.Diagonal(a["diagonal"][i]) if i % 2 else hbp.Scalar(0.5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def chain_numbers(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "weight": drawn(rng, LAYERS, HIDDEN, HIDDEN),
        "x": drawn(rng, BATCH, HIDDEN),
        "cotangent": drawn(rng, BATCH, HIDDEN),
        "sources": drawn(rng, LAYERS, BATCH, HIDDEN),
        "scalar": drawn(rng, LAYERS),
        "diagonal": drawn(rng, LAYERS, BATCH, HIDDEN),
        "dense": drawn(rng, LAYERS, HIDDEN, HIDDEN),
    }


def blocks(library: Library | None, weights: Any) -> list[Any]:
    """x -> (tanh(x W), pullback); by hand for NumPy, else by the library's vjp."""

    def by_hand(weight: np.ndarray) -> Any:
        def block(x: np.ndarray) -> Any:
            y = np.tanh(x @ weight)
            return y, lambda g: (g * (1 - y * y)) @ weight.T

        return block

    def by_vjp(weight: Any) -> Any:
        hb = library.front_end
        return lambda x: hb.vjp(lambda v: hb.backend.xp.tanh(v @ weight), x)

    make = by_hand if library is None or library.name in ("numpy", "cupy") else by_vjp
    return [make(weights[i]) for i in range(LAYERS)]


def solutions(library: Library | None, kind: str, a: Any) -> list[Any]:
    """Both linearisations, solved in every way."""
    found = []
    for linearize in (hbp.linearize, hbp.linearize_layers):
        y, chain = linearize(blocks(library, a["weight"]), a["x"], residual=KINDS[kind](a))
        found.append(y)
        found.append(hbp.backprop(chain, a["cotangent"], a["sources"]))
        for k, chunk in ((1, 1), (LAYERS, 1), (1, 2)):
            found.append(hbp.highway(chain, a["cotangent"], k, sources=a["sources"], chunk=chunk))
        found.append(hbp.highway(chain, a["cotangent"], 0))
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float64") for kind in KINDS), *((kind, "float32") for kind in ("number", "diagonal", "directions"))],
)
def test_chains(library: Library, kind: str, dtype: str, rng: np.random.Generator) -> None:
    not_the_reference(library, dtype)
    given = chain_numbers(rng)
    run = compiled(library, lambda arrays: solutions(library, kind, arrays))
    arrays = {name: library.array(a.astype(dtype)) for name, a in given.items()}
    close(library, run(arrays), solutions(None, kind, given), dtype)


@every_kind
@pytest.mark.parametrize("whole", [False, True])
def test_all_iterations_are_autograd(library: Library, kind: str, whole: bool, rng: np.random.Generator) -> None:
    if library.name in ("numpy", "cupy"):
        pytest.skip(f"{library.name} has no autograd")
    hb = library.front_end
    a = {name: library.array(value) for name, value in chain_numbers(rng).items()}
    residual = KINDS[kind](a)

    def loss(x: Any) -> Any:
        total = 0
        for i in range(LAYERS):
            total = total + (a["sources"][i] * x).sum()
            path = residual(i) if callable(residual) else residual[i]
            y = hb.backend.xp.tanh(x @ a["weight"][i])
            x = y if whole else path.mv(x) + y
        return total + (a["cotangent"] * x).sum()

    def found(x: Any) -> Any:
        linearize = hb.linearize_layers if whole else hb.linearize
        _, chain = linearize(blocks(library, a["weight"]), x, residual=residual)
        return hb.highway(chain, a["cotangent"], LAYERS, sources=a["sources"])[0]

    if library.name == "torch":
        x = a["x"].clone().requires_grad_()
        loss(x).backward()
        expected = x.grad
    else:
        expected = import_module("jax").grad(loss)(a["x"])
    close(library, [compiled(library, found)(a["x"])], [library.numpy(expected)], "float64")


# What only one library has.

only_torch = pytest.mark.parametrize("library", ["torch"], indirect=True)
only_jax = pytest.mark.parametrize("library", ["jax"], indirect=True)


@both_cells
@only_jax
def test_jax_with_64_bits_disabled(library: Library, cell: str, rng: np.random.Generator) -> None:
    jax = import_module("jax")
    options, given = [{}, {"iterations": 1, "chunk": 3}], numbers(cell, rng)
    apart(cell, given, "float32", chunk=3)
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else import_module("jax.experimental").disable_x64():
        arrays = library.tree(given)
        assert arrays[1].dtype == "float32"
        found = compiled(library, lambda arrays: gradients(cell, arrays, options))(arrays)
        close(library, found, gradients(cell, given, options), "float32")


def requiring_grad(value: Any) -> Any:
    if isinstance(value, tuple):
        items = [requiring_grad(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.requires_grad_()


@both_cells
@only_torch
@pytest.mark.parametrize("mode", ["enable_grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
def test_torch_modes(library: Library, cell: str, mode: str, grad: bool, rng: np.random.Generator) -> None:
    given = numbers(cell, rng)
    zero = {"iterations": 2, "residual": hbp.Zero()}
    options = [{}, {"iterations": 2}, {"iterations": 1, "chunk": 3}, zero, {"tolerance": 1e-3}]
    arrays = library.tree(given)
    arrays = requiring_grad(arrays) if grad else arrays
    with getattr(library.front_end.backend.xp, mode)():
        found = gradients(cell, arrays, options)
    close(library, found, gradients(cell, given, options), "float64")
    assert found[0].requires_grad == (grad and mode == "enable_grad")


@both_cells
@only_torch
def test_torch_autograd_of_the_forward_is_the_exact_pullback(
    library: Library, cell: str, rng: np.random.Generator
) -> None:
    params, x, initial, d = requiring_grad(library.tree(numbers(cell, rng)))
    states, pullback = getattr(hbp.cells, cell)(params, x, initial)
    loss = sum((a * b).sum() for a, b in zip(flat(states), flat(d), strict=True))
    expected = import_module("torch").autograd.grad(loss, flat((params, x, initial)))
    close(library, flat(pullback(d)), [library.numpy(g) for g in expected], "float64")


@only_torch
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@every_kind
def test_torch_chains_without_grad(library: Library, mode: str, kind: str, rng: np.random.Generator) -> None:
    given = chain_numbers(rng)
    arrays = {name: library.array(a).requires_grad_() for name, a in given.items()}
    with getattr(library.front_end.backend.xp, mode)():
        found = solutions(library, kind, arrays)
    assert not any(a.requires_grad for a in found)
    close(library, found, solutions(None, kind, given), "float64")


def test_a_scan_under_vmap_of_torch(rng):
    torch = pytest.importorskip("torch")
    values, c = torch.from_numpy(rng.normal(size=(4, 3, 2))), torch.from_numpy(rng.normal(size=(4, 2)))
    found = torch.func.vmap(lambda v: hbp.propagate(hbp.Diagonal(v), c))(values)
    for each, v in zip(found, values, strict=True):
        torch.testing.assert_close(each, hbp.propagate(hbp.Diagonal(v), c), rtol=1e-14, atol=1e-14)
