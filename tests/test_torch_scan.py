"""hb.scan: a user's gated cell against torch's own graph, and against the GRU written as such a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracles import chunked_path_sum

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")

T, B, I, H = 7, 3, 2, 4  # noqa: E741


class GRUCell(torch.nn.Module):
    """A GRU as a gated cell: gate z, update (1 - z) n."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = hb.GRU(I, H, iterations=0).double()

    def forward(self, h: Any, x: Any) -> Any:
        weights = self.gru
        inputs = torch.nn.functional.linear(x, weights.weight_ih_l0, weights.bias_ih_l0).chunk(3, -1)
        recurrent = torch.nn.functional.linear(h, weights.weight_hh_l0, weights.bias_hh_l0).chunk(3, -1)
        r, z = (torch.sigmoid(a + b) for a, b in zip(inputs[:2], recurrent[:2], strict=True))
        return z, (1 - z) * torch.tanh(inputs[2] + r * recurrent[2])


class Minimal(torch.nn.Module):
    """A minGRU: gate and update do not read h."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(I, 2 * H).double()
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, h: Any, x: Any) -> Any:
        gate, update = self.linear(x).chunk(2, -1)
        return torch.sigmoid(gate), update


class Cast(Minimal):
    def forward(self, h: Any, x: Any) -> Any:
        gate, update = super().forward(h, x)
        return gate.to(h.dtype), update.to(h.dtype)


class Own(torch.nn.Module):
    """A cell of no known kind: its gate reads h by one weight, its update by another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = torch.nn.Linear(H + I, H).double()
        self.inner = torch.nn.Linear(H, 6, bias=False).double()
        self.outer = torch.nn.Linear(6, H).double()

    def forward(self, h: Any, x: Any) -> Any:
        return torch.sigmoid(self.gate(torch.cat([h, x], -1))), torch.tanh(self.outer(torch.sin(3 * self.inner(h))))


def problem(cell: Any) -> tuple[Any, Any, list[Any]]:
    torch.manual_seed(4)
    h0 = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    return h0, xs, [p for p in cell.parameters() if p.requires_grad]


def gradients(cell: Any, **options: Any) -> list[Any]:
    h0, xs, parameters = problem(cell)
    h, last = hb.scan(cell, h0, xs, **options)
    torch.manual_seed(5)
    loss = (h * torch.randn_like(h)).sum() + (last * torch.randn_like(last)).sum()
    return torch.autograd.grad(loss, [h0, xs, *parameters], allow_unused=True, materialize_grads=True)


def close(found: Any, expected: Any) -> None:
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("k", "chunk"), [(T, 1), (T + 3, 1), (3, 3), (2, 4), (1, T), (1, 100)])
def test_enough_iterations_are_exact(k, chunk):
    cell = GRUCell()
    close(gradients(cell, iterations=k, chunk=chunk), gradients(cell))


@pytest.mark.parametrize(("k", "chunk"), [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3)])
def test_iterates_are_those_of_the_gru(k, chunk):
    cell = GRUCell()
    found = gradients(cell, iterations=k, chunk=chunk)
    h0, xs, parameters = problem(cell)
    cell.gru.iterations, cell.gru.chunk = k, chunk
    h, last = cell.gru(xs, h0[None])
    torch.manual_seed(5)
    loss = (h * torch.randn_like(h)).sum() + (last[0] * torch.randn_like(last[0])).sum()
    close(found, torch.autograd.grad(loss, [h0, xs, *parameters]))
    assert not torch.allclose(found[0], gradients(cell)[0], rtol=1e-6)


def explicit(cell: Any, rank: int, k: int, chunk: int, weights: Any) -> list[Any]:
    """The gradients by path sums of explicit Jacobians, R = diag(gate) + B V^T V with the rows V by NumPy."""
    h0, xs, parameters = problem(cell)
    h, last = hb.scan(cell, h0, xs)
    torch.manual_seed(5)
    given = torch.randn_like(h)
    given[-1] += torch.randn_like(last)
    rows = torch.from_numpy(np.linalg.svd(weights.detach().numpy())[2][:rank])
    before, step = (
        torch.cat([h0[None], h[:-1]]).detach(),
        lambda h, x: sum(a * b for a, b in zip(cell(h, x), (h, 1), strict=True)),
    )
    g = np.zeros((T + 1, B, H))
    for b in range(B):
        whole = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda h, x=x[b]: step(h, x), h[b])
                for h, x in zip(before, xs.detach(), strict=True)
            ]
        )
        gates = torch.diag_embed(cell(before[:, b], xs.detach()[:, b])[0].detach())
        residual = gates + (whole - gates) @ rows.T @ rows
        c = np.concatenate([np.zeros((1, H)), given[:, b].numpy()])
        g[:, b] = chunked_path_sum(residual.numpy(), (whole - residual).numpy(), c, k, chunk)
    after = step(before, xs)
    leaves = [xs, *parameters]
    return [torch.from_numpy(g[0]), *torch.autograd.grad(after, leaves, torch.from_numpy(g[1:]))]


