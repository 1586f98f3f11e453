"""Iterate k by its definition: the sum over all paths that cross at most k blocks."""

from __future__ import annotations

import dataclasses
import math
import warnings
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from oracles import KINDS, chunked_path_sum, converted, fits, matrix_pullbacks, path_sum, residual_case

import hbp
from hbp import Dense, Diagonal, DivergenceWarning, Identity, LinearizedChain, Pair, Scalar, Zero

BASIC = ("identity", "zero", "number", "scalars", "diagonal-shared", "dense", "pair")  # one of each, shared by a batch


class Problem:
    """A random linear chain on states of the given shape, its matrices and its cotangents."""

    def __init__(self, kind: str, rng: np.random.Generator, length: int, shape: tuple[int, ...] = (2, 3)) -> None:
        self.shape = shape
        n = int(np.prod(self.shape))
        self.residual, self.R = residual_case(kind, rng, length, self.shape)
        self.B = rng.uniform(-1, 1, (length, n, n)) / n**0.5
        self.cotangent = rng.normal(size=self.shape)
        self.sources = rng.normal(size=(length, *self.shape))

    def chain(self, array: Any = np.asarray) -> LinearizedChain:
        return LinearizedChain(matrix_pullbacks(self.B, array), converted(self.residual, array))

    def c(self, sources: Any) -> np.ndarray:
        """All that enters, (L+1, n)."""
        entering = np.zeros_like(self.sources) if sources is None else self.sources
        return np.concatenate([entering, self.cotangent[None]]).reshape(len(entering) + 1, -1)

    def expected(self, k: int, sources: Any = None, chunk: int = 1) -> np.ndarray:
        g = chunked_path_sum(self.R, self.B, self.c(sources), k, chunk)
        return g.reshape(-1, *self.shape)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_oracles_agree_with_each_other(rng):
    """A chunk of one layer is no chunk; all paths together are the product of the whole layers."""
    problem = Problem("dense", rng, 5)
    c = problem.c(problem.sources)
    for k in range(6):
        close(chunked_path_sum(problem.R, problem.B, c, k, 1), path_sum(problem.R, problem.B, c, k))
    exact = [c[5]]
    for i in reversed(range(5)):
        exact.append((problem.R + problem.B)[i].T @ exact[-1] + c[i])
    for S in range(1, 7):
        close(chunked_path_sum(problem.R, problem.B, c, 5, S), np.stack(exact[::-1]))


@pytest.mark.parametrize("with_sources", [False, True], ids=["cotangent", "sources"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", range(7))
def test_iterate_k_is_the_path_sum(kind, length, with_sources, rng):
    problem = Problem(kind, rng, length)
    sources = problem.sources if with_sources else None
    for k in range(length + 1):
        g = hbp.highway(problem.chain(), problem.cotangent, iterations=k, sources=sources)
        close(g, path_sum(problem.R, problem.B, problem.c(sources), k).reshape(g.shape))
    close(hbp.backprop(problem.chain(), problem.cotangent, sources), g)
    for k in (length + 1, 10**6, None):
        close(hbp.highway(problem.chain(), problem.cotangent, iterations=k, sources=sources), g)


@pytest.mark.parametrize("with_sources", [False, True], ids=["cotangent", "sources"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", range(1, 7))
def test_chunked_iterates(kind, length, with_sources, rng):
    problem = Problem(kind, rng, length)
    sources = problem.sources if with_sources else None
    exact = hbp.backprop(problem.chain(), problem.cotangent, sources)
    for S in range(1, length + 2):
        stages = math.ceil(length / S)
        for k in range(stages + 1):
            g = hbp.highway(problem.chain(), problem.cotangent, iterations=k, sources=sources, chunk=S)
            close(g, problem.expected(k, sources, S))
        close(g, exact)
        close(hbp.highway(problem.chain(), problem.cotangent, sources=sources, chunk=S), exact)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("diagonal", "dense", "pair"))])
def test_maps_shared_by_some_of_several_batch_axes(kind, rng):
    problem = Problem(kind, rng, 5, (3, 2, 2))
    for k, chunk in product(range(3), (1, 2, 3)):
        g = hbp.highway(problem.chain(), problem.cotangent, k, sources=problem.sources, chunk=chunk)
        close(g, problem.expected(k, problem.sources, chunk))


@pytest.mark.parametrize(
    ("kind", "length", "chunk"),
    [*((kind, *sizes) for kind in KINDS for sizes in [(0, 3), (1, 1), (4, 1)]), *((kind, 5, 2) for kind in BASIC)],
)
def test_iterates_in_every_library(kind, length, chunk, library, rng):
    problem = Problem(kind, rng, length)
    chain, cotangent = problem.chain(library.array), library.array(problem.cotangent)
    sources = library.array(problem.sources)
    for k in range(length + 1):
        g = hbp.highway(chain, cotangent, iterations=k, sources=sources, chunk=chunk)
        assert type(g) is type(cotangent)
        assert g.dtype == cotangent.dtype
        close(library.numpy(g), problem.expected(k, problem.sources, chunk))
    close(library.numpy(hbp.backprop(chain, cotangent, sources)), problem.expected(length, problem.sources, 1))
    close(library.numpy(library.front_end.highway(chain, cotangent, 0)), problem.expected(0))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if fits(kind, ())])
