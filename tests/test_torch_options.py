"""Options of layers, set one by one or on a whole model at once: checked, and all or nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn
SOLVER = hbp.Solver(iterations=3, chunk=2, tolerance=0.1)


def model() -> Any:
    """A converted stack, a stack and a recurrent layer, with options of their own."""
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    found = hb.convert(nn.Sequential(*layers), iterations=1, chunk=3)
    own = hb.Sequential(hb.Residual(nn.Linear(4, 4)), iterations=hbp.Schedule({0: 2, 1: None}), tolerance=0.2)
    return nn.Sequential(found, own, hb.GRU(4, 4, chunk=5))


def solvers(module: Any) -> list[Any]:
    return [layers.solver for layers in hb.options.scheduled(module).values()]


def test_configure_sets_a_whole_setting_on_all_layers():
    found = model()
    assert len(set(solvers(found))) == 3
    hb.configure(found, SOLVER)
    assert solvers(found) == [SOLVER] * 3
    assert found[0][0].forward.stack.current() == found[2].options().solver == SOLVER
    assert (found[1].iterations, found[1].chunk, found[1].tolerance) == (3, 2, 0.1)
    hb.configure(found, hbp.Solver(hbp.Schedule({0: 1, 1: 4})))
    hb.step(found)
    assert [layers.current().iterations for layers in hb.options.scheduled(found).values()] == [4] * 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: hb.set_iterations(m, -1), ValueError, "iterations=-1 is too small"),
        (lambda m: hb.set_iterations(m, "3"), TypeError, "iterations='3' is a str"),
        (lambda m: hb.configure(m, 3), TypeError, "setting is a int; give an hbp.Solver, or a row, as diagnose"),
        (lambda m: hb.configure(m, None), TypeError, "setting is a NoneType; give an hbp.Solver"),
        (lambda m: hb.configure(m, hbp.Schedule({0: 1})), TypeError, r"is a Schedule; .* goes to set_iterations"),
        (lambda m: setattr(m[1], "iterations", -1), ValueError, "iterations=-1 is too small"),
        (lambda m: setattr(m[2], "chunk", 0), ValueError, "chunk=0 is too small"),
        (lambda m: setattr(m[2], "tolerance", 2), ValueError, "tolerance=2; give"),
        (lambda m: setattr(m[2], "solver", 3), TypeError, "solver is a int; give an hbp.Solver"),
        (lambda m: setattr(m[1], "solver", None), TypeError, "solver is a NoneType; give an hbp.Solver"),
        (lambda m: setattr(m[0][0].forward.stack, "solver", 3), TypeError, "solver is a int; give an hbp.Solver"),
        (lambda m: hb.follow(None, m), TypeError, "optimizer is a NoneType; give a torch.optim.Optimizer"),
        (lambda m: hb.follow(m, m), TypeError, "optimizer is a Sequential; give a torch.optim.Optimizer"),
    ],
)
def test_what_is_refused_changes_nothing(call, error, message):
    found = model()
    before = solvers(found)
    with pytest.raises(error, match=message):
        call(found)
    assert all(one is other for one, other in zip(solvers(found), before, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        hb.step,
        lambda module: hb.configure(module, SOLVER),
        lambda module: hb.set_iterations(module, 1),
        lambda module: hb.follow(torch.optim.SGD([torch.zeros(1)]), module),
        lambda module: hb.diagnose(module, None, None),
    ],
)
def test_modules_without_layers_are_refused(call):
    with pytest.raises(ValueError, match=r"a Linear without any of hbp's layers; build it with .* takes its solver="):
        call(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module is a NoneType; give a torch\.nn\.Module"):
        call(None)


def test_a_solver_set_afterwards_is_copied_pickled_and_compiled():
    torch.manual_seed(0)
    found, x = hb.GRU(4, 4), torch.randn(6, 2, 4)
    found.solver = hbp.Solver(iterations=1)

    def gradient(module: Any) -> Any:
        return torch.autograd.grad(module(x)[0].square().sum(), found.weight_hh_l0)[0]

    expected = gradient(found)
    for same in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert same.solver == found.solver
        same.iterations = 2
    assert found.iterations == 1
    assert torch.equal(gradient(torch.compile(found, backend="eager")), expected)
    found.solver = hbp.Solver()
    assert (gradient(found) - expected).abs().max() > 1e-4