@pytest.mark.parametrize(("k", "chunk"), [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3)])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("kind", "weight"), [(Own, "inner.weight"), (GRUCell, "gru.weight_hh_l0")])
def test_iterates_with_directions_are_those_of_explicit_jacobians(kind, weight, rank, k, chunk):
    cell = kind()
    found = gradients(cell, iterations=k, chunk=chunk, rank=rank, weight=weight)
    close(found, explicit(cell, rank, k, chunk, cell.get_parameter(weight)))


@pytest.mark.parametrize("chunk", [1, 3])
def test_all_directions_are_exact_at_once_and_none_change_nothing(chunk):
    own = {"weight": "inner.weight", "chunk": chunk}
    close(gradients(Own(), iterations=0, rank=H, **own), gradients(Own()))
    close(gradients(Own(), rank=2, **own), gradients(Own()))
    close(gradients(Own(), tolerance=1e-14, rank=2, **own), gradients(Own()))
    for found, expected in zip(
        gradients(Own(), iterations=1, rank=0, **own), gradients(Own(), iterations=1, chunk=chunk), strict=True
    ):
        assert torch.equal(found, expected)
    close(gradients(Minimal(), iterations=0), gradients(Minimal()))
    still = Own()  # a block that does not read h has no directions
    still.forward = lambda h, x: (
        torch.sigmoid(still.gate(torch.cat([torch.zeros_like(h), x], -1))),
        torch.ones_like(h),
    )
    close(gradients(still, iterations=0, rank=2, weight="inner.weight"), gradients(still))


def test_directions_follow_the_weight_of_a_cell():
    cell = GRUCell()
    first = gradients(cell, iterations=0, rank=2, weight="gru.weight_hh_l0")
    close(gradients(cell, iterations=0, rank=2, weight="gru.weight_hh_l0"), first)
    with torch.no_grad():
        cell.gru.weight_hh_l0.copy_(cell.gru.weight_hh_l0.flip(0, 1))
    for _ in range(120):  # each a step of subspace iteration
        found = gradients(cell, iterations=0, rank=2, weight="gru.weight_hh_l0")
    close(found, explicit(cell, 2, 0, 1, cell.gru.weight_hh_l0))


def test_directions_under_autocast():
    class Half(Own):
        def forward(self, h: Any, x: Any) -> Any:
            return tuple(part.to(h.dtype) for part in super().forward(h, x))

    cell = Half().float()
    xs, own = torch.randn(T, B, I), {"weight": "inner.weight", "rank": H, "iterations": 0}
    found = []
    for options in ({}, own):
        with torch.autocast("cpu", torch.bfloat16):
            h, _ = hb.scan(cell, torch.zeros(B, H), xs, **options)
            found.append(torch.autograd.grad(h.sum(), list(cell.parameters())))
    for ours, exact in zip(found[1], found[0], strict=True):
        assert (ours - exact).abs().max() <= 3e-2 * exact.abs().max()


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (
            Own,
            {"rank": 2},
            ValueError,
            r"rank=2 is given without weight; give a parameter of shape \(N, 4\).*: inner.weight",
        ),
        (Own, {"rank": 2, "weight": "inner"}, ValueError, "weight='inner' names no parameter of this Own"),
        (Own, {"rank": 0, "weight": "inner"}, ValueError, "weight='inner' names no parameter"),
        (Own, {"rank": 2, "weight": "gate.weight"}, ValueError, r"has shape \(4, 6\), rank is 2; give a parameter"),
        (Own, {"rank": 2, "weight": "gate.bias"}, ValueError, r"has shape \(4,\)"),
        (Own, {"rank": 5, "weight": "inner.weight"}, ValueError, "rank=5 is more than hidden_size=4"),
        (Own, {"rank": -1, "weight": "inner.weight"}, ValueError, "rank=-1 is too small"),
        (lambda: lambda h, x: (h, h), {"rank": 2, "weight": "w"}, TypeError, "give a torch.nn.Module, and weight="),
    ],
)
def test_bad_directions(kind, options, error, message):
    h0, xs, _ = problem(Own())
    for k in (None, 1):
        with pytest.raises(error, match=message):
            hb.scan(kind(), h0, xs, iterations=k, **options)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_recurrence_that_is_all_residual_path_is_exact_at_once(chunk):
    cell = Minimal()
    close(gradients(cell, iterations=0, chunk=chunk), gradients(cell))


