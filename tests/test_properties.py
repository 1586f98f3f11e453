"""Iterate k on chains drawn at random: the block system assembled densely, its Neumann series cut after k blocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from oracles import KINDS, fits, matrix_pullbacks, residual_case

import hbp

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


def assembled(maps: np.ndarray) -> np.ndarray:
    """The matrix that takes the cotangents of all L + 1 states at once one layer back, by these maps (L, n, n)."""
    length, n, _ = maps.shape
    whole = np.zeros(((length + 1) * n, (length + 1) * n))
    for i, one in enumerate(maps):
        whole[i * n : (i + 1) * n, (i + 1) * n : (i + 2) * n] = one.T
    return whole


def truncated(R: np.ndarray, B: np.ndarray, c: np.ndarray, k: int) -> np.ndarray:
    """The terms of ``g = (R + B) g + c`` with at most k blocks: ``sum_n ((I - R)^-1 B)^n (I - R)^-1 c``."""
    size = c.size
    inverse = np.linalg.inv(np.eye(size) - assembled(R))
    term = g = inverse @ c.reshape(size)
    for _ in range(k):
        term = inverse @ assembled(B) @ term
        g = g + term
    return g.reshape(c.shape)


def staged(R: np.ndarray, B: np.ndarray, c: np.ndarray, k: int, chunk: int) -> np.ndarray:
    """The same on the chain of stages, and inside each stage the exact solution from its end."""
    length, n = len(R), c.shape[1]
    stages = list(pairwise([*range(0, length, chunk), length]))
    maps, blocks, entering = [], [], []
    for a, b in stages:
        path, layers, sources = np.eye(n), np.eye(n), np.zeros(n)
        for i in range(a, b):
            sources = sources + layers.T @ c[i]
            path, layers = R[i] @ path, (R[i] + B[i]) @ layers
        maps.append(path), blocks.append(layers - path), entering.append(sources)
    coarse = truncated(np.array(maps), np.array(blocks), np.array([*entering, c[-1]]), k)
    g = np.array(c)
    for (a, b), start, end in zip(stages, coarse, coarse[1:], strict=False):
        inner = np.concatenate([c[a:b], end[None]])
        g[a:b] = truncated(R[a:b] + B[a:b], np.zeros_like(B[a:b]), inner, 0)[:-1]
        g[a] = start
    return g


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    """Residual maps and their matrices, blocks, what enters, and the settings of a solver."""
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 2), (2, 2, 3)]))
    kind = draw(st.sampled_from([kind for kind in KINDS if fits(kind, shape)]))
    length, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    rng, n = np.random.default_rng(seed), int(np.prod(shape))
    residual, R = residual_case(kind, rng, length, shape)
    B = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])) * rng.uniform(-1, 1, (length, n, n)) / n**0.5
    entering = draw(st.sampled_from(["cotangent", "sources", "one source"]))
    c = rng.normal(size=(length + 1, n))
    if entering != "sources":
        kept = draw(st.integers(0, length)) if entering == "one source" else length
        c[np.arange(length + 1) != kept] = 0
    sources = None if entering == "cotangent" else c[:-1].reshape(length, *shape)
    return shape, residual, R, B, c, sources, draw(st.integers(0, length + 1)), draw(st.integers(1, length + 1))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(problems())
def test_iterate_k_of_any_chain_is_the_truncated_series(problem):
    shape, residual, R, B, c, sources, k, chunk = problem
    chain, cotangent = hbp.LinearizedChain(matrix_pullbacks(B), residual), c[-1].reshape(shape)
    expected = staged(R, B, c, k, chunk).reshape(-1, *shape)
    scale = max(1.0, float(np.abs(expected).max()), float(np.abs(staged(R, B, c, len(R), 1)).max()))
    found = hbp.highway(chain, cotangent, k, sources=sources, chunk=chunk)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale)
    by_increments = [it.cotangents for it in hbp.iterates(chain, cotangent, sources=sources, chunk=chunk)]
    np.testing.assert_allclose(by_increments[min(k, len(by_increments) - 1)], expected, rtol=0, atol=1e-11 * scale)
    exact = truncated(R + B, np.zeros_like(B), c, 0).reshape(expected.shape)
    np.testing.assert_allclose(hbp.backprop(chain, cotangent, sources), exact, rtol=0, atol=1e-11 * scale)
