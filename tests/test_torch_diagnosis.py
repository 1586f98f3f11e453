"""hb.diagnose and hb.estimate_damping: their figures against gradients and Jacobians computed beside them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn

D, L = 4, 6


def stack(**options: Any) -> Any:
    torch.manual_seed(0)
    return hb.Sequential(*(hb.Residual(nn.Sequential(nn.Linear(D, D), nn.Tanh())) for _ in range(L)), **options)


def loss_of(model: Any, x: Any) -> Any:
    return model(x).square().mean()


def gradient(model: Any, loss: Any, batch: Any, k: int | None, chunk: int = 1) -> list[Any]:
    for part in hb.options.scheduled(model).values():
        part.iterations, part.chunk = k, chunk
    return torch.autograd.grad(loss(model, batch), list(model.parameters()))


def flat(gradients: list[Any]) -> Any:
    return torch.cat([g.flatten() for g in gradients])


def test_rows_are_errors_and_cosines_of_the_gradients(capsys):
    model, x = stack().double(), torch.randn(3, D, dtype=torch.float64)
    found = hb.diagnose(model, loss_of, x, iterations=(0, 2, L), chunks=(1, 2), target=0.05)
    exact = gradient(model, loss_of, x, None)
    for row in found.rows:
        ours = gradient(model, loss_of, x, row.iterations, row.chunk)
        a, b = flat(ours), flat(exact)
        assert row.overall.error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6, abs=1e-12)
        assert row.overall.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()))
        assert list(row.layers) == [str(i) for i in range(L)]
        a, b = flat(ours[4:6]), flat(exact[4:6])
        assert row.layers["2"].error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6, abs=1e-12)
        (report,) = row.reports.values()
        assert len(report.increments) == min(row.iterations, -(-L // row.chunk)) + 1
        assert row.seconds > 0
    assert found.rows[2].overall.error < 1e-12
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:2] == ["k", "chunk"]
    first, second = printed.split("timing all settings in turn, pass 1 2 3 of 3\n")
    assert len(first.splitlines()) == len(second.splitlines()) - 1 == 8
    assert second == f"{found}\n"
    assert all(str(row) in second for row in (found.exact, *found.rows))
    assert (found.exact.solver, found.exact.overall.error) == (hbp.Solver(), 0)


class Clock:
    """A clock on which the n-th step with k iterations takes ``cost(k, n)`` seconds."""

    def __init__(self, cost: Any) -> None:
        self.cost, self.now, self.steps, self.watched = cost, 0.0, [], []

    def perf_counter(self) -> float:
        return self.now

    def loss(self, model: Any, x: Any) -> Any:
        k = model.iterations
        self.now += self.cost(k, self.steps.count(k))
        self.steps.append(k)
        self.watched.append(model.reports is not None)
        return loss_of(model, x)


def test_the_fastest_median_within_the_target_is_recommended(monkeypatch):
    """Steps with k = 3 are once very fast, those with k = 0 always, but not within the target."""
    costs = {None: [9, 9, 9, 9], 0: [1, 1, 1, 1], 2: [99, 7, 8, 7], 3: [1, 1, 20, 20], L: [8, 8, 8, 8]}
    clock = Clock(lambda k, n: costs[k][n])
    monkeypatch.setattr(hb.diagnosis, "time", clock)
    model, settings = stack(), (0, 2, 3, L)
    found = hb.diagnose(model, clock.loss, torch.randn(3, D), iterations=settings, target=0.05)
    assert [row.iterations for row in found.within] == [2, 3, L]
    assert [row.seconds for row in (found.exact, *found.rows)] == [9, 1, 7, 20, 8]
    assert found.recommended.iterations == 2
    assert clock.steps == [None, *settings] * 4
    assert clock.watched == [True] * 5 + [False] * 15
    costs[None] = [7] * 4
    clock.steps.clear()
    found = hb.diagnose(model, clock.loss, torch.randn(3, D), iterations=settings, target=0.05)
    assert found.recommended is found.exact
    assert found.recommended.solver == hbp.Solver()


def test_the_recommendation_can_be_taken(monkeypatch):
    """With a chunk, in a model of several layers, one of them converted; and exact backprop likewise."""
    torch.manual_seed(1)
    blocks = [hb.Residual(nn.Sequential(nn.Linear(D, D), nn.Tanh())) for _ in range(L)]
    model, x = hb.convert(nn.Sequential(*blocks, stack())).double(), torch.randn(3, D, dtype=torch.float64)
    exact = flat(gradient(model, loss_of, x, None))
    model[-1].tolerance = 0.5
    now = iter(range(1000))
    monkeypatch.setattr(hb.diagnosis, "time", SimpleNamespace(perf_counter=lambda: next(now) ** 0.5))  # ever faster
    found = hb.diagnose(model, loss_of, x, iterations=(1,), chunks=(1, 3), target=0.3)
    assert (found.recommended.iterations, found.recommended.chunk) == (1, 3)
    for setting in (found.recommended, found.rows[0], found.exact):
        hb.configure(model, setting)
        ours = flat(torch.autograd.grad(loss_of(model, x), list(model.parameters())))
        error = float((ours - exact).norm() / exact.norm())
        assert error == pytest.approx(setting.overall.error, rel=1e-9, abs=1e-15)
    assert found.rows[0].overall.error > 1.2 * found.rows[1].overall.error
    nothing = hb.diagnose(model, loss_of, x, iterations=(0,), target=0)
    hb.configure(model, nothing.recommended)
    assert nothing.recommended is nothing.exact
    assert all(layers.solver == hbp.Solver() for layers in hb.options.scheduled(model).values())


def test_nothing_is_left_changed():
    torch.manual_seed(0)
    model = nn.Sequential(
        hb.Sequential(
            *(hb.Residual(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5))) for _ in range(L)),
            iterations=hbp.Schedule({0: 1}),
            tolerance=0.1,
            chunk=2,
        )
    )
    x, before = torch.randn(8, D), {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = hb.diagnose(model, loss_of, x, iterations=(0, L))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (model[0].iterations, model[0].chunk, model[0].tolerance) == (hbp.Schedule({0: 1}), 2, 0.1)
    assert model[0].reports is None
    assert found.rows[1].overall.error < 1e-5  # so every run saw the same dropout


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_recurrent_layers(kind):
    torch.manual_seed(0)
    model = getattr(hb, kind)(3, 5, num_layers=2, bidirectional=True).double()
    x = torch.randn(12, 2, 3, dtype=torch.float64)
    found = hb.diagnose(model, lambda m, x: m(x)[0].square().mean(), x, iterations=(1, 12), chunks=(1, 4))
    assert found.rows[1].overall.error < 1e-12
    assert found.rows[0].overall.error > 1e-4
    assert found.rows[0].increment > found.rows[1].increment


def test_a_diverging_split_is_named_with_its_cures(capsys):
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Any) -> Any:
            return self.weight * x

    model = hb.Sequential(*(Cancelling() for _ in range(9)))
    found = hb.diagnose(model, lambda m, x: m(x).sum(), torch.ones(2), iterations=(1, 3))
    assert all(row.diverges for row in found.rows)
    assert "damp the split" in capsys.readouterr().out
    assert hb.estimate_damping(model, torch.ones(2), assign=True) == pytest.approx([0.9] * 9)
    assert model.damping == pytest.approx([0.9] * 9)
    found = hb.diagnose(model, lambda m, x: m(x).sum(), torch.ones(2), iterations=(0,))
    assert found.rows[0].overall.error < 1e-5


def test_damping_is_the_trace_of_the_jacobian():
    model, x = stack(iterations=None).double(), torch.randn(3, D, dtype=torch.float64)
    found = hb.estimate_damping(model, x, samples=4000)
    states = [x]
    for layer in model:
        states.append(layer(states[-1]))
    for gamma, layer, state in zip(found, model, states, strict=False):
        jacobians = [torch.autograd.functional.jacobian(layer.block, row) for row in state]
        assert gamma == pytest.approx(-sum(j.trace() for j in jacobians).item() / state.numel(), abs=0.02)
    assert model.damping == 0
    assert model.iterations is None
    converted = hb.convert(nn.Sequential(nn.Linear(2, D), *model).double())
    assert len(hb.estimate_damping(converted, (torch.randn(3, 2, dtype=torch.float64),))) == L


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    hb.diagnose(stack(), loss_of, torch.randn(3, D), iterations=(0, 2), chunks=(1, 2), plot=tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(D, D)}, ValueError, "without any of hbp's layers"),
        ({"iterations": ()}, ValueError, "give at least one number of iterations"),
        ({"iterations": (-1,)}, ValueError, "iterations=-1 is too small"),
        ({"chunks": (0,)}, ValueError, "chunk=0 is too small"),
        ({"target": None}, ValueError, "target=None; give a relative error"),
        ({"loss_fn": lambda model, x: model(x)}, ValueError, "loss_fn returned a Tensor"),
        ({"loss_fn": lambda model, x: model(x).sum() * float("nan")}, ValueError, "the loss is nan"),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": stack(), "loss_fn": loss_of, "batch": torch.randn(3, D)} | change
    with pytest.raises(error, match=message):
        hb.diagnose(**given)


def test_a_picture_that_cannot_be_drawn_is_told_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        hb.diagnose(stack(), lambda *_: pytest.fail("it ran"), None, plot=tmp_path / "found.png")
    assert not capsys.readouterr().out


def test_bad_input_of_the_damping():
    with pytest.raises(ValueError, match="has 0 stacks"):
        hb.estimate_damping(hb.GRU(2, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="has 2 stacks"):
        hb.estimate_damping(nn.Sequential(stack(), stack()), torch.ones(3, D))
    with pytest.raises(ValueError, match="no layer of the stack ran with gradients"):
        hb.estimate_damping(stack().requires_grad_(False), torch.ones(3, D))
