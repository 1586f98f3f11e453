"""hb.diagnose and hb.estimate_damping: their figures against gradients and Jacobians computed beside them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hbp
import hbp.diagnosis

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


def strong(kind: str, hidden: int = 12, **options: Any) -> Any:
    """A layer as training leaves it: a few strong directions of its recurrent weights, and memory of many steps."""
    torch.manual_seed(0)
    layer = getattr(hb, kind)(3, hidden, **options).double()
    with torch.no_grad():
        for weight in (getattr(layer, name) for name in layer.recurrent_weights):
            weight += 2.5 * torch.linalg.qr(torch.randn(len(weight), 3).double())[0] @ torch.eye(3, hidden).double()
        for bias in (p for name, p in layer.named_parameters() if name.startswith("bias_ih")):
            bias[hidden : 2 * hidden] += 1.5
    return layer


def last(model: Any, x: Any) -> Any:
    return model(x)[0][-1].square().mean()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_rows_with_ranks_are_errors_of_the_gradients_too(kind, capsys):
    model, x = strong(kind, num_layers=2, bidirectional=True), torch.randn(14, 2, 3, dtype=torch.float64)
    exact = flat(gradient(model, last, x, None))
    model.iterations, model.rank = 2, 3
    flat(torch.autograd.grad(last(model, x), list(model.parameters())))
    before, taken = model.followed, model.directions
    found = hb.diagnose(model, last, x, iterations=(0, 1), chunks=(1, 4), ranks=(0, 5, "auto", 12))
    assert (model.followed, model.directions, model.iterations) == (before, taken, 2)
    assert [(row.rank, row.chunk, row.iterations) for row in found.rows] == [
        (rank, chunk, k) for chunk in (1, 4) for rank in (0, 5, "auto", 12) for k in (0, 1)
    ]
    for row in found.rows:
        hb.configure(model, row)
        assert (model.rank, model.chunk, model.iterations, model.tolerance) == (
            row.rank,
            row.chunk,
            row.iterations,
            None,
        )
        ours = flat(torch.autograd.grad(last(model, x), list(model.parameters())))
        assert row.overall.error == pytest.approx(float((ours - exact).norm() / exact.norm()), rel=1e-9, abs=1e-12)
        assert row.overall.error < 1e-12 or row.rank != 12
    errors = {(row.rank, row.chunk): row.overall.error for row in found.rows if row.iterations == 1}
    assert errors["auto", 1] < errors[0, 1]
    printed = capsys.readouterr().out
    for name, spectrum in found.spectra.items():
        np.testing.assert_allclose(spectrum.values, np.linalg.svd(getattr(model, name).detach().numpy())[1])
        assert spectrum.strong == 3
        assert f"{name}: 3 of 12 directions above" in printed
    assert list(found.spectra) == model.recurrent_weights
    hb.configure(model, found.exact)
    assert (model.rank, model.solver) == (0, hbp.Solver())


def test_times_are_those_of_training_where_directions_start_from_the_last(monkeypatch):
    """The decomposition at the start is no part of them; each rank goes on from its own directions."""
    model, x = strong("GRU"), torch.randn(9, 2, 3, dtype=torch.float64)
    started, run = [], hb.recurrent.following.directions

    def told(weight: Any, rank: Any, start: Any, **own: Any) -> Any:
        started.append((rank, start and start.rank))
        return run(weight, rank, start, **own)

    monkeypatch.setattr(hb.recurrent.following, "directions", told)
    hb.diagnose(model, last, x, iterations=(1,), ranks=(2, 0, 4))
    assert started == [(2, None), (4, None)] + 3 * [(2, 2), (4, 4)]


def test_ranks_are_of_the_layers_that_take_them():
    torch.manual_seed(0)
    head = hb.Sequential(*(hb.Residual(nn.Linear(12, 12)) for _ in range(3))).double()
    model = nn.ModuleDict({"net": strong("LSTM"), "head": head})
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    found = hb.diagnose(model, lambda m, x: last(lambda x: (m["head"](m["net"](x)[0]),), x), x, ranks=(0, 12))
    assert list(found.spectra) == ["net.weight_hh_l0"]
    hb.configure(model, next(row for row in found.rows if row.rank == 12 and row.iterations == 3))
    assert (model["net"].rank, head.iterations) == (12, 3)
    hb.configure(model, hbp.Solver(2))
    assert (model["net"].rank, head.iterations) == (12, 2)  # a solver says nothing of ranks


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (stack(), ValueError, r"rank=8: no layer here takes a rank, a GRU or an LSTM would \(Sequential\); give 0"),
        (hb.GRU(3, 4), ValueError, "rank=8 is more than hidden_size=4"),
        (hb.GRU(3, 9, residual=hbp.Zero()), ValueError, "residual and rank are given"),
    ],
)
def test_ranks_that_no_layer_takes_are_refused_before_any_work(model, error, message, capsys):
    with pytest.raises(error, match=message):
        hb.diagnose(model, lambda *_: pytest.fail("it ran"), None, ranks=(0, 8))
    assert not capsys.readouterr().out
    row = hbp.diagnosis.Row(3, 2, hbp.diagnosis.Agreement(), {}, {}, rank=8)
    with pytest.raises(error, match=message):
        hb.configure(model, row)
    assert (model.iterations, model.chunk) == (None, 1)


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
    model, x = strong("GRU"), torch.randn(9, 2, 3, dtype=torch.float64)
    hb.diagnose(model, last, x, iterations=(0, 2), ranks=(0, "auto"), plot=tmp_path / "ranks.png")
    widths = [int.from_bytes((tmp_path / f"{name}.png").read_bytes()[16:20]) for name in ("found", "ranks")]
    assert widths[0] < widths[1]  # one panel more, of spectra


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
