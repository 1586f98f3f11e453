"""Suffix scans: every solver of ``g[i] = A[i] g[i+1] + c[i]`` against a plain loop on explicit matrices."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from oracles import KINDS, converted, fits, residual_case, suffix_loop

from hbp import Diagonal, Identity, Pair, Scalar, Zero, propagate
from hbp.backends._array import NumpyLike
from hbp.backends.numpy import backend
from hbp.core.scan import hillis_steele, loop, propagate_pair, sequential

LENGTHS = (0, 1, 2, 3, 5, 8, 17, 100)
CASES = [(kind, shape) for kind, shape in product(KINDS, [(), (3,), (2, 3)]) if fits(kind, shape)]
parallel = NumpyLike("numpy", np, parallel=True)  # what runs on CuPy's arrays

SOLVERS = {
    "sequential": partial(sequential, backend=backend),
    "hillis-steele": partial(hillis_steele, backend=backend),
    "numpy": backend.propagate,
    "parallel": parallel.propagate,
}


def problem(kind: str, rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Maps, sources and the solution."""
    operator, matrices = residual_case(kind, rng, n, shape)
    c = rng.normal(size=(n + 1, *shape))
    return operator, c, suffix_loop(matrices, c.reshape(n + 1, -1)).reshape(c.shape)