def test_states_that_are_numbers(kind, library, rng):
    problem = Problem(kind, rng, 3, ())
    chain, cotangent, sources = problem.chain(library.array), *map(library.array, (problem.cotangent, problem.sources))
    for k, chunk in product(range(4), (1, 2)):
        g = hbp.highway(chain, cotangent, k, sources=sources, chunk=chunk)
        close(library.numpy(g), problem.expected(k, problem.sources, chunk))


# Chains that are run and linearised


class Network:
    """A chain of tanh layers, as a user writes one, with an explicit matrix for each Jacobian."""

    def __init__(self, kind: str, rng: np.random.Generator, length: int = 4) -> None:
        self.problem = Problem(kind, rng, length)
        self.x = rng.normal(size=self.problem.shape)
        self.R, self.W = self.problem.R, self.problem.B

    def block(self, i: int) -> Any:
        def block(x: np.ndarray) -> tuple[np.ndarray, Any]:
            y = np.tanh(self.W[i] @ x.reshape(-1))
            return y.reshape(x.shape), lambda g: (self.W[i].T @ ((1 - y**2) * g.reshape(-1))).reshape(x.shape)

        return block

    def layer(self, i: int) -> Any:
        def layer(x: np.ndarray) -> tuple[np.ndarray, Any]:
            y, pullback = self.block(i)(x)
            skip = self.R[i] @ x.reshape(-1)
            return y + skip.reshape(x.shape), lambda g: pullback(g) + (self.R[i].T @ g.reshape(-1)).reshape(x.shape)

        return layer

    def run(self, x: np.ndarray, start: int = 0) -> list[np.ndarray]:
        """The states x[start], ..., x[L]; complex ones too."""
        states = [x.reshape(-1)]
        for R, W in zip(self.R[start:], self.W[start:], strict=True):
            states.append(R @ states[-1] + np.tanh(W @ states[-1]))
        return states

    def jacobians(self) -> tuple[np.ndarray, np.ndarray]:
        """R and B at the states of the run."""
        states = self.run(self.x)[:-1]
        B = [(1 - np.tanh(W @ x) ** 2)[:, None] * W for W, x in zip(self.W, states, strict=True)]
        return self.R, np.stack(B)


def check_chain(network: Network, y: np.ndarray, chain: LinearizedChain, R: np.ndarray, B: np.ndarray) -> None:
    close(y, network.run(network.x)[-1].reshape(y.shape))
    problem = network.problem
    c = problem.c(problem.sources)
    assert len(chain) == len(R)
    for k in range(len(R) + 1):
        g = hbp.highway(chain, problem.cotangent, iterations=k, sources=problem.sources)
        close(g, path_sum(R, B, c, k).reshape(g.shape))
    close(hbp.backprop(chain, problem.cotangent, problem.sources), g)
    for S in (2, 3):
        g = hbp.highway(chain, problem.cotangent, iterations=1, sources=problem.sources, chunk=S)
        close(g, chunked_path_sum(R, B, c, 1, S).reshape(g.shape))


@pytest.mark.parametrize("as_function", [False, True], ids=["operator", "function"])
@pytest.mark.parametrize("kind", KINDS)
def test_linearize(kind, as_function, rng):
    network = Network(kind, rng)
    residual = (lambda i, _: network.problem.residual[i]) if as_function else network.problem.residual
    y, chain = hbp.linearize([network.block(i) for i in range(4)], network.x, residual=residual)
    check_chain(network, y, chain, *network.jacobians())


