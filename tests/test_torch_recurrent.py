"""hb.GRU and hb.LSTM: values and exact gradients are torch.nn's, iterates are the cells'."""

from __future__ import annotations

import copy
import io
import warnings
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
from torch_oracles import opened, under_autocast

import hbp
from hbp.backends._tuned import Timing, Timings
from hbp.backends._tuning import given, pinned

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
StorageWeakRef = pytest.importorskip("torch.multiprocessing.reductions").StorageWeakRef

KINDS = ("GRU", "LSTM")
T, B, I, H = 9, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([3, 9, 1, 5])


def pair(kind: str, dtype: Any = torch.float64, own: Any = None, **options: Any) -> tuple[Any, Any]:
    """The vendor's layer and ours, with the same weights and, unless told otherwise, the vendor's forward."""
    torch.manual_seed(1)
    own = {"compiled": False} | (own or {"exact": "adjoint"})
    vendor = getattr(torch.nn, kind)(I, H, **options).to(dtype)
    ours = getattr(hb, kind)(I, H, **options, **own).to(dtype)
    ours.load_state_dict(vendor.state_dict())
    return vendor, ours


def values_and_gradients(layer: Any, x: Any, states: tuple[Any, ...] = (), wrap: Any = None) -> tuple[Any, Any]:
    """All outputs, and the gradients of a random functional of them by parameters, input and initial states."""
    torch.manual_seed(2)
    hx = None if not states else states if len(states) > 1 else states[0]
    y, final = layer(wrap(x) if wrap else x, hx)
    outputs = [y.data if wrap else y, *(final if isinstance(final, tuple) else (final,))]
    loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
    leaves = [leaf for leaf in (*layer.parameters(), x, *states) if leaf.requires_grad]
    return [output.detach() for output in outputs], torch.autograd.grad(loss, leaves)


def close(found: Any, expected: Any, tolerance: float) -> None:
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def equal(found: Any, expected: Any) -> None:
    assert all(torch.equal(ours, reference) for ours, reference in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["batch", "one sequence", "packed", "initial states"])
@pytest.mark.parametrize("forward", ["vendor", "gates", "states"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "dropout": 0.4},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4, "bias": False},
    ],
)
def test_values_are_the_vendors_and_exact_gradients_agree(kind, shape, forward, options):
    """Bit-equal from the vendor's own forward, to rounding from a compiled one, whatever that keeps."""
    own = {"exact": "adjoint"}
    if forward != "vendor":
        pytest.importorskip("numba")
        own |= {"compiled": True, "keep": forward}
    directions = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    rows = (T, I) if shape == "one sequence" else (B, T, I) if options.get("batch_first") else (T, B, I)
    x = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    states, wrap = (), None
    if shape == "initial states":
        count = 2 if kind == "LSTM" else 1
        states = tuple(torch.randn(directions, B, H, dtype=torch.float64, requires_grad=True) for _ in range(count))
    if shape == "packed":
        first = options.get("batch_first", False)
        pack = torch.nn.utils.rnn.pack_padded_sequence
        wrap = lambda x: pack(x, LENGTHS, batch_first=first, enforce_sorted=False)  # noqa: E731
    vendor, ours = pair(kind, own=own, **options)
    expected_values, expected = values_and_gradients(vendor, x, states, wrap)
    settings = [(None, 1, 0), (T, 1, 0), (3, 3, 0), (0, 1, H), (T, 1, 2), (3, 3, 1), (None, 1, 2)]
    for k, chunk, ours.rank in settings:
        ours.iterations, ours.chunk = k, chunk
        values, gradients = values_and_gradients(ours, x, states, wrap)
        (equal if forward == "vendor" else lambda *both: close(*both, 1e-14))(values, expected_values)
        close(gradients, expected, 1e-12)


@pytest.fixture
def lower() -> Any:
    """PyTorch may multiply float32 in bfloat16; yields whether it does here."""
    a, before = torch.randn(256, 256), torch.get_float32_matmul_precision()
    whole = a @ a
    torch.set_float32_matmul_precision("medium")
    yield not torch.equal(a @ a, whole)
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [(None, 1, 0), (60, 1, 0), (8, 8, 0), (60, 1, 4), (8, 8, 4)], ids=str)
def test_products_have_the_precision_that_torch_gives_them(kind, settings, lower):
    """An exact gradient is off by their rounding, once; torch's own is as much, but for its LSTM's fused steps."""
    torch.manual_seed(1)
    vendor = getattr(torch.nn, kind)(48, 48)
    ours = getattr(hb, kind)(48, 48, exact="adjoint")
    ours.load_state_dict(vendor.state_dict())
    ours.iterations, ours.chunk, ours.rank = settings
    x, dy = torch.randn(2, 60, 4, 48)

    def gradient(layer: Any, dtype: Any = torch.float32) -> Any:
        leaf = x.to(dtype).requires_grad_()
        found = torch.autograd.grad(layer.to(dtype)(leaf)[0], [*layer.parameters(), leaf], dy.to(dtype))
        return torch.cat([part.double().ravel() for part in found])

    exact = gradient(copy.deepcopy(vendor), torch.float64)
    error = float((gradient(ours) - exact).norm() / exact.norm())
    assert 1e-4 < error < 1e-2 if lower else error < 1e-6


