"""The solver as a value: checked when made, in place of the keywords wherever they stand, carried whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import hbp
from hbp import LinearizedChain, Schedule, Solver

CHAIN = LinearizedChain([lambda g, s=s: s * g for s in (0.5, -0.25, 0.75, 0.3, -0.6)], hbp.Scalar(0.9))
C = np.array([1.0, -2.0])


def test_a_solver_is_a_value():
    assert Solver(3, 2) == Solver(iterations=np.int64(3), chunk=np.int32(2))
    assert hash(Solver(3)) == hash(Solver(3))
    assert Solver(3) != Solver(3, tolerance=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Solver().chunk = 2
    assert Solver().exact
    assert not Solver(tolerance=0.1).exact


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ({"iterations": -1}, ValueError, "iterations=-1 is too small"),
        ({"iterations": 1.5}, TypeError, "iterations=1.5 is a float"),
        ({"chunk": 0}, ValueError, "chunk=0 is too small"),
        ({"chunk": None}, TypeError, "chunk=None is a NoneType"),
        ({"tolerance": 2.0}, ValueError, "tolerance=2.0; give a non-negative number, at most 1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance=nan"),
        ({"watch": 3}, TypeError, "watch is a int; give a function"),
    ],
)
def test_fields_are_checked_when_it_is_made(field, error, message):
    with pytest.raises(error, match=message):
        Solver(**field)


@pytest.mark.parametrize(
    "options", [{}, {"iterations": 2}, {"iterations": 1, "chunk": 2}, {"tolerance": 0.01}], ids=str
)
def test_a_solver_stands_for_the_keywords(options):
    solver = Solver(**options)
    np.testing.assert_array_equal(hbp.highway(CHAIN, C, solver=solver), hbp.highway(CHAIN, C, **options))
    params = hbp.cells.GRUParameters(np.full((6, 1), 0.3), np.full((6, 2), -0.4))
    h, pullback = hbp.cells.gru(params, np.ones((5, 1, 1)), np.zeros((1, 2)))
    for a, b in zip(pullback(h, solver=solver)[0][:2], pullback(h, **options)[0][:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_reports_and_iterates_take_a_solver():
    full = hbp.report(CHAIN, C)
    assert hbp.report(CHAIN, C, solver=Solver(2)).increments == full.increments[:3]
    shares = [a / b for a, b in zip(full.increments, full.sizes, strict=True)]
    stop = next(k for k, share in enumerate(shares) if share <= 0.05)
    assert 0 < stop < 5
    assert len(list(hbp.iterates(CHAIN, C, solver=Solver(tolerance=0.05)))) == stop + 1
    seen: list[Any] = []
    g = hbp.highway(CHAIN, C, solver=Solver(tolerance=0.05, watch=seen.append))
    np.testing.assert_allclose(g, hbp.highway(CHAIN, C, stop), rtol=1e-14)
    assert seen[0].increments == full.increments[: stop + 1]


def test_one_or_the_other():
    for call in (
        lambda **how: hbp.highway(CHAIN, C, 2, **how),
        lambda **how: hbp.highway(CHAIN, C, chunk=2, **how),
        lambda **how: hbp.highway(CHAIN, C, watch=print, **how),
        lambda **how: hbp.iterates(CHAIN, C, chunk=2, **how),
        lambda **how: hbp.report(CHAIN, C, 1, **how),
    ):
        with pytest.raises(TypeError, match="give one or the other"):
            call(solver=Solver(3))
        with pytest.raises(TypeError, match=r"solver is a int; give an hbp\.Solver"):
            call(solver=3)


def test_a_schedule_is_taken_at_a_step():
    solver = Solver(Schedule({0: 1, 5: None}), chunk=2)
    assert (solver.at(4), solver.at(5)) == (Solver(1, 2), Solver(None, 2))
    for call in (lambda: hbp.highway(CHAIN, C, solver=solver), lambda: hbp.highway(CHAIN, C, solver.iterations)):
        with pytest.raises(TypeError, match="iterations is a Schedule; call it with the training step"):
            call()


def test_solvers_with_different_watchers_differ():
    assert Solver(3) != Solver(3, watch=print)
    assert Solver(3, watch=print) == Solver(3, watch=print)
    seen: list[Any] = []
    both = Solver(2, watch=seen.append).watched(seen.append)
    hbp.highway(CHAIN, C, solver=both)
    assert len(seen) == 2
    assert seen[0] is seen[1]
