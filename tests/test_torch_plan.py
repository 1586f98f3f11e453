"""hb.plan: what it measures, on a clock that layers move, and that it leaves the model as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hbp.planning import Costs, Step

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn

D, L = 4, 8
NOW = [0.0]


class Work(torch.autograd.Function):
    """The identity, which takes ``there`` seconds, and whose derivative takes ``back``."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        NOW[0] += there
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        NOW[0] += ctx.back
        return g, None, None


class Layer(nn.Module):
    """F = 2, Bi = 3 and Bw = 5."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(D, D))

    def forward(self, x):
        return x + torch.tanh(Work.apply(x, 2, 3) @ Work.apply(self.weight, 0, 5))


class Net(nn.Module):
    def __init__(self, count=L):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.dropout(x, 0.1)


def loss_of(model: Any, x: Any) -> Any:
    NOW[0] += 7
    return model(x).square().mean()


def unseen(model: Any, x: Any) -> Any:
    raise AssertionError("work before the input was checked")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    torch.manual_seed(0)
    for module in (hb.planning, hb.diagnosis):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: NOW[0]))


def planned(model: Any, **options: Any) -> Any:
    return hb.plan(model, loss_of, torch.randn(3, D), **options)


MODELS = {
    "plain": Net,
    "converted": lambda: hb.convert(Net(), iterations=2),
    "Sequential": lambda: hb.Sequential(*(Layer() for _ in range(L))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_costs_are_those_of_a_stage(kind, capsys):
    found = planned(MODELS[kind](), stages=(2, 3, 8), microbatches=(1, 4), bandwidth=1e6, latency=0.5)
    outside = 4 if kind == "Sequential" else 7  # in a step nothing is pulled through its first layer, to no parameter
    size = 3 * D * 4
    assert found.costs == {  # three stages of 8 layers: the largest has 3
        2: Costs(8, 12, 20, size, outside, 2),
        3: Costs(6, 9, 15, size, outside, 2),
        8: Costs(2, 3, 5, size, outside, 1),
    }
    step = Step(found.costs[8], found.settings.link, 8, 4)
    assert found.rows[-1].exact["GPipe"] == step.gpipe() == outside + 11 / 4 * 10 + 14 * (0.5 + size / 4 / 1e6)
    assert capsys.readouterr().out.endswith(f"{found}\n")


def test_errors_are_those_of_a_diagnosis():
    model = hb.convert(Net(), iterations=2)
    x = torch.randn(3, D)
    torch.manual_seed(1)
    found = hb.plan(model, loss_of, x, stages=(2, 4), iterations=(0, 1, 3), target=0.2)
    torch.manual_seed(1)
    rows = hb.diagnose(model, loss_of, x, iterations=(0, 1, 3), chunks=(4, 2), target=0.2)
    errors = {(L // row.chunk, row.iterations): row.overall.error for row in rows.rows}
    assert found.errors == pytest.approx(errors)
    assert found.within == {(L // row.chunk, row.iterations) for row in rows.within}
    assert 0 < len(found.within) < 6


def test_the_model_is_as_it_was():
    model, x = Net(), torch.randn(3, D)
    state = torch.get_rng_state()
    hb.plan(model, loss_of, x, stages=(2,))  # its dropout draws
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(layer) for layer in model.layers)
    assert all(p.grad is None for p in model.parameters())
    converted = hb.convert(model, iterations=3, chunk=2)
    planned(converted, stages=(2,))
    (stack,) = hb.options.scheduled(converted).values()
    assert (stack.iterations, stack.chunk, stack.reports) == (3, 2, None)


def test_more_stages_than_layers_are_left_out(capsys):
    assert sorted(planned(Net(3), stages=(2, 3, 4, 16)).costs) == [2, 3]
    assert capsys.readouterr().out.startswith("left out: P = 4, 16, as the stack has 3 layers\n")


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (Net, {"stages": (0,)}, ValueError, "stages=0 is too small"),
        (Net, {"stages": (16, 32)}, ValueError, "stages=16, 32: the stack has 8 layers; give a number of stages up to"),
        (Net, {"microbatches": (0,)}, ValueError, "microbatches=0 is too small"),
        (Net, {"bandwidth": 0}, ValueError, "bandwidth=0; give a finite number above 0"),
        (Net, {"latency": float("nan")}, ValueError, "latency=nan; give a finite number of at least 0"),
        (Net, {"plot": "/nowhere/plan.png"}, OSError, "there is no folder '/nowhere'"),
        (lambda: nn.Linear(2, 2), {}, ValueError, "found no stack to convert in this Linear"),
        (lambda: hb.GRU(2, 2), {}, ValueError, "this GRU has 0 stacks; plan takes a model with one"),
        (lambda: Net().requires_grad_(False), {}, ValueError, "no parameter of this Net needs gradients"),
        (lambda: 3, {}, TypeError, "model is a int; give a torch.nn.Module"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, options, error, said):
    if "plot" in options:
        pytest.importorskip("matplotlib")
    given = model()
    with pytest.raises(error, match=said):
        hb.plan(given, unseen, torch.randn(3, D), **options)
    if isinstance(given, Net):
        assert not any("forward" in vars(layer) for layer in given.layers)


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    planned(Net(), stages=(2,), plot=tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