def close(actual: Any, expected: np.ndarray, rtol: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_solvers_equal_the_loop(solver, kind, shape, rng):
    for n in LENGTHS:
        operator, c, expected = problem(kind, rng, n, shape)
        close(SOLVERS[solver](operator.bind(n, c[-1], backend), c), expected)


@pytest.mark.parametrize("own", [backend, parallel], ids=["in-place", "parallel"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["pair", "pair-left-shared", "pair-right-shared"])
def test_a_scan_of_pairs_is_a_scan_of_one_diagonal(own, shape, kind, rng):
    for n in LENGTHS:
        operator, c, expected = problem(kind, rng, n, shape)
        close(propagate_pair(operator.bind(n, c[-1], own), c, own), expected)


@pytest.mark.parametrize("kind", ["identity", "zero", "number", "scalars", "diagonal", "dense", "pair", *KINDS[12:]])
def test_propagate_in_every_library(kind, library, rng):
    for n in LENGTHS:
        operator, c, expected = problem(kind, rng, n, (2, 3))
        given = library.array(c)
        found = library.front_end.propagate(converted(operator, library.array), given)
        assert type(found) is type(given)
        close(library.numpy(found), expected)
        np.testing.assert_array_equal(library.numpy(given), c)


@pytest.mark.parametrize(
    "kind", ["number", "diagonal-shared", "dense-entries", "pair-left-shared", "low-rank", "pair-low-rank"]
)
def test_parallel_scan_in_every_library(kind, library, rng):
    own = library.front_end.backend
    for n in (1, 3):
        operator, c, expected = problem(kind, rng, n, (2, 3))
        bound = converted(operator, library.array).bind(n, library.array(c[-1]), own)
        close(library.numpy(hillis_steele(bound, library.array(c), own)), expected)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_small_states_in_every_library(shape, library, rng):
    for kind, n in product([kind for kind in KINDS if fits(kind, shape)], (0, 3)):
        operator, c, expected = problem(kind, rng, n, shape)
        found = library.front_end.propagate(converted(operator, library.array), library.array(c))
        close(library.numpy(found), expected)


def test_the_order_of_the_maps_matters():
    """Two maps that do not commute: the map of layer 0 is applied last."""
    first, second = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]])
    operator, _ = residual_case("dense", np.random.default_rng(0), 2, (2,))
    operator = type(operator)(np.stack([first, second]))
    c = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    for solver in SOLVERS.values():
        np.testing.assert_array_equal(solver(operator, c), [[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [backend, parallel], ids=["in-place", "parallel"])
def test_read_only_inputs_are_accepted_and_unchanged(kind, own, rng):
    operator, c, expected = problem(kind, rng, 5, (2, 3))
    arrays = (c, *operator.arrays)
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    close(propagate(operator, c, backend=own), expected)
    close(hillis_steele(operator.bind(5, c[-1], own), c, own), expected)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind, library, rng):
    operator, c, _ = problem(kind, rng, 5, (2, 3))
    own = library.front_end
    operator = converted(operator, library.array)
    turned = library.array(c.transpose(2, 1, 0).copy()).T if library.name != "torch" else None
    if turned is None:
        turned = library.array(c.transpose(2, 1, 0).copy()).permute(2, 1, 0)
    close(library.numpy(own.propagate(operator, turned)), library.numpy(own.propagate(operator, library.array(c))))
    same = own.backend.xp.broadcast_to(library.array(c[:1]), c.shape)  # all rows are one piece of memory
    repeated = library.array(np.repeat(c[:1], 6, axis=0))
    close(library.numpy(own.propagate(operator, same)), library.numpy(own.propagate(operator, repeated)))
    np.testing.assert_array_equal(library.numpy(same), library.numpy(repeated))


HALVES = [("float16", 2.0**-11), ("bfloat16", 2.0**-8)]


def in_half(library: Any, x: np.ndarray, dtype: str) -> Any:
    if library.name == "torch":
        return library.array(x).to(getattr(library.front_end.backend.xp, dtype))
    return library.array(x).astype(getattr(library.front_end.backend.xp, dtype))


def doubled(library: Any, x: Any) -> np.ndarray:
    return library.numpy(x.double() if library.name == "torch" else x.astype("float64"))


@pytest.mark.parametrize("kind", ["identity", "number", "scalars", "diagonal", "dense", "pair"])
@pytest.mark.parametrize(("dtype", "unit"), HALVES, ids=[dtype for dtype, _ in HALVES])
def test_half_precision_is_rounded_once(kind, dtype, unit, library, rng):
    if dtype == "bfloat16" and library.name in ("numpy", "cupy"):
        pytest.skip(f"{library.name} has no bfloat16")
    n, shape, own = 300, (2, 3), library.front_end.backend
    operator = {
        "identity": Identity(),
        "number": Scalar(0.998),
        "scalars": Scalar(rng.uniform(0.99, 1, n)),
        "diagonal": Diagonal(rng.uniform(0.99, 1, (n, *shape))),
        "dense": residual_case("dense", rng, n, shape)[0],
        "pair": Pair(rng.uniform(0.98, 1.02, (n, *shape)), rng.uniform(0.49, 0.51, (n, *shape))),
    }[kind]
    if kind == "dense":
        operator = type(operator)(np.abs(operator.arrays[0]) * 1.9)
    c = in_half(library, rng.uniform(0, 0.1, (n + 1, *shape)), dtype)
    operator = converted(operator, lambda x: in_half(library, x, dtype))
    found = own.propagate(operator.bind(n, c[-1], own), c)
    assert found.dtype == c.dtype
    wide = converted(operator, lambda x: doubled(library, x))
    exact = sequential(wide.bind(n, doubled(library, c)[-1], backend), doubled(library, c), backend)
    error = np.abs(doubled(library, found) - exact) / exact
    assert error.max() < 1.1 * unit
    if kind in ("identity", "diagonal"):
        naive = doubled(library, sequential(operator.bind(n, c[-1], own), c, own))
        assert (np.abs(naive - exact) / exact).max() > 3 * error.max()


def test_zero_and_empty_chains_in_half_precision(library):
    c = in_half(library, np.ones((3, 2)), "float16")
    for operator in (Zero(), Identity()):
        found = library.front_end.propagate(operator, c[:1])
        assert found.dtype == c.dtype
        np.testing.assert_array_equal(doubled(library, found), np.ones((1, 2)))
    np.testing.assert_array_equal(doubled(library, library.front_end.propagate(Zero(), c)), np.ones((3, 2)))


def recurrence(a: Any, b: Any, carry: Any, i: Any) -> Any:
    return a[i] * carry + b[i]


def pair_of_recurrences(a: Any, b: Any, carry: Any, i: Any) -> Any:
    h, c = carry
    return h * c + a[i], b[i] - h


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_scans_with_a_carry(reverse, n, library, rng):
    a, b = rng.normal(size=(2, n, 3))
    start = rng.normal(size=(2, 3))
    order = range(n)[::-1] if reverse else range(n)
    singles, pairs = np.zeros((n, 3)), np.zeros((2, n, 3))
    one, two = start[0], (start[0], start[1])
    for i in order:
        one = singles[i] = recurrence(a, b, one, i)
        two = pair_of_recurrences(a, b, two, i)
        pairs[:, i] = two
    own, (x, y) = library.front_end.backend, map(library.array, (a, b))
    first, second = map(library.array, start)
    for scan in (own.scan, partial(loop, backend=own)):
        close(library.numpy(scan(partial(recurrence, x, y), first, n, reverse=reverse)), singles)
        found = scan(partial(pair_of_recurrences, x, y), (first, second), n, reverse=reverse)
        assert isinstance(found, tuple)
        close(np.stack(list(map(library.numpy, found))), pairs)
        close(library.numpy(first), start[0])


def test_scans_run_forward_by_default(library):
    own, start = library.front_end.backend, library.array(np.float64([1.0]))
    for scan in (own.scan, partial(loop, backend=own)):
        found = scan(lambda h, i: h + i, start, 4)
        np.testing.assert_array_equal(library.numpy(found)[:, 0], [1.0, 2.0, 4.0, 7.0])