@pytest.mark.parametrize("residual", [None, hbp.Zero()], ids=["own", "zero"])
@pytest.mark.parametrize(("k", "chunk"), [(0, 1), (1, 1), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_iterates_are_those_of_the_cells(kind, k, chunk, residual):
    _, ours = pair(kind, own={"iterations": k, "chunk": chunk, "residual": residual})
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    y, _ = ours(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [*ours.parameters(), x], dy)
    cell, parameters = (getattr(hbp.cells, name) for name in (kind.lower(), f"{kind}Parameters"))
    weights = parameters(*(p.detach().numpy() for p in ours.parameters()))
    zeros, dy = np.zeros((B, H)), dy.numpy()
    _, pullback = cell(weights, x.detach().numpy(), (zeros, zeros) if kind == "LSTM" else zeros)
    dparams, dx, _ = pullback((dy, None) if kind == "LSTM" else dy, k, chunk, residual)
    close(found, [torch.from_numpy(np.asarray(d)) for d in (*dparams, dx)], 1e-12)


def strongest(weight: Any, rank: int) -> Any:
    """The leading directions of a weight, by NumPy's decomposition."""
    weight = weight.detach().numpy()
    rows = np.linalg.svd(weight)[2][:rank]
    return hbp.Directions(weight @ rows.T, rows, rank)


def by_cells(kind: str, layer: Any, x: Any, dy: Any, rank: Any, **options: Any) -> Any:
    """The gradients of a layer's parameters by NumPy's cell."""
    cell, parameters = (getattr(hbp.cells, name) for name in (kind.lower(), f"{kind}Parameters"))
    zeros, dy = np.zeros((B, H)), dy.numpy()
    weights = parameters(*(p.detach().numpy() for p in layer.parameters()))
    _, pullback = cell(weights, x.numpy(), (zeros, zeros) if kind == "LSTM" else zeros)
    found = pullback((dy, None) if kind == "LSTM" else dy, rank=rank, **options)[0]
    return [torch.from_numpy(np.asarray(d)) for d in found]


@pytest.mark.parametrize(("k", "chunk"), [(0, 1), (1, 1), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_the_weights_at_each_backward(kind, k, chunk):
    layer = opened(pair(kind, own={"iterations": k, "chunk": chunk, "rank": 2})[1])
    x, dy = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    assert layer.directions == [None]
    y = layer(x)[0]
    assert layer.directions == [None]  # the forward takes none
    found = torch.autograd.grad(y, list(layer.parameters()), dy, retain_graph=True)
    first = strongest(layer.weight_hh_l0, 2)
    close(found, by_cells(kind, layer, x, dy, first, iterations=k, chunk=chunk), 1e-12)
    close(torch.autograd.grad(y, list(layer.parameters()), dy), found, 1e-12)
    drift = 0.2 * torch.randn(len(layer.weight_hh_l0), 2, dtype=torch.float64) @ torch.randn(2, H, dtype=torch.float64)
    for _ in range(30):
        with torch.no_grad():
            layer.weight_hh_l0.add_(drift)
        found = torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy)
    (taken,) = layer.directions
    weight, right = layer.weight_hh_l0.detach(), taken.right
    close([taken.left, right @ right.T], [weight @ right.T, torch.eye(2, dtype=torch.float64)], 1e-12)
    close(found, by_cells(kind, layer, x, dy, hbp.Directions(*(f.numpy() for f in taken.taken), 2),
                          iterations=k, chunk=chunk), 1e-12)  # fmt: skip
    now = strongest(layer.weight_hh_l0, 2).right  # followed from step to step, not those of the start
    distances = [np.linalg.norm(rows.T @ rows - now.T @ now) for rows in (right.numpy(), first.right)]
    assert distances[0] < 0.3 * distances[1]


def test_each_direction_of_each_layer_follows_its_own_weight():
    _, layer = pair("LSTM", own={"iterations": 1, "rank": 3}, num_layers=2, bidirectional=True)
    assert "rank=3" in repr(layer)
    weights = [p for name, p in layer.named_parameters() if name.startswith("weight_hh")]
    x = torch.randn(T, B, I, dtype=torch.float64)

    def check(tolerance: float) -> None:
        layer(x.to(weights[0].dtype))[0].sum().backward()
        for weight, taken in zip(weights, layer.directions, strict=True):
            own = strongest(weight.double(), layer.rank)
            close([(taken.left @ taken.right).double()], [torch.from_numpy(own.left @ own.right)], tolerance)

    check(1e-12)
    with torch.no_grad():
        weights[0].fill_(torch.nan)
    layer(x)[0].sum().backward()
    with torch.no_grad():
        weights[0].copy_(weights[1])
    check(1e-12)  # nothing of the lost step is left
    layer.float(), layer.zero_grad()
    check(1e-5)
    layer.rank = 2
    check(1e-5)
    layer.rank = 0
    assert layer.directions == []
    assert "rank" not in repr(layer)


def test_directions_of_a_parameter_hold_no_graph_of_those_before():
    weight = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))  # equal singular values, without derivatives
    given, start = torch.randn(4, 2, dtype=torch.float64), None
    for _ in range(2):
        start = hbp.directions(weight, 2, start)
        (found,) = torch.autograd.grad((given * start.left).sum(), weight, retain_graph=True)
        assert not start.right.requires_grad
        close([found], [given @ start.right], 1e-14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start.values[0] == pytest.approx(12**0.5)


def test_copies_and_pickles_find_directions_of_their_own():
    _, layer = pair("GRU", own={"iterations": 1, "rank": 2})
    x, stored = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), io.BytesIO()
    before = set(layer.state_dict())
    expected = values_and_gradients(layer, x)[1]
    assert set(layer.state_dict()) == before
    torch.save(layer, stored)
    stored.seek(0)
    for same in (copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert (same.rank, same.directions) == (2, [None])
        own = layer.directions[0]
        close(values_and_gradients(same, x)[1], expected, 1e-12)
        assert layer.directions[0] is own
        assert same.directions[0] is not None
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    plain, dy = layer(x)[0], torch.randn_like(y)
    close(torch.autograd.grad(y, x, dy), torch.autograd.grad(plain, x, dy), 1e-12)


def test_automatic_directions_tell_how_many_they_are(caplog):
    torch.manual_seed(0)
    layer = hb.GRU(I, 32, iterations=hbp.Schedule({0: 0, 1: 0, 2: None}), rank="auto").double()
    strong = torch.linalg.qr(torch.randn(96, 2, dtype=torch.float64))[0] @ torch.randn(2, 32, dtype=torch.float64)
    x, taken = torch.randn(T, B, I, dtype=torch.float64), []
    with caplog.at_level("INFO", "hbp"):
        for strength in (0, 1, 1):
            with torch.no_grad():
                layer.weight_hh_l0.add_(strength * strong)
            layer(x)[0].sum().backward()
            taken.append(layer.directions[0].rank)
            hb.step(layer)
    assert taken == [0, 6, 6]  # the last step is exact, and takes none anew
    told = [record.message for record in caplog.records if "rank=" in record.message]
    assert told == [f"rank='auto' takes {n} directions of weight_hh_l0, of 32" for n in (0, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_needs_fewer_rounds_with_directions(kind):
    layer = opened(pair(kind, own={"tolerance": 1e-6})[1])
    x, dy = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    layer.reports = []
    for layer.rank in (0, H - 1, H):
        found = torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy)
    rounds = [len(report.increments) for report in layer.reports]
    assert rounds[0] > rounds[1] > rounds[2]
    layer.solver = hbp.Solver()
    close(found, torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy), 1e-5)


def test_rank_is_checked_when_it_is_set():
    layer = hb.GRU(I, H, iterations=1, rank=np.int64(2))
    with pytest.raises(ValueError, match="rank=8 is more than hidden_size=5"):
        layer.rank = 8
    assert layer.rank == 2
    layer.residual = hbp.Zero()
    with pytest.raises(ValueError, match="residual and rank are given"):
        layer(torch.randn(T, B, I))
    layer.rank = 0
    layer(torch.randn(T, B, I))
    with pytest.raises(ValueError, match="residual and rank are given"):
        layer.rank = "auto"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length"), [(1, 9), (2, 1)])
def test_strides_of_axes_with_one_entry_change_no_bit(kind, batch, length):
    """By them torch picks a product where there is no bias."""
    vendor, ours = pair(kind, torch.float32, bias=False, batch_first=True)
    x = torch.randn(batch, length, I)
    equal([ours(x)[0]], [vendor(x)[0]])


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_forward(kind, dtype, keep):
    """Off the vendor's by rounding, the same in every mode; its gates serve every iterate, twice, and after a write."""
    pytest.importorskip("numba")
    vendor, ours = pair(kind, dtype, own={"iterations": 2, "compiled": True, "keep": keep}, num_layers=2)
    _, plain = pair(kind, dtype, own={"iterations": 2}, num_layers=2)
    x = (3 * torch.randn(40, B, I, dtype=dtype)).requires_grad_()
    values, gradients = values_and_gradients(ours, x)
    close(values, values_and_gradients(vendor, x)[0], 1e-6 if dtype == torch.float32 else 1e-14)
    close(gradients, values_and_gradients(plain, x)[1], 1e-4 if dtype == torch.float32 else 1e-12)
    for chunk in (1, 8):
        plain.chunk = ours.chunk = chunk
        close(
            values_and_gradients(ours, x)[1],
            values_and_gradients(plain, x)[1],
            1e-4 if dtype == torch.float32 else 1e-12,
        )
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            equal([ours.eval()(x)[0]], values[:1])
    y = ours.train()(x)[0]
    first = torch.autograd.grad(y.sum(), [x], retain_graph=True)
    y.data.copy_(y)  # counted by nothing: not a write
    equal(torch.autograd.grad(y.sum(), [x]), first)
    y = ours(x)[0]
    with torch.no_grad():
        y.zero_()
    close(torch.autograd.grad(y.sum(), [x]), first, 1e-12)
    for way in ("calls", "loop"):
        with pinned({"gru forward": way, "lstm forward": way}):
            close([ours(x)[0].detach()], values[:1], 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_forward_takes_what_the_vendors_takes(kind, monkeypatch):
    """No step, and states of another class, are the vendor's; where the kernels are off later, the plain cell's."""
    pytest.importorskip("numba")
    vendor, ours = pair(kind, own={"iterations": T, "compiled": True}, batch_first=True)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        ours(torch.zeros(B, 0, I, dtype=torch.float64))
    x = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, B, H, dtype=torch.float64).as_subclass(type("Own", (torch.Tensor,), {}))
    hx = (state, state) if kind == "LSTM" else state
    equal([ours(x, hx)[0]], [vendor(x, hx)[0]])
    (expected,) = torch.autograd.grad(vendor(x)[0].sum(), [x])
    y = ours(x)[0]
    with torch.no_grad():
        y.zero_()
    monkeypatch.setenv("HBP_KERNELS", "off")
    close(torch.autograd.grad(y.sum(), [x]), [expected], 1e-12)


def test_a_pinned_forward_that_there_is_not_is_said():
    half = torch.zeros(3, B, I, dtype=torch.float16)
    for own, why in (({"compiled": True}, "there is no compiled forward"), ({"compiled": False}, "pinned")):
        assert hb.GRU(I, H, iterations=2, **own).half().path(half).why.startswith(why)
    for kind in KINDS:  # between PyTorch's own backward and ours times decide
        why = getattr(hb, kind)(I, H, compiled=True).half().path(half).why
        assert why.startswith("there is no compiled forward for such an input; microseconds")


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_states_only_takes_no_backward_that_keeps_more(kind):
    layer, x = getattr(hb, kind)(I, H), torch.randn(T, B, I, requires_grad=True)
    with pinned({f"{kind.lower()} step": "library"}):
        assert layer.path(x).backward == "library"
        layer.keep = "states"
        assert layer.path(x).backward == "adjoint"
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}), lambda _: None):
            layer(x)
    states = T * B * H * (2 if kind == "LSTM" else 1)
    assert sum(kept.values()) <= T * B * I + states + 2 * B * H + sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("place", ["x", "h0", "c0", "dy", "bias"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_the_vendors_goes(kind, bad, place):
    """The same entries of values and gradients are finite, and those are equal."""
    vendor, ours = pair(kind, torch.float32, own={"compiled": True, "exact": "adjoint"})
    x, states = torch.randn(T, B, I), [torch.randn(1, B, H) for _ in range(2 if kind == "LSTM" else 1)]
    dy = torch.randn(T, B, H)
    given = {"x": x[2, 1], "h0": states[0][0, 1], "c0": states[-1][0, 1], "dy": dy[3, 2]}
    if place == "bias":
        with torch.no_grad():
            vendor.bias_ih_l0[1], ours.bias_ih_l0[1] = bad, bad
    else:
        given[place][0] = bad
    found = []
    for layer in (vendor, ours):
        own = [t.clone().requires_grad_() for t in (x, *states)]
        y, final = layer(own[0], own[1:] if kind == "LSTM" else own[1])
        finals = final if kind == "LSTM" else (final,)
        gradients = torch.autograd.grad(y, [*own, *layer.parameters()], dy)
        found.append([*map(torch.Tensor.detach, (y, *finals)), *gradients])
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own.isfinite(), theirs.isfinite())
        torch.testing.assert_close(own[own.isfinite()], theirs[own.isfinite()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_where_there_is_no_compiled_forward_the_vendors_runs(kind, monkeypatch):
    forwards = pytest.importorskip("hbp.backends._numba.forwards")
    refused = lambda *_: pytest.fail("compiled")  # noqa: E731
    monkeypatch.setattr(forwards.loops, f"{kind.lower()}_run", refused)
    vendor, ours = pair(kind, torch.float32, own={"iterations": 2, "compiled": True})
    x = torch.randn(T, B, I)
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        ours(x)
    if under_autocast(kind):
        with torch.autocast("cpu", torch.bfloat16):
            equal([ours(x)[0]], [vendor(x)[0]])
    equal([ours.half()(x.half())[0]], [vendor.half()(x.half())[0]])
    ours.float(), vendor.float()
    ours.iterations, ours.exact = None, "library"
    equal([ours(x)[0]], [vendor(x)[0]])
    ours.keep = "states"
    assert "compiled=True, keep='states'" in repr(ours)
    ours.iterations, ours.compiled = 2, "yes"
    with pytest.raises(ValueError, match="compiled='yes'"):
        ours(x)
    ours.compiled, ours.keep = True, "all"
    with pytest.raises(ValueError, match="keep='all'"):
        ours(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_gives_the_vendors_values(kind, dtype):
    vendor, ours = pair(kind, dtype, own={"iterations": 1}, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, dtype=dtype)
    for train in (True, False):
        vendor.train(train), ours.train(train)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                torch.manual_seed(3)
                expected = vendor(x)[0]
                torch.manual_seed(3)
                assert torch.equal(ours(x)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    if not under_autocast(kind):
        pytest.skip("PyTorch has no such layer for this processor")
    vendor, ours = map(opened, pair(kind, torch.float32, own={"iterations": 4}))
    x = torch.randn(4, B, I, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected_values, expected = values_and_gradients(vendor, x)
        values, gradients = values_and_gradients(ours, x)
    equal(values, expected_values)
    close(gradients, expected, 3e-2)  # bfloat16 has 8 bits
    for ours.iterations in range(3):  # no other iterate would have passed; parameters' gradients are exact at 3
        with pytest.raises(AssertionError):
            close(values_and_gradients(ours, x)[1], expected, 9e-2)
    ours.iterations, ours.rank = 0, H
    with torch.autocast("cpu", torch.bfloat16):
        close(values_and_gradients(ours, x)[1], expected, 3e-2)
    assert ours.directions[0].right.dtype == torch.float32  # the weights'


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_and_inputs_without_gradient(kind):
    vendor, ours = pair(kind, own={"iterations": T})
    for layer in (vendor, ours):
        layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(T, B, I, dtype=torch.float64)
    close(values_and_gradients(ours, x)[1], values_and_gradients(vendor, x)[1], 1e-12)
    for p in ours.parameters():
        p.requires_grad_(False)
    assert not ours(x)[0].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once(kind):
    vendor, ours = pair(kind, own={"iterations": T})
    calls = []
    for layer in (vendor, ours):
        layer.weight_hh_l0.register_hook(lambda g: calls.append(1) or 0.5 * g)
        layer.register_full_backward_hook(lambda *_: calls.append(2))
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    for layer in (vendor, ours):
        layer(x)[0].square().sum().backward()
    assert sorted(calls) == [1, 1, 2, 2]
    close([ours.weight_hh_l0.grad], [vendor.weight_hh_l0.grad], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_checkpoints(kind):
    vendor, ours = pair(kind, own={"iterations": 2, "chunk": 3, "residual": hbp.Zero()})
    vendor.load_state_dict(ours.state_dict())
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    expected = values_and_gradients(ours, x)[1]
    for same in (copy.deepcopy(ours), torch.load(stored, weights_only=False)):
        assert (same.iterations, same.chunk) == (2, 3)
        equal(values_and_gradients(same, x)[1], expected)
    older = copy.deepcopy(ours)
    for name in ("compiled", "keep", "followed"):  # options that came later than what was stored
        del older.__dict__[name]
    equal(values_and_gradients(older, x)[1], expected)
    ours.residual = None
    expected = values_and_gradients(ours, x)[1]
    rerun = torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], x, use_reentrant=False)
    torch.manual_seed(2)
    found = torch.autograd.grad(rerun, x, torch.randn_like(rerun))
    y, _ = ours(x)
    torch.manual_seed(2)
    equal(found, torch.autograd.grad(y, x, torch.randn_like(y)))


@pytest.mark.parametrize("keep", [None, "states", "gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_less_is_saved_than_by_the_vendor(kind, keep):
    if keep:
        pytest.importorskip("numba")
    vendor, ours = pair(kind, own={"iterations": 1, "compiled": bool(keep), "keep": keep or "gates"})
    saved = {}
    for layer in (vendor, ours):
        sizes: dict[int, int] = {}
        own = {p.data_ptr() for p in layer.parameters()}

        def pack(tensor, sizes=sizes, own=own):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = layer(torch.randn(50, B, I, dtype=torch.float64))
        saved[layer] = sum(sizes.values())
        del y
    gates = {"GRU": 4, "LSTM": 5}[kind] if keep == "gates" else 0  # with the LSTM's states c
    assert saved[ours] == 50 * B * (I + H + gates * H) + B * H  # inputs, outputs, zeros to start from: nothing else
    assert gates or saved[ours] < saved[vendor] / 2


def times(**ways: float) -> Timings:
    """A table with times of steps of both cells: those given at B = 4, H = 5, and the library's fastest at H = 512."""
    rows = []
    for task, library in product(("gru step", "lstm step"), ("torch", "torch, plain")):
        rows.append(Timing(task, library, 4, 5, {"library": 3e-6, "adjoint": 2e-6, "compiled": 1e-6, **ways}))
        rows.append(Timing(task, library, 4, 512, {"library": 1e-6, "adjoint": 2e-6, "compiled": 3e-6}))
    return Timings("made up", tuple(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_is_the_fastest_measured_at_the_nearest_size(kind, monkeypatch):
    layer, large = getattr(hb, kind)(I, H), getattr(hb, kind)(I, 512)
    first = getattr(hb, kind)(I, 512, batch_first=True)
    x, compiled = torch.randn(T, B, I), find_spec("numba") is not None
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    with given(times()):
        own = "compiled" if compiled else "library"
        for given_input in (x, x[:, 0], packed):
            assert (layer.path(given_input).forward, layer.path(given_input).backward) == (own, "adjoint")
            assert (large.path(given_input).forward, large.path(given_input).backward) == ("library", "library")
        assert first.path(x.transpose(0, 1)).backward == "library"
        why = layer.path(x).why
        assert "B = 4, H = 5" in why
        assert "library 3, adjoint 2" in why
        assert why.endswith("made up")
        layer.iterations = large.iterations = 2
        assert (layer.path(x).forward, large.path(x).forward) == (own, "library")
        assert layer.path(x).backward == large.path(x).backward == "rounds"
        layer.compiled = False
        assert layer.path(x) == hb.GRU(I, H, iterations=2, compiled=False).path(x)
        layer.iterations, layer.compiled = None, True
        assert layer.path(x).forward == own
        half = torch.zeros(T, B, I, dtype=torch.bfloat16)
        assert layer.to(torch.bfloat16).path(half).forward == "library"
    with given(times(adjoint=1e-9)):
        monkeypatch.setenv("HBP_KERNELS", "off")
        assert getattr(hb, kind)(I, H).path(x).forward == "library"
        assert getattr(hb, kind)(I, H).path(x).backward == "adjoint"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_is_the_vendors_to_rounding_and_the_same_in_every_mode(kind, dtype):
    """Whichever way is the fastest; with dropout between layers, whose numbers are the vendor's too."""
    vendor, ours = pair(kind, dtype, own={"compiled": None}, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    for way in ({}, {"library": 1e-9}, {"adjoint": 1e-9}, {"compiled": 1e-9}):
        with given(times(**way)):
            for train in (True, False):
                found = []
                vendor.train(train), ours.train(train)
                for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
                    torch.manual_seed(3)
                    with mode():
                        found.append(ours(x)[0].detach())
                torch.manual_seed(3)
                close(found, [vendor(x)[0]] * 3, 1e-6 if dtype == torch.float32 else 1e-14)
                if ours.path(x).forward == "compiled":  # oneDNN's LSTM has another kernel without gradients
                    equal(found[1:], found[:1] * 2)


def test_exact_backprop_is_pinned():
    x = torch.randn(T, B, I)
    layer = hb.GRU(I, H, exact="library")
    assert layer.path(x).backward == "library"
    y, _ = layer(x.requires_grad_())
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()  # second derivatives are the library's
    y, _ = hb.GRU(I, H, exact="adjoint")(x)
    with pytest.raises(RuntimeError, match=r'no second derivatives .* exact="library"'):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_schedules_advance_by_steps():
    model = torch.nn.Sequential(hb.GRU(I, H, iterations=hbp.Schedule({0: 1, 2: None})))
    seen = []
    for _ in range(3):
        seen.append(model[0].options().solver.iterations)
        hb.step(model)
    assert seen == [1, 1, None]
    hb.set_iterations(model, 4)
    assert model[0].options().solver.iterations == 4
    with pytest.raises(ValueError, match="without any of hbp's layers"):
        hb.set_iterations(torch.nn.Linear(1, 1), 3)


@pytest.mark.parametrize("forward", [None, False])
def test_compiled_models_break_their_graph_at_the_layer(forward):
    _, ours = pair("GRU", own={"iterations": 2, "compiled": forward})
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(ours, backend="eager")
    for ours.rank in (0, 2):
        expected = values_and_gradients(ours, x)[1]
        y, h = compiled(x)
        torch.manual_seed(2)
        loss = sum((output * torch.randn_like(output)).sum() for output in (y, h))
        found = torch.autograd.grad(loss, [*ours.parameters(), x])
        equal(found, expected) if not ours.rank else close(found, expected, 1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"proj_size": 2}, ValueError, "proj_size is not supported"),
        ({"iterations": -1}, ValueError, "iterations=-1 is too small"),
        ({"iterations": 1.5}, TypeError, "iterations=1.5 is a float"),
        ({"chunk": 0}, ValueError, "chunk=0 is too small"),
        ({"exact": "fast"}, ValueError, "exact='fast'; give 'adjoint', 'library'"),
        ({"residual": "zero"}, TypeError, "residual is a str; give an operator"),
        ({"rank": -1}, ValueError, "rank=-1 is too small"),
        ({"rank": 1.5}, TypeError, "rank=1.5 is a float"),
        ({"rank": "all"}, ValueError, "rank='all'; give a number of directions, 'auto'"),
        ({"rank": H + 1}, ValueError, "rank=6 is more than hidden_size=5; give at most that"),
        ({"rank": hbp.directions(np.ones((4 * H, H)), 1)}, TypeError, "rank is a Directions; a layer follows its own"),
        ({"rank": 1, "residual": hbp.Zero()}, ValueError, "residual and rank are given"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        hb.LSTM(I, H, **options)


@pytest.mark.parametrize("iterations", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind, iterations):
    layer = getattr(hb, kind)(I, H, iterations=iterations, exact="adjoint")
    x, wrong, two = torch.randn(T, B, I), torch.zeros(1, B + 1, H), "two tensors" if kind == "LSTM" else "one tensor"
    pair = (lambda state: (state, state)) if kind == "LSTM" else (lambda state: state)
    for arguments, error, message in (
        (([1, 2],), TypeError, "the input is a list; give a torch.Tensor or a PackedSequence"),
        ((x.numpy(),), TypeError, "the input is a ndarray"),
        ((None,), TypeError, "the input is a NoneType"),
        ((torch.randn(T, B, I + 1),), RuntimeError, "4 features, expected input_size=3"),
        ((torch.randn(T, B, I, 1),), ValueError, "4 dimensions"),
        ((torch.tensor(1.0),), ValueError, "0 dimensions"),
        ((x[:0],), RuntimeError, "Expected sequence length to be larger than 0"),
        ((x.double(),), ValueError, "the input is torch.float64 and the weights torch.float32"),
        ((x, pair(wrong)), RuntimeError, "expected \\(1, 4, 5\\)"),
        ((x, pair(wrong[:, 1:].double())), ValueError, "the input is torch.float32 and an initial state torch.float64"),
        ((x, 1), TypeError, f"hx is a int; give {two}"),
        ((x, "ab"), TypeError, f"hx is a str; give {two}"),
        ((x, [1, 2]), TypeError, f"hx is a list; give {two}"),
        ((x, (wrong,) * 3), TypeError, f"hx is a tuple; give {two}"),
        ((x, wrong if kind == "LSTM" else (wrong, wrong)), TypeError, f"hx is a (Tensor|tuple); give {two}"),
    ):
        with pytest.raises(error, match=message):
            layer(*arguments)
        if len(arguments) == 1 and "length" not in message:
            with pytest.raises(error, match=message):
                layer.path(*arguments)


IN_PLACE = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("shape", ["batch", "one sequence", "packed"])
@pytest.mark.parametrize("options", IN_PLACE)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_written_into(kind, options, shape):
    _, ours = pair(kind, **IN_PLACE[options])
    first = IN_PLACE[options].get("batch_first", False)
    rows = (T, I) if shape == "one sequence" else (B, T, I) if first else (T, B, I)
    leaf = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    for ours.iterations in (None, 2):
        results = []
        for write in (False, True):
            packed = shape == "packed"
            y, final = ours(pack(leaf, LENGTHS, batch_first=first, enforce_sorted=False) if packed else leaf)
            y, final = y.data if packed else y, final if isinstance(final, tuple) else (final,)
            if write:
                y *= torch.arange(H * (1 + ours.bidirectional))
                y[0] += 1
                for state in final:
                    state *= 3
            else:
                y, final = y * torch.arange(H * (1 + ours.bidirectional)), [3 * state for state in final]
            loss = y.sum() + sum(state.sum() for state in final)
            results.append(torch.autograd.grad(loss, [leaf, *ours.parameters()]))
        close(results[1], results[0], 1e-14)


def test_outputs_may_be_written_into_between_two_backward_passes_and_under_autocast():
    layer = hb.GRU(I, H, iterations=2)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    loss = y.sum()
    expected = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    with torch.no_grad():
        y.zero_()
    equal(torch.autograd.grad(loss, list(layer.parameters())), expected)


def test_what_is_kept_is_freed_by_the_backward():
    layer = hb.GRU(I, H, iterations=2)
    y, _ = layer(torch.randn(T, B, I))
    memory, loss = StorageWeakRef(y.untyped_storage()), y.sum()
    del y
    assert not memory.expired()
    loss.backward()
    assert memory.expired()
    assert loss.grad_fn is not None


def reference(kind: str, layer: Any, x: Any, dy: Any) -> Any:
    """The report on all increments of NumPy's chain with a layer's weights."""
    cell, parameters = (getattr(hbp.cells, name) for name in (kind.lower(), f"{kind}Parameters"))
    zeros = np.zeros((B, H))
    weights = parameters(*(p.detach().numpy() for p in layer.parameters()))
    _, pullback = cell(weights, x.numpy(), (zeros, zeros) if kind == "LSTM" else zeros)
    d = np.stack([np.zeros_like(dy), dy], -2) if kind == "LSTM" else dy  # the LSTM's state is (c, h)
    return hbp.report(pullback.chain, d[-1], sources=np.concatenate([np.zeros_like(d[:1]), d[:-1]]))


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_stops_at_the_first_small_increment(kind, tolerance):
    _, layer = pair(kind, own={"tolerance": tolerance})
    x, dy = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    expected = reference(kind, layer, x, dy.numpy())
    relative = [d / g for d, g in zip(expected.increments, expected.sizes, strict=True)]
    k = next(k for k, size in enumerate(relative) if size <= tolerance)
    assert 0 < k < T
    layer.reports = []
    found = torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy)
    (report,) = layer.reports
    np.testing.assert_allclose(report.increments, expected.increments[: k + 1], rtol=1e-10)
    np.testing.assert_allclose(report.sizes, expected.sizes[: k + 1], rtol=1e-10)
    layer.reports, layer.solver = None, hbp.Solver(k)
    close(found, torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy), 1e-12)
    layer.solver = hbp.Solver(k - 1, tolerance=tolerance)  # the cap comes first
    capped = torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy)
    layer.tolerance = None
    close(capped, torch.autograd.grad(layer(x)[0], list(layer.parameters()), dy), 1e-12)
    assert max((a - b).abs().max() for a, b in zip(capped, found, strict=True)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_growing_increments_that_do_not_meet_the_tolerance_are_told(kind):
    """Weights of which no direction is in the path: twice too strong for it, until there is a rank."""
    _, layer = pair(kind, own={"tolerance": 0.1, "iterations": 3})
    with torch.no_grad():
        layer.weight_hh_l0.copy_(6 * torch.linalg.qr(torch.randn_like(layer.weight_hh_l0))[0])
    x = torch.randn(20, B, I, dtype=torch.float64)
    with pytest.warns(hbp.DivergenceWarning, match="3 rounds have not met tolerance=0.1: .*a higher rank"):
        layer(x)[0][-1].sum().backward()
    layer.rank = H
    layer(x)[0][-1].sum().backward()


def test_each_layer_and_direction_reports():
    _, layer = pair("GRU", own={"iterations": 3}, num_layers=2, bidirectional=True)
    layer.reports = []
    y, _ = layer(torch.randn(T, B, I, dtype=torch.float64))
    y.sum().backward()
    assert [len(report.increments) for report in layer.reports] == [4] * 4


@pytest.mark.parametrize("k", [None, 0, 1, 3, 40])
def test_the_gru_in_spans_of_time(k, monkeypatch):
    monkeypatch.setattr(hbp.cells._spans, "SPAN", 1)  # spans of 8 steps, the last shorter
    torch.manual_seed(0)
    layer = hb.GRU(I, H, iterations=k, exact="adjoint").double()
    x, h0 = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((27, B, I), (1, B, H)))
    y, _ = layer(x, h0)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [*layer.parameters(), x, h0], dy)
    arrays = [p.detach().numpy() for p in layer.parameters()]
    _, pullback = hbp.cells.gru(hbp.cells.GRUParameters(*arrays), x.detach().numpy(), h0[0].detach().numpy())
    dparams, dx, dh0 = pullback(dy.numpy(), iterations=k)
    close(found, [torch.tensor(d) for d in (*dparams, dx, dh0[None])], 1e-12)
    frozen = layer(x.detach(), h0.detach())[0]  # the inputs' gradient is left out
    close(torch.autograd.grad(frozen, list(layer.parameters()), dy), found[:4], 1e-12)


def test_new_tensors_in_place_of_the_weights_are_used():
    vendor, ours = pair("GRU", own={"iterations": T})
    other = {name: (2 * p).detach().requires_grad_() for name, p in vendor.named_parameters()}
    x = torch.randn(T, B, I, dtype=torch.float64)
    found, expected = (torch.func.functional_call(layer, other, (x,))[0] for layer in (ours, vendor))
    equal([found], [expected])
    leaves = list(other.values())
    close(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), 1e-12)

    class Block(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return x + self.layer(x)[0]

    torch.manual_seed(0)
    stack = hb.Sequential(*(Block(hb.GRU(I, I, iterations=T).double()) for _ in range(3)))
    expected = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    stack.iterations = 3
    close(torch.autograd.grad(stack(x).square().sum(), list(stack.parameters())), expected, 1e-10)


@pytest.mark.parametrize("own", [{"exact": "adjoint"}, {"iterations": 2}])
def test_an_empty_batch(own):
    layer = hb.GRU(I, H, **own)
    y, _ = layer(torch.randn(T, 0, I, requires_grad=True))
    y.sum().backward()
    assert not layer.weight_hh_l0.grad.any()


class Outputs(torch.nn.Module):
    def forward(self, found: Any) -> Any:
        return found[0]


def test_distributed_data_parallel_in_one_process():
    torch.manual_seed(0)
    stack = [hb.Residual(torch.nn.Linear(H, H)) for _ in range(3)]
    model = torch.nn.Sequential(hb.GRU(I, H, iterations=9), Outputs(), hb.Sequential(*stack, iterations=3)).double()
    x = torch.randn(T, 4, I, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(x).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    close([p.grad for p in model.parameters()], expected, 1e-12)
