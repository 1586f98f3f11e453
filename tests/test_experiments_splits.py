"""The splits side by side: multigrid against its textbook form on explicit matrices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

import hbp
from experiments.multigrid import multigrid, steps
from hbp.core.pullbacks import Pullbacks
from tests.oracles import chunked_path_sum, suffix_loop

D = 3


@dataclass
class Chain:
    """Random layers as explicit matrices and as a chain, with sources."""

    R: np.ndarray
    B: np.ndarray
    c: np.ndarray
    chain: hbp.LinearizedChain


def made(length, whole=False):
    """With ``whole``, the same chain made of whole layers."""
    rng = np.random.default_rng(length)
    diagonal = rng.uniform(0.5, 1, (length, D))
    R = np.stack([np.diag(row) for row in diagonal]) if length else np.zeros((0, D, D))
    B, c = rng.normal(0, 0.5, (length, D, D)), rng.standard_normal((length + 1, D))
    pullbacks = [lambda g, m=m: g @ m for m in (R + B if whole else B)]
    residual = hbp.Diagonal(diagonal)
    chain = hbp.LinearizedChain(pullbacks, hbp.Zero() if whole else residual)
    return Chain(R, B, c, chain.resplit(residual) if whole else chain)


def solve(problem, cycles, size, **options):
    return multigrid(problem.chain, problem.c[-1], cycles, size, sources=problem.c[:-1], **options)


def bounds(length, size):
    return list(pairwise([*range(0, length, size), length]))


def parareal(problem, cycles, size, sweeps=1):
    """The C-points by the method's definition, on matrices in the direction they are applied."""
    R, B, c = problem.R, problem.B, problem.c
    fine, coarse, entering = [], [], []
    for start, end in bounds(len(R), size):
        whole = residual = np.eye(D)
        held, entered = np.zeros((D, D)), np.zeros(D)
        for i in range(start, end):
            entered = entered + whole.T @ c[i]
            whole, residual, held = (R[i] + B[i]) @ whole, R[i] @ residual, R[i] @ held + np.eye(D)
        fine.append(whole.T)
        coarse.append((residual + held @ B[start]).T)
        entering.append(entered)

    def corrected(old):
        new = [c[-1]]
        for j in reversed(range(len(fine))):
            known = (fine[j] - coarse[j]) @ old[j + 1] if old is not None else 0
            new.insert(0, coarse[j] @ new[0] + known + entering[j])
        return new

    G = corrected(None)
    for _ in range(cycles):
        for _ in range(sweeps - 1):
            G = [*(fine[j] @ G[j + 1] + entering[j] for j in range(len(fine))), c[-1]]
        G = corrected(G)
    return np.array(G)


@pytest.mark.parametrize(("length", "size"), [(7, 3), (8, 2), (5, 8), (4, 1), (9, 4)])
@pytest.mark.parametrize("cycles", [0, 1, 2])
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
def test_each_cycle_is_parareals(length, size, cycles, relaxation):
    problem = made(length)
    found = solve(problem, cycles, size, relaxation=relaxation)
    expected = parareal(problem, cycles, size, {"F": 1, "FCF": 2}[relaxation])
    points = [*range(0, length, size), length]
    np.testing.assert_allclose(found[points], expected, rtol=1e-12)
    ends = np.repeat(np.arange(1, len(points)), np.diff(points))
    for i in set(range(length)) - set(points):  # between the C-points: exact from the next one
        inside = np.vstack([problem.c[i : points[ends[i]]], expected[ends[i]]])
        matrices = (problem.R + problem.B).swapaxes(1, 2)[i : points[ends[i]]]
        np.testing.assert_allclose(found[i], suffix_loop(matrices, inside)[0], rtol=1e-12)


@pytest.mark.parametrize(("relaxation", "needed"), [("F", 4), ("FCF", 2)])
def test_multigrid_is_exact_when_it_must_be_and_not_before(relaxation, needed):
    problem = made(11)  # stages of 3, 3, 3, 2 layers
    exact = suffix_loop((problem.R + problem.B).swapaxes(1, 2), problem.c)
    errors = [np.abs(solve(problem, k, 3, relaxation=relaxation) - exact).max() for k in range(needed + 1)]
    assert errors[-1] < 1e-12 < 1e-3 < min(errors[:-1])


def test_with_the_stages_themselves_as_propagators_one_coarse_solve_is_exact():
    problem = made(10)
    exact = suffix_loop((problem.R + problem.B).swapaxes(1, 2), problem.c)
    found = solve(problem, 1, 4, coarse=problem.chain.coarsen(4))
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    np.testing.assert_allclose(solve(problem, 0, 1), exact, rtol=1e-12)  # a held block of one layer is the layer


@dataclass
class ResidualPaths(Pullbacks):
    """The stages' residual paths alone."""

    stages: hbp.LinearizedChain

    def at(self, i, cotangent, backend):
        return self.stages.residual[i].T.mv(cotangent)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_with_residual_paths_as_propagators_multigrid_is_highway_bp_with_chunks(k):
    problem = made(8, whole=True)
    stages = problem.chain.coarsen(3).bind(problem.c[-1], hbp.use("numpy").backend)
    hbp.use(None)
    found = solve(problem, k, 3, coarse=ResidualPaths(stages))
    np.testing.assert_allclose(found, chunked_path_sum(problem.R, problem.B, problem.c, k, 3), rtol=1e-11)


def test_steps_counts_layers_one_after_another():
    assert steps(16, 0, 4) == 4 + 4  # the coarse solve, and the last sweep through the stages
    assert steps(16, 1, 4) == 8 + (4 + 4)  # a relaxation and a coarse solve
    assert steps(16, 1, 4, "FCF") == 8 + (8 + 4)
    assert steps(17, 1, 4) == 2 * 5 + 2 * 4  # the last stage is shorter