@pytest.mark.parametrize("as_function", [False, True], ids=["operator", "function"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", KINDS)
def test_linearize_layers_under_any_split(kind, split, as_function, rng):
    """Whole layers of one kind; whatever another residual leaves of them is the block."""
    network = Network(kind, rng)
    given, R = residual_case(split, rng, 4, network.problem.shape)
    residual = (lambda i, *_: given[i]) if as_function else given
    y, chain = hbp.linearize_layers([network.layer(i) for i in range(4)], network.x, residual=residual)
    check_chain(network, y, chain, R, sum(network.jacobians()) - R)


MIXED = [
    Identity(),
    Diagonal(np.array([0.5, -0.5, 0.25, 1.0])),
    Dense(np.arange(16.0).reshape(4, 4) / 16),
    Scalar(0.3),
    Zero(),
    Diagonal(np.array([True, False, True, True])),
]
MIXED_MATRICES = np.stack([op.mv(np.eye(4)).T if not isinstance(op, Dense) else op.matrix for op in MIXED])


@pytest.mark.parametrize("order", [range(6), range(6)[::-1], [0, 3, 4, 0], [1, 0, 5, 3], [2, 1, 4, 3]], ids=str)
def test_residual_functions_of_mixed_kinds(order, rng):
    network = Network("zero", rng, len(order))
    network.problem = Problem("zero", rng, len(order), (4,))
    network.W, network.x = network.problem.B, rng.normal(size=4)
    network.R = MIXED_MATRICES[list(order)]
    seen: list[Any] = []

    def residual(i: int, *states: np.ndarray) -> Any:
        seen.append((i, *states))
        return MIXED[order[i]]

    states = network.run(network.x)
    y, chain = hbp.linearize([network.block(i) for i in range(len(order))], network.x, residual)
    check_chain(network, y, chain, *network.jacobians())
    assert [i for i, *_ in seen] == list(range(len(order)))
    close(np.stack([x for _, x in seen]), np.stack(states[:-1]))
    seen.clear()
    y, chain = hbp.linearize_layers([network.layer(i) for i in range(len(order))], network.x, residual)
    check_chain(network, y, chain, *network.jacobians())
    close(np.stack([x for _, x, _ in seen]), np.stack(states[:-1]))
    close(np.stack([y for *_, y in seen]), np.stack(states[1:]))


def test_residual_functions_of_the_state_count_as_constant(rng):
    """A gate that depends on the state: R is its value, nothing of its derivative."""
    network = Network("diagonal", rng)
    gates: list[np.ndarray] = []

    def gate(_: int, x: np.ndarray) -> Diagonal:
        gates.append(np.cos(x))
        return Diagonal(gates[-1])

    y, chain = hbp.linearize([network.block(i) for i in range(4)], network.x, gate)
    network.R = np.stack([np.diag(values.reshape(-1)) for values in gates])
    check_chain(network, y, chain, *network.jacobians())


def test_backprop_is_the_derivative(rng):
    """Complex steps through the network, a difference without cancellation."""
    network, h = Network("diagonal", rng, 5), 1e-30
    problem = network.problem
    _, chain = hbp.linearize([network.block(i) for i in range(5)], network.x, problem.residual)
    g = hbp.backprop(chain, problem.cotangent, problem.sources)
    weights, states = problem.c(problem.sources), network.run(network.x)
    for i, state in enumerate(states):
        for j, direction in enumerate(np.eye(len(state))):
            moved = network.run(state + 1j * h * direction, i)
            loss = sum(w @ x for w, x in zip(weights[i:], moved, strict=True))
            close(g[i].reshape(-1)[j], np.float64(loss.imag / h), 1e-13)


# Coarse chains


def check_coarse(problem: Problem, S: int, array: Any, numpy: Any) -> None:
    """Unchunked iterates of a coarse chain are the chunked ones at the stage boundaries."""
    length = len(problem.B)
    coarse, cotangent = problem.chain(array).coarsen(S), array(problem.cotangent)
    bounds = [*range(0, length, S), length]
    assert len(coarse) == len(bounds) - 1
    for k in range(len(coarse) + 1):
        close(numpy(hbp.highway(coarse, cotangent, iterations=k)), problem.expected(k, chunk=S)[bounds])
    close(numpy(hbp.backprop(coarse, cotangent)), problem.expected(length)[bounds])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "S"), [(6, 2), (6, 3), (5, 2), (5, 3), (4, 4), (3, 7), (4, 1), (0, 2)])
def test_a_coarse_chain_is_a_chain(kind, length, S, rng):
    check_coarse(Problem(kind, rng, length), S, np.asarray, np.asarray)


