"""hb.diagnose and hb.estimate_damping: their figures against gradients and Jacobians computed beside them."""

from __future__ import annotations

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
    assert len(printed.splitlines()) == 8
    assert found.advice in printed
    assert all(str(row) in str(found) for row in found.rows)


def test_the_recommendation_is_the_smallest_setting_within_the_target():
    model, x = stack(), torch.randn(3, D)
    found = hb.diagnose(model, loss_of, x, iterations=(L, 0, 1, 2, 3), target=0.05)
    good = [row.iterations for row in found.rows if row.overall.error <= 0.05]
    assert found.recommended.iterations == min(good) > 0
    assert f"iterations={min(good)}, chunk=1" in found.advice
    assert hb.diagnose(model, loss_of, x, iterations=(0,), target=1e-9).recommended is None
    assert "no setting tried is within" in hb.diagnose(model, loss_of, x, iterations=(0,), target=1e-9).advice


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
        ({"loss_fn": lambda model, x: model(x)}, ValueError, "loss_fn returned a Tensor"),
        ({"loss_fn": lambda model, x: model(x).sum() * float("nan")}, ValueError, "the loss is nan"),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": stack(), "loss_fn": loss_of, "batch": torch.randn(3, D)} | change
    with pytest.raises(error, match=message):
        hb.diagnose(**given)


def test_bad_input_of_the_damping():
    with pytest.raises(ValueError, match="has 0 stacks"):
        hb.estimate_damping(hb.GRU(2, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="has 2 stacks"):
        hb.estimate_damping(nn.Sequential(stack(), stack()), torch.ones(3, D))
    with pytest.raises(ValueError, match="no layer of the stack ran with gradients"):
        hb.estimate_damping(stack().requires_grad_(False), torch.ones(3, D))