def test_values_and_modes():
    cell = GRUCell()
    h0, xs, _ = problem(cell)
    expected, _ = torch.nn.GRU.forward(cell.gru, xs, h0[None])
    for options in ({}, {"iterations": 2}):
        h, last = hb.scan(cell, h0, xs, **options)
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(last, h[-1])
        with torch.no_grad():
            assert not hb.scan(cell, h0, xs, **options)[0].requires_grad


def test_hooks_run_once_on_the_final_gradient_and_frozen_parameters_stay():
    cell = GRUCell()
    cell.gru.bias_hh_l0.requires_grad_(False)
    h0, xs, _ = problem(cell)
    exact = torch.autograd.grad(hb.scan(cell, h0, xs)[0].sum(), cell.gru.weight_hh_l0)[0]
    calls = []
    cell.gru.weight_hh_l0.register_hook(lambda g: calls.append(1) or 0.5 * g)
    hb.scan(cell, h0.detach(), xs.detach(), iterations=T)[0].sum().backward()
    assert calls == [1]
    close([cell.gru.weight_hh_l0.grad], [0.5 * exact])
    assert cell.gru.bias_hh_l0.grad is None


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (3, TypeError, "cell is a int; give a function"),
        (lambda h, _: h, TypeError, "the cell returned a Tensor; expected two tensors"),
        (lambda h, x: (h, x), ValueError, r"update is torch.float64 of shape \(3, 2\)"),
        (lambda h, _: (h.float(), h), ValueError, "gate is torch.float32"),
    ],
)
def test_bad_cells(cell, error, message):
    h0, xs, _ = problem(GRUCell())
    with pytest.raises(error, match=message):
        hb.scan(cell, h0, xs, iterations=1)


@pytest.mark.parametrize("mixing", [lambda h: h.sum(0, keepdim=True), torch.rand_like], ids=["batch", "random"])
def test_a_cell_that_mixes_its_batch_or_is_random_is_refused(mixing):
    h0, xs, _ = problem(GRUCell())
    h, _ = hb.scan(lambda h, _: (0.5 + 0 * h, h + mixing(h)), h0, xs, iterations=1)
    with pytest.raises(RuntimeError, match="treat leading axes as a batch"):
        h.sum().backward()


def test_bad_input():
    cell = GRUCell()
    h0, xs, _ = problem(cell)
    with pytest.raises(ValueError, match="at least one step"):
        hb.scan(cell, h0, xs[:0])
    with pytest.raises(ValueError, match="iterations=-1 is too small"):
        hb.scan(cell, h0, xs, iterations=-1)
    with pytest.raises(TypeError, match=r"chunk=1.5 is a float"):
        hb.scan(cell, h0, xs, iterations=1, chunk=1.5)
    for k in (None, 1):
        for given, error, message in (
            ((h0, [1, 2]), TypeError, "xs is a list; give a torch.Tensor"),
            ((h0, list(xs)), TypeError, "xs is a list"),
            ((h0, xs.detach().numpy()), TypeError, "xs is a ndarray"),
            ((None, xs), TypeError, "h0 is a NoneType; give a torch.Tensor"),
            ((h0.long(), xs), TypeError, "h0 is torch.int64; give real floating point numbers"),
            ((h0, xs.sum()), ValueError, r"xs has shape \(\); expected \(T, B, ...\)"),
        ):
            with pytest.raises(error, match=message):
                hb.scan(cell, *given, iterations=k)


@pytest.mark.parametrize("k", [None, 2])
def test_outputs_may_be_written_into(k):
    cell = GRUCell()
    h0, xs, parameters = problem(cell)
    h, last = hb.scan(cell, h0, xs, iterations=k)
    expected = torch.autograd.grad((2 * h).sum() + (3 * last).sum(), [h0, xs, *parameters])
    h, last = hb.scan(cell, h0, xs, iterations=k)
    before = last.detach().clone()
    h *= 2
    h[0] += 1
    assert torch.equal(last, before)
    last *= 3
    assert torch.equal(h[-1], 2 * before)
    close(torch.autograd.grad(h.sum() + last.sum(), [h0, xs, *parameters]), expected)