@pytest.mark.parametrize("kind", BASIC)
def test_a_coarse_chain_in_every_library(kind, library, rng):
    check_coarse(Problem(kind, rng, 5), 2, library.array, library.numpy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outer", "inner"), [(2, 2), (2, 3), (3, 2)])
def test_stages_of_stages(kind, outer, inner, rng):
    length = 6 if (outer, inner) != (2, 3) else 5
    problem = Problem(kind, rng, length)
    coarse = problem.chain().coarsen(inner)
    bounds = [*range(0, length, inner), length]
    c = np.concatenate([rng.normal(size=(len(coarse), *problem.shape)), problem.cotangent[None]])
    everywhere = np.zeros((length + 1, problem.cotangent.size))
    everywhere[bounds] = c.reshape(len(c), -1)
    for k in range(3):
        expected = chunked_path_sum(problem.R, problem.B, everywhere, k, inner * outer).reshape(-1, *problem.shape)
        g = hbp.highway(coarse, problem.cotangent, k, sources=c[:-1], chunk=outer)
        close(g, expected[bounds])
        twice = hbp.highway(coarse.coarsen(outer), problem.cotangent, k)
        close(twice, problem.expected(k, chunk=inner * outer)[[*range(0, length, inner * outer), length]])
    for S in (1, 2):  # the coarse chain's own iterates, with sources between the stages
        g = hbp.highway(coarse, problem.cotangent, 1, sources=c[:-1], chunk=S)
        R = [np.linalg.multi_dot([np.eye(M.shape[1]), *M[::-1], np.eye(M.shape[1])]) for M in split(problem.R, bounds)]
        J = [
            np.linalg.multi_dot([np.eye(M.shape[1]), *M[::-1], np.eye(M.shape[1])])
            for M in split(problem.R + problem.B, bounds)
        ]
        close(g, chunked_path_sum(np.stack(R), np.stack(J) - R, c.reshape(len(c), -1), 1, S).reshape(g.shape))


def split(matrices: np.ndarray, bounds: list[int]) -> list[np.ndarray]:
    return [matrices[a:b] for a, b in pairwise(bounds)]


def test_a_residual_that_is_the_whole_layer_is_exact_at_once(rng):
    network = Network("diagonal", rng)
    layers = [network.layer(i) for i in range(4)]
    whole = Dense(sum(network.jacobians()))
    network.x = network.x.reshape(-1)
    _, chain = hbp.linearize_layers(layers, network.x, residual=whole)
    c = network.problem.c(network.problem.sources)
    exact = hbp.backprop(chain, c[-1], c[:-1])
    close(hbp.highway(chain, c[-1], 0, sources=c[:-1]), exact)
    close(hbp.highway(chain, c[-1], 0, sources=c[:-1], chunk=3), exact)


def test_no_residual_is_a_sliding_window(rng):
    """With R = 0 iterate k sums the k + 1 nearest sources."""
    problem = Problem("zero", rng, 6)
    c = problem.c(problem.sources)
    for k in range(7):
        g = hbp.highway(problem.chain(), problem.cotangent, k, sources=problem.sources).reshape(c.shape)
        for i in range(7):
            window, v = np.zeros_like(c[0]), None
            for j in reversed(range(i, min(i + k, 6) + 1)):
                v = c[j] if v is None else problem.B[j].T @ v + c[j]
                window = v
            close(g[i], window)


@pytest.mark.parametrize("kind", BASIC)
def test_another_split_of_the_same_layers(kind, rng):
    problem = Problem(kind, rng, 5)
    residual, R = residual_case("scalars", rng, 5, problem.shape)
    chain = problem.chain().resplit(residual)
    c = problem.c(problem.sources)
    for k in range(6):
        g = hbp.highway(chain, problem.cotangent, k, sources=problem.sources)
        close(g, path_sum(R, problem.R + problem.B - R, c, k).reshape(g.shape))


# Iterates, reports and tolerances


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_iterates_are_the_iterates(kind, chunk, rng):
    problem = Problem(kind, rng, 5)
    chain, sources = problem.chain(), problem.sources
    seen = list(hbp.iterates(chain, problem.cotangent, sources=sources, chunk=chunk))
    bounds = [*range(0, 5, chunk), 5]
    assert [it.iteration for it in seen] == list(range(len(bounds)))
    last = np.zeros((len(bounds), *problem.shape))
    for it in seen:
        expected = problem.expected(it.iteration, sources, chunk)
        close(it.cotangents, expected)
        close(np.float64(it.size), np.linalg.norm(expected[bounds]))
        close(np.float64(it.increment), np.linalg.norm(expected[bounds] - last))
        assert it.relative == pytest.approx(it.increment / it.size)
        last = expected[bounds]
    report = hbp.report(chain, problem.cotangent, sources=sources, chunk=chunk)
    assert report.increments == tuple(it.increment for it in seen)
    assert report.sizes == tuple(it.size for it in seen)
    assert report.exact
    assert not hbp.report(chain, problem.cotangent, len(bounds) - 2, sources=sources, chunk=chunk).exact


def test_iterates_come_one_by_one():
    calls, pullbacks = counting(4, 0.5)
    seen = hbp.iterates(LinearizedChain(pullbacks), np.ones(3))
    next(seen)
    assert calls == [0] * 4
    next(seen)
    assert calls == [1] * 4


def counting(length: int, factor: float) -> tuple[list[int], list[Any]]:
    """Pullbacks ``g -> factor g`` that count their calls."""
    calls = [0] * length

    def pullback(i: int) -> Any:
        def pull(g: np.ndarray) -> np.ndarray:
            calls[i] += 1
            return factor * g

        return pull

    return calls, [pullback(i) for i in range(length)]


def powers(length: int, factor: float) -> tuple[list[float], list[float]]:
    """Norms of the increments and of the iterates of ``length`` layers ``1 + factor`` on one number, one loss."""
    steps = np.arange(length + 1)[::-1]
    increments = [np.array([math.comb(m, k) * factor**k for m in steps]) for k in range(length + 1)]
    return (
        [float(np.linalg.norm(d)) for d in increments],
        [float(np.linalg.norm(s)) for s in np.cumsum(increments, axis=0)],
    )


@pytest.mark.parametrize(
    ("factor", "length", "diverges"),
    [(-0.9, 9, True), (-0.9, 16, True), (0.05, 9, False), (0.5, 9, False), (-0.1, 9, False)],
)
def test_reports_say_whether_the_split_diverges(factor, length, diverges, library):
    chain = LinearizedChain([lambda g: factor * g] * length)
    found = hbp.report(chain, library.array(np.ones(1)))
    increments, sizes = powers(length, factor)
    assert found.increments == pytest.approx(increments)
    assert found.sizes == pytest.approx(sizes)
    assert found.exact
    assert found.finite
    assert found.diverges is diverges
    if diverges:
        worst = max(a / b for a, b in zip(increments, sizes, strict=True))
        assert found.verdict.startswith(f"diverges: the increments grow to {worst:.2g} times the solution")
        assert "chunks" in found.verdict
    else:
        assert found.verdict == f"exact: the last increment is {increments[-1] / sizes[-1]:.2g} of the solution"
    short = hbp.report(chain, library.array(np.ones(1)), 2)
    assert len(short.increments) == 3
    assert not short.exact
    if not diverges:
        last = increments[2] / sizes[2]
        state = "converging" if last < 0.5 else "not yet converged"
        assert short.verdict == f"{state}: the last increment is {last:.2g} of the solution"


def test_an_increment_that_shrinks_is_no_divergence():
    """A source that nearly cancels what arrives: the increment exceeds the solution without having grown."""
    chain = LinearizedChain([lambda g: -2.0 * g], Zero())
    found = hbp.report(chain, np.ones(1), sources=np.array([[2.5]]))
    assert found.increments == pytest.approx((7.25**0.5, 2.0))
    assert found.sizes == pytest.approx((7.25**0.5, 1.25**0.5))
    assert not found.diverges


@pytest.mark.parametrize(
    "residual",
    [Identity(), Zero(), Scalar(0.5), Scalar(np.ones(5)), Diagonal(np.ones((5, 3))), Dense(np.ones((5, 3, 3)))],
)
def test_empty_batches(residual, library):
    chain = LinearizedChain([lambda g: 0.5 * g] * 5, converted(residual, library.array))
    cotangent, sources = library.array(np.zeros((0, 3))), library.array(np.zeros((5, 0, 3)))
    for options in ({"iterations": 1}, {"iterations": 1, "chunk": 2}, {"tolerance": 0.1}, {"iterations": None}):
        assert hbp.highway(chain, cotangent, sources=sources, **options).shape == (6, 0, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reports_of_what_is_not_finite(bad):
    with np.errstate(invalid="ignore"):
        found = hbp.report(LinearizedChain([lambda g: g * bad] * 3), np.ones(2))
    assert not found.finite
    assert found.verdict.startswith("not finite")


@pytest.mark.parametrize(
    ("increments", "sizes", "diverges"),
    [
        ((1.0, 0.9), (1.0, 0.1), False),  # past the solution, but shrinking: the paths cancel
        ((1.0, 1.1), (1.0, 2.1), False),  # growing, but with the solution
        ((1.0, 1.1), (1.0, 0.1), True),
        ((1.0, 0.5, 0.6), (1.0, 1.5, 0.5), True),
        ((1.0, 2.0), (1.0, 2.0), False),  # growing, as large as the solution and not past it
        ((1.0, 1.0), (1.0, 0.5), False),  # past the solution, but not growing
    ],
)
def test_divergence_is_growth_past_the_solution(increments, sizes, diverges):
    assert hbp.Report(increments, sizes, exact=False).diverges is diverges


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_sizes_neither_overflow_nor_vanish(size, library):
    cotangent = library.array(np.full(3, size, np.float32))
    found = hbp.report(LinearizedChain([lambda g: 0.5 * g]), cotangent)
    assert found.finite
    assert found.sizes[0] / size == pytest.approx(6**0.5, rel=1e-6)


def test_iterates_go_on_whatever_becomes_of_those_handed_out():
    chain = LinearizedChain([lambda g: 0.5 * g] * 2)
    found = []
    for iterate in hbp.iterates(chain, np.array([4.0])):
        found.append(iterate.cotangents[0].item())
        iterate.cotangents[:] = np.nan
    assert found == [4.0, 8.0, 9.0]


@pytest.mark.parametrize("solve", [hbp.backprop, hbp.highway])
def test_the_callers_arrays_are_not_handed_back(solve):
    cotangent, c = np.ones(2), np.ones((3, 2))
    solve(LinearizedChain([]), cotangent)[:] = 5
    hbp.propagate(Zero(), c)[:] = 5
    hbp.propagate(Identity(), c[:1])[:] = 5
    assert (cotangent == 1).all()
    assert (c == 1).all()


def test_reports_of_zero_cotangents():
    found = hbp.report(LinearizedChain([lambda g: g] * 3), np.zeros(2))
    assert found.increments == (0.0,) * 4
    assert found.verdict.startswith("exact")
    assert [it.relative for it in hbp.iterates(LinearizedChain([lambda g: g]), np.zeros(2))] == [0.0, 0.0]


@pytest.mark.parametrize(("tolerance", "chunk"), [(0.3, 1), (0.1, 1), (1e-3, 1), (1e-6, 1), (0.1, 2), (0.1, 3)])
def test_a_tolerance_stops_at_the_first_small_increment(tolerance, chunk, library):
    length, factor = 12, 0.1
    calls, pullbacks = counting(length, factor)
    cotangent = library.array(np.ones(1))
    relative = [it.relative for it in hbp.iterates(LinearizedChain(pullbacks), cotangent, chunk=chunk)]
    stop = next(k for k, value in enumerate(relative) if value <= tolerance)
    assert 0 < stop < len(relative) - 1
    calls[:] = [0] * length
    g = hbp.highway(LinearizedChain(pullbacks), cotangent, tolerance=tolerance, chunk=chunk)
    used = list(calls)
    if chunk == 1:
        assert used == [stop] * length
    else:
        assert max(used) == stop + 1  # inside a stage, once more from its end
    expected = hbp.highway(LinearizedChain(pullbacks), cotangent, stop, chunk=chunk)
    close(library.numpy(g), library.numpy(expected), 1e-14)


def test_a_tolerance_of_nothing_is_exact(rng):
    problem = Problem("diagonal", rng, 5)
    g = hbp.highway(problem.chain(), problem.cotangent, sources=problem.sources, tolerance=0)
    close(g, problem.expected(5, problem.sources), 1e-13)


def test_iterations_cap_a_tolerance(rng):
    problem = Problem("diagonal", rng, 5)
    for k, chunk in ((0, 1), (2, 1), (1, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DivergenceWarning)
            g = hbp.highway(problem.chain(), problem.cotangent, k, tolerance=1e-12, chunk=chunk)
        close(g, problem.expected(k, chunk=chunk), 1e-13)


def test_increments_that_grow_warn_where_it_was_called():
    chain = LinearizedChain([lambda g: -0.9 * g] * 12)
    said = r"the increments grow, and 12 rounds have not met tolerance=0.001: allow more, damp the split.*once"
    with pytest.warns(DivergenceWarning, match=said) as caught:
        g = hbp.highway(chain, np.ones(1), tolerance=1e-3)
    assert [w.filename for w in caught] == [__file__]
    close(g[0], np.array([0.1**12]), 1e-9)
    with pytest.warns(DivergenceWarning):
        hbp.highway(chain, np.ones(1), 4, tolerance=1e-3)
    hbp.highway(chain, np.ones(1), 4)  # iterations alone ask for no judgement


@pytest.mark.parametrize(
    ("increments", "tolerance", "warns"),
    [
        ((1.0, 2.0, 0.05), 0.1, False),  # they grow past the solution on the way, and then meet the tolerance
        ((1.0, 2.0, 0.5), 0.1, True),
        ((1.0, 0.2, 0.3), 0.1, True),  # they grow at the cap, not past the solution
        ((1.0, 0.3, 0.2), 0.1, False),  # the cap comes first, on the way to the solution
        ((1.0,), 0.1, False),
        ((1.0, 0.2, 0.3), None, False),
        ((0.0, 0.0), 0.0, False),
        ((1.0, np.inf), 0.1, True),
        ((1.0, np.nan), 0.1, True),
        ((np.nan, np.nan), 0.1, False),  # what comes in is not finite, which no split is to blame for
    ],
)
def test_only_a_tolerance_that_growing_increments_do_not_meet_is_a_warning(increments, tolerance, warns):
    sizes = [(increment, max(increment, 1.0) if increment > 1e9 else 1.0) for increment in increments]
    with pytest.warns(DivergenceWarning) if warns else nullcontext():
        hbp.Solver(len(sizes) - 1, tolerance=tolerance).tell(sizes, 99)


def test_what_is_not_finite_ends_a_tolerance(library):
    """No round mends it, and each of as many as there are layers would cost as much as the first."""
    used = []
    chain = LinearizedChain([lambda g: used.append(1) or -1e30 * g] * 3, Scalar(1e10))
    for size, rounds, told in (
        (np.nan, 0, nullcontext()),
        (np.inf, 0, nullcontext()),
        (1.0, 1, pytest.warns(DivergenceWarning, match="not finite after finite ones: damp the split")),  # overflow
    ):
        reports, used[:] = [], []
        how = hbp.Solver(tolerance=0.1, watch=reports.append)
        with told, np.errstate(all="ignore"):
            hbp.highway(chain, library.array(np.full(1, size, np.float32)), solver=how)
        assert (len(used), len(reports[0].increments), reports[0].finite) == (3 * rounds, rounds + 1, False)


@pytest.mark.parametrize(("dtype", "lost"), [("float32", True), ("float64", False)])
def test_what_cancels_is_no_more_exact_than_the_largest_increment(dtype, lost, library):
    """Blocks of -0.8 beside paths of 1: the increments grow to a million, and sum up to powers of 0.2."""
    chain = LinearizedChain([lambda g: -0.8 * g] * 28)
    said = r"grew so far that rounding leaves more than tolerance=0.005: damp the split"
    with pytest.warns(DivergenceWarning, match=said) if lost else nullcontext():
        g = hbp.highway(chain, library.array(np.ones(1, dtype)), tolerance=0.005)
    off = np.linalg.norm(library.numpy(g)[:, 0] - 0.2 ** np.arange(28, -1, -1.0))
    assert (off > 0.005) == lost


def test_a_backward_pass_that_diverges_is_told_once_in_training():
    """By Python's own filter: the warning names nothing that changes from step to step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(3):
            chain = LinearizedChain([lambda g, step=step: -(0.9 + step) * g] * 12)
            hbp.highway(chain, np.ones(1), 4, tolerance=1e-3)
    assert [w.category for w in caught] == [DivergenceWarning]


# Laws


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_iterates_are_linear_in_what_enters(kind, chunk, rng):
    problem = Problem(kind, rng, 5)
    chain = problem.chain()
    (u, v), (p, q) = rng.normal(size=(2, *problem.shape)), rng.normal(size=(2, 5, *problem.shape))

    def solved(cotangent: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return hbp.highway(chain, cotangent, 2, sources=sources, chunk=chunk)

    close(solved(2 * u - 3 * v, 2 * p - 3 * q), 2 * solved(u, p) - 3 * solved(v, q), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_unchanged(kind, rng):
    problem = Problem(kind, rng, 5)
    arrays = [problem.cotangent, problem.sources, *problem.residual.arrays]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    expected = problem.expected(2, problem.sources)
    close(hbp.highway(problem.chain(), problem.cotangent, 2, sources=problem.sources), expected)
    hbp.highway(problem.chain(), problem.cotangent, 1, sources=problem.sources, chunk=2)
    hbp.highway(problem.chain(), problem.cotangent, 9, sources=problem.sources, tolerance=0.5)
    hbp.backprop(problem.chain(), problem.cotangent, problem.sources)
    hbp.report(problem.chain(), problem.cotangent, sources=problem.sources)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["identity", "number", "scalars", "diagonal-mask", "dense"])
def test_dtype_in_is_dtype_out(kind, dtype, library, rng):
    def cast(x: Any) -> Any:
        return library.array(np.asarray(x, dtype if np.asarray(x).dtype != bool else bool))

    problem = Problem(kind, rng, 3)
    residual = Scalar(np.float64(0.7)) if kind == "number" else converted(problem.residual, cast)
    chain = LinearizedChain(matrix_pullbacks(problem.B, cast), residual)
    cotangent, sources = cast(problem.cotangent), cast(problem.sources)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for options in ({"iterations": 1}, {"iterations": 1, "chunk": 2}, {"iterations": None}):
        g = hbp.highway(chain, cotangent, sources=sources, **options)
        assert g.dtype == cotangent.dtype
        k = 3 if options["iterations"] is None else 1
        close(library.numpy(g), problem.expected(k, problem.sources, options.get("chunk", 1)), tolerance)


def test_half_precision_in_is_half_precision_out():
    R, B, cotangent = 0.998, float(np.float16(0.01)), np.ones(2, np.float16)
    chain = LinearizedChain([lambda g: g * np.float16(0.01)] * 200, Scalar(R))
    for options in ({"iterations": 1}, {"iterations": 1, "chunk": 3}, {"iterations": 1, "tolerance": 0.1}):
        with pytest.warns(DivergenceWarning) if "tolerance" in options else nullcontext():
            g = hbp.highway(chain, cotangent, **options)
        assert g.dtype == np.float16
        stages = [3] * 66 + [2] if "chunk" in options else [1] * 200
        expected = R**200 * (1 + sum((1 + B / R) ** n - 1 for n in stages))  # all residual, or through one block
        tolerance = 1e-2 if "chunk" in options else 2e-3  # a stage's block is a difference of two rounded maps
        np.testing.assert_allclose(g[0].astype(float), expected, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_propagated(kind, rng):
    problem = Problem(kind, rng, 4)
    for where, k in ((0, 4), (3, 4), (3, 1)):
        sources = problem.sources.copy()
        sources[where].reshape(-1)[:] = np.nan
        g = hbp.highway(problem.chain(), problem.cotangent, k, sources=sources)
        assert np.isfinite(g[where + 1 :]).all()
        assert np.isnan(g[where]).all()
        if (kind != "zero" and not kind.startswith("pair")) or k == 4:
            assert np.isnan(g[: where + 1]).all()


def test_layers_that_share_a_pullback_and_repeated_calls(rng):
    """A chain is a value: used twice it gives the same, and one callable may serve several layers."""
    B = rng.normal(size=(1, 3, 3)) / 3
    chain = LinearizedChain(matrix_pullbacks(B) * 4, Scalar(0.5))
    cotangent = rng.normal(size=3)
    first = hbp.highway(chain, cotangent, 2)
    np.testing.assert_array_equal(first, hbp.highway(chain, cotangent, 2))
    zero = np.zeros((4, 3))
    expected = path_sum(np.repeat(0.5 * np.eye(3)[None], 4, 0), np.repeat(B, 4, 0), np.vstack([zero, cotangent]), 2)
    close(first, expected)
    assert isinstance(Pair(np.ones((4, 2, 3)), np.ones((4, 2, 3)))[0], Pair)


class BatchedPullbacks:
    """All blocks as one product of stacked matrices, and one by one at an index a compiled loop may give."""

    traceable = True

    def __init__(self, transposed: Any) -> None:
        self.transposed = transposed

    def __len__(self) -> int:
        return len(self.transposed)

    def __getitem__(self, index: slice) -> BatchedPullbacks:
        return BatchedPullbacks(self.transposed[index])

    def __call__(self, cotangents: Any, backend: Any) -> Any:
        return (self.transposed @ cotangents.reshape(len(self), -1)[..., None])[..., 0].reshape(cotangents.shape)

    def at(self, i: Any, cotangent: Any, backend: Any) -> Any:
        return (self.transposed[i] @ cotangent.reshape(-1)).reshape(cotangent.shape)


@pytest.mark.parametrize("kind", ["identity", "number", "diagonal-shared", "dense"])
def test_pullbacks_given_all_at_once(kind, library, rng):
    problem = Problem(kind, rng, 5)
    batched = BatchedPullbacks(library.array(problem.B.swapaxes(1, 2).copy()))
    chain = LinearizedChain(batched, converted(problem.residual, library.array))
    cotangent, sources = map(library.array, (problem.cotangent, problem.sources))
    exact = problem.expected(5, problem.sources)
    for split_chain in (chain, chain.resplit(Scalar(0.5))):
        close(library.numpy(hbp.backprop(split_chain, cotangent, sources)), exact)
    close(library.numpy(hbp.backprop(chain, cotangent)), problem.expected(5))
    for k, chunk in ((1, 1), (1, 2), (0, 3)):
        g = hbp.highway(chain, cotangent, k, sources=sources, chunk=chunk)
        close(library.numpy(g), problem.expected(k, problem.sources, chunk))


@pytest.mark.parametrize("kind", ["identity", "number", "diagonal-shared"])
@pytest.mark.parametrize(
    "options", [{}, {"iterations": 1}, {"iterations": 2, "chunk": 2}, {"tolerance": 1e-3}], ids=str
)
def test_a_pullback_may_write_into_what_it_is_given(kind, options, rng):
    problem = Problem(kind, rng, 5)
    cotangent = problem.cotangent.copy()
    shape = cotangent.shape
    clean = [lambda g, M=M: (M.T @ g.reshape(-1)).reshape(shape) for M in problem.B]
    dirty = [lambda g, M=M: np.copyto(g, (M.T @ g.reshape(-1)).reshape(shape)) or g for M in problem.B]
    expected = hbp.highway(LinearizedChain(clean, problem.residual), cotangent, **options)
    np.testing.assert_array_equal(hbp.highway(LinearizedChain(dirty, problem.residual), cotangent, **options), expected)
    np.testing.assert_array_equal(cotangent, problem.cotangent)
    for of in (hbp.iterates, lambda *given: [hbp.report(*given)]):
        list(of(LinearizedChain(dirty, problem.residual), cotangent))
        np.testing.assert_array_equal(cotangent, problem.cotangent)


def test_one_pullback_for_all_layers_that_writes_in_place():
    chain = LinearizedChain([lambda g: np.multiply(g, 0.5, out=g)] * 2)
    assert hbp.backprop(chain, np.ones(1)).ravel().tolist() == [2.25, 1.5, 1]


@pytest.mark.parametrize("kind", ["number", "diagonal", "dense"])
@pytest.mark.parametrize(
    ("cut", "stages"), [(slice(1, 3), (1, 2)), (slice(0, None, 2), (0, 2)), (slice(2, None), (2,))]
)
def test_slices_of_a_coarse_chain_are_chains_of_its_stages(kind, cut, stages, rng):
    problem = Problem(kind, rng, 5)
    coarse, J = problem.chain().coarsen(2), problem.R + problem.B
    bounds = [0, 2, 4, 5]
    R = [
        np.linalg.multi_dot([np.eye(len(J[0])), *problem.R[bounds[s] : bounds[s + 1]][::-1], np.eye(len(J[0]))])
        for s in stages
    ]
    whole = [
        np.linalg.multi_dot([np.eye(len(J[0])), *J[bounds[s] : bounds[s + 1]][::-1], np.eye(len(J[0]))]) for s in stages
    ]
    c = np.zeros((len(stages) + 1, problem.cotangent.size))
    c[-1] = problem.cotangent.reshape(-1)
    assert len(coarse[cut]) == len(stages)
    for k in range(len(stages) + 1):
        expected = chunked_path_sum(np.stack(R), np.stack(whole) - np.stack(R), c, k, 1)
        close(hbp.highway(coarse[cut], problem.cotangent, k).reshape(expected.shape), expected)


def test_a_coarse_chain_takes_another_residual_path():
    chain = LinearizedChain([lambda g: 0.5 * g] * 4, Scalar(0.9))
    coarse, x = chain.coarsen(2), np.ones(1)
    assert hbp.highway(coarse, x, 0)[0].item() == pytest.approx(0.9**4)
    assert hbp.highway(dataclasses.replace(coarse, residual=Scalar(0.1)), x, 0)[0].item() == pytest.approx(0.01)
    assert hbp.highway(coarse.resplit(Scalar(0.1)), x, 0)[0].item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="has 4 maps and the chain 2 layers"):
        dataclasses.replace(coarse, residual=Scalar(np.ones(4)))


class Exponential(hbp.LinearOperator):
    """A kind of a user's own: v -> exp(a) v."""

    def __init__(self, exponents: np.ndarray) -> None:
        object.__setattr__(self, "exponents", exponents)

    def _target(self, like: Any) -> Any:
        return tuple(like.shape), ()

    def mv(self, v: Any) -> Any:
        return np.exp(self.exponents) * v


def test_a_residual_path_of_a_kind_of_one_s_own(rng):
    exponents, x = rng.normal(size=(4, 3)), rng.normal(size=3)
    own, known = Exponential(exponents), Diagonal(np.exp(exponents))
    pullbacks = [lambda g: 0.5 * g] * 4
    for k in range(5):
        expected = hbp.highway(LinearizedChain(pullbacks, known), x, k)
        close(hbp.highway(LinearizedChain(pullbacks, own), x, k), expected)
    half = lambda x: (0.5 * x, lambda g: 0.5 * g)  # noqa: E731
    chains = [hbp.linearize([half] * 4, x, lambda i, _, kind=kind: kind[i])[1] for kind in (own, known)]
    close(*(hbp.highway(chain, x, 1) for chain in chains))
    with pytest.raises(NotImplementedError, match=r"no scaled\(factor\); define it"):
        own.scaled(0.5)
    with pytest.raises(TypeError, match="a kind of your own goes alone"):
        hbp.linearize([half] * 2, x, lambda i, _: own[0] if i else known[0])