def test_a_tolerance_stops_at_the_first_small_increment_and_is_reported():
    cell = GRUCell()
    h0, xs, parameters = problem(cell)
    weights = hbp.cells.GRUParameters(*(p.detach().numpy() for p in parameters))
    _, pullback = hbp.cells.gru(weights, xs.detach().numpy(), h0.detach().numpy())
    dh = torch.randn(T, B, H, dtype=torch.float64)
    d = dh.numpy()
    expected = hbp.report(pullback.chain, d[-1], sources=np.concatenate([np.zeros_like(d[:1]), d[:-1]]))
    k = next(k for k, (a, b) in enumerate(zip(expected.increments, expected.sizes, strict=True)) if a <= 1e-2 * b)
    assert 0 < k < T
    seen: list[hbp.Report] = []
    watched = hbp.Solver(tolerance=1e-2, watch=seen.append)
    found = torch.autograd.grad(hb.scan(cell, h0, xs, solver=watched)[0], [h0, xs, *parameters], dh)
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0].increments, expected.increments[: k + 1], rtol=1e-9)
    for options in ({"tolerance": 1e-2}, {"iterations": k}):
        close(torch.autograd.grad(hb.scan(cell, h0, xs, **options)[0], [h0, xs, *parameters], dh), found)


def test_growing_increments_that_do_not_meet_the_tolerance_are_told():
    def cell(h: Any, x: Any) -> Any:
        return 0 * x, -1.5 * h

    x = torch.zeros(30, B, H, requires_grad=True)
    h, _ = hb.scan(cell, torch.zeros(B, H), x, iterations=10, tolerance=1e-3)
    with pytest.warns(hbp.DivergenceWarning, match="10 rounds have not met tolerance=0.001: .*a higher rank"):
        h.sum().backward()


def test_a_cell_that_is_a_function_reaches_its_weights_or_is_refused():
    torch.manual_seed(0)
    linear = torch.nn.Linear(I, H)

    def cell(h: Any, x: Any) -> Any:
        return torch.sigmoid(linear(x)), torch.tanh(linear(x) + h)

    given = torch.zeros(B, H), torch.randn(T, B, I)
    hb.scan(cell, *given)[0].sum().backward()
    assert linear.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="needs gradients and is no parameter of it"):
        hb.scan(cell, *given, iterations=2)
    h, _ = hb.scan(GRUCell(), torch.zeros(B, H).double(), torch.randn(T, B, I).double(), iterations=2)
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = hb.scan(Cast().float(), torch.zeros(B, H), torch.randn(T, B, I), iterations=2)
    under.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        h.sum().backward(create_graph=True)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 257])
@pytest.mark.parametrize("width", [3, 5000])
def test_the_in_place_scan_is_the_recurrence(length, width):
    torch.manual_seed(0)
    values, c = torch.randn(length, width, dtype=torch.float64), torch.randn(length + 1, width, dtype=torch.float64)
    expected = [c[-1]]
    for i in reversed(range(length)):
        expected.append(c[i] + values[i] * expected[-1])
    found = hb.propagate(hbp.Diagonal(values), c)
    reference = torch.stack(expected[::-1])
    assert ((found - reference).abs() <= 1e-12 * (1 + reference.abs())).all()


def test_backward_hooks_in_a_cell_are_refused():
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, h: Any, x: Any) -> Any:
            return torch.sigmoid(x), torch.tanh(self.linear(h))

    cell, xs = Cell(), torch.ones(4, 2, 3)
    cell.linear.register_full_backward_hook(lambda module, into, out: (into[0].clamp(-0.02, 0.02),))
    with pytest.raises(RuntimeError, match="the cell sets backward hooks inside, on linear"):
        hb.scan(cell, torch.zeros(2, 3), xs, iterations=2)
    hb.scan(cell, torch.zeros(2, 3, requires_grad=True), xs)[0].sum().backward()


def test_a_residual_path_alone_may_need_gradients():
    values = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    c = torch.rand(6, 3, dtype=torch.float64)
    rows = [c[-1]]
    for value, row in zip(values.flip(0), c[:-1].flip(0), strict=True):
        rows.append(value * rows[-1] + row)
    (expected,) = torch.autograd.grad(torch.stack(rows).cos().sum(), values)
    (found,) = torch.autograd.grad(hb.propagate(hb.Diagonal(values), c).cos().sum(), values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
