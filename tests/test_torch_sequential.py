"""hb.Sequential: exact at k = L for every kind of layer, iterate k's path sums at every smaller one."""

from __future__ import annotations

import copy
import math
import pickle
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracles import chunked_path_sum
from torch_oracles import Cuts

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn

D, L = 4, 5


class Masked(nn.Module):
    """A block that takes a mask and a bias as keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Any, mask: Any = None, bias: Any = 0) -> Any:
        return torch.tanh(self.linear(x) + bias) * mask


def mlp() -> Any:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


def conv(channels: int) -> Any:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


SHARED = nn.Linear(D, D)
STACKS = {
    "pre-activation": lambda: [hb.Residual(mlp()) for _ in range(L)],
    "rectified": lambda: [hb.Residual(mlp(), (torch.relu, nn.ReLU())[i % 2]) for i in range(L)],
    "mixed": lambda: [hb.Residual(mlp(), torch.relu if i % 2 else None) for i in range(L)],
    "post-norm": lambda: [hb.PostNorm(mlp(), nn.LayerNorm(D)) for _ in range(L)],
    "post-norm without weights": lambda: [hb.PostNorm(mlp(), nn.LayerNorm(D, elementwise_affine=False))] * L,
    "plain layers": lambda: [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(L)],
    "dropout": lambda: [hb.Residual(nn.Sequential(mlp(), nn.Dropout(0.5))) for _ in range(L)],
    "one layer five times": lambda: [hb.Residual(mlp())] * L,
    "one weight in all layers": lambda: [hb.Residual(nn.Sequential(nn.Tanh(), SHARED)) for _ in range(L)],
}
IMAGES = {
    "batch norm": lambda: [hb.Residual(conv(D), torch.relu) for _ in range(L)],
    "downsampled": lambda: [hb.Residual(hb.Downsampled(conv(D * s), s), torch.relu) for s in (1, 2, 2, 4, 4)],
}


def inputs(name: str) -> Any:
    return torch.randn(3, D, 8, 8, dtype=torch.float64) if name in IMAGES else torch.randn(3, 2, D, dtype=torch.float64)


def gradients(model: Any, x: Any, leaves: Any = (), **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(6)
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    wanted = [x, *leaves, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), torch.autograd.grad(y, wanted, torch.cos(y.detach()), allow_unused=True, materialize_grads=True)


def close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    largest = max(reference.abs().max() for reference in expected)
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).abs().max() <= tolerance * max(reference.abs().max(), 1e-3 * largest)


EQUAL = set(STACKS) - {"mixed", "dropout"}


@pytest.mark.parametrize("name", [*STACKS, *IMAGES])
@pytest.mark.parametrize("stacked", [False, None])
def test_values_are_those_of_the_layers_and_enough_iterations_are_exact(name, stacked):
    torch.manual_seed(0)
    model = hb.Sequential(*(STACKS | IMAGES)[name](), stacked=stacked).double()
    x = inputs(name)
    expected_y, expected = gradients(model, x)
    for k, chunk, damping in ((L, 1, 0), (3, 2, 0), (1, 9, 0), (L, 1, 0.3), (2, 3, 0.3)):
        model.iterations, model.chunk, model.damping = k, chunk, damping
        y, found = gradients(model, x)
        assert torch.equal(y, expected_y)
        close(found, expected)
        assert model.path == "stacked" if stacked is None and name in EQUAL else model.path.startswith("loop")


def residual_matrices(layers: Any, cuts: Cuts, replaced: Any, damping: Any) -> np.ndarray:
    """The residual maps of a run by their definition, on flattened states, (L, n, n)."""
    maps = []
    for i, layer in enumerate(layers):
        x, y = cuts.starts[i].detach(), cuts.ends[i].detach()
        diagonal = torch.ones_like(y)
        gamma = damping[i] if isinstance(damping, list) else damping
        if replaced is not None:
            maps.append((1 - gamma) * np.kron(np.eye(y.numel() // D), replaced[i]))
            continue
        if isinstance(layer, hb.PostNorm):
            total = (x + layer.block(x)).detach()
            diagonal = layer.norm.weight.detach() / (total.var(-1, correction=0, keepdim=True) + layer.norm.eps).sqrt()
        elif getattr(layer, "rectified", False):
            diagonal = (y > 0).double()
        maps.append((1 - gamma) * np.diag(diagonal.numpy().reshape(-1)))
    return np.stack(maps)


SCALES, EYE = np.array([0.5, -0.25, 0.75, 1.0, 0.0]), np.eye(D)
LEFT, RIGHT = np.linspace(-1, 1, D)[:, None], np.linspace(1, 0.5, D)[None]
ALONG = hbp.Scalar(0.5) + hbp.LowRank(torch.from_numpy(LEFT[None]), torch.from_numpy(RIGHT[None]))
SPLITS = {
    "own": (0, None, None),
    "damped": (0.2, None, None),
    "damped each": ([0.1, 0.2, 0.3, 0.4, 0.5], None, None),
    "fixed point": (0, hbp.Zero(), [0 * EYE] * L),
    "numbers": (0.1, hbp.Scalar(torch.from_numpy(SCALES)), [scale * EYE for scale in SCALES]),
    "strong directions": (0.1, ALONG, [0.5 * EYE + LEFT @ RIGHT] * L),
}
ITERATES = ["pre-activation", "rectified", "mixed", "post-norm", "plain layers", "one layer five times",
            "one weight in all layers"]  # fmt: skip


@pytest.mark.parametrize("stacked", [False, None])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ITERATES)
def test_iterates_are_path_sums_and_layers_pull_them_back_themselves(name, split, chunk, stacked):
    """At every k, with the gradients of all parameters: g[i+1] of iterate k, pulled back by layer i's own autograd."""
    torch.manual_seed(0)
    damping, residual, replaced = SPLITS[split]
    plain = nn.Sequential(*STACKS[name]()).double()
    model = hb.Sequential(*plain, chunk=chunk, damping=damping, residual=residual, stacked=stacked)
    x, cuts = torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True), Cuts()
    hooks = cuts.register(list(dict.fromkeys(plain)))
    loss = torch.sin(plain(x)).sum()  # its cotangent is what `gradients` gives
    for hook in hooks:
        hook.remove()
    R, (J, c) = residual_matrices(list(plain), cuts, replaced, damping), cuts.problem(loss)
    stages, iterates, wanted = math.ceil(L / chunk), [], [x, *plain.parameters()]
    for model.iterations in range(stages + 1):
        g = chunked_path_sum(R, J - R, c, model.iterations, chunk)
        expected = torch.autograd.grad(cuts.surrogate(loss, g), wanted, retain_graph=True)
        close(gradients(model, x)[1], expected)
        iterates.append(torch.cat([g.flatten() for g in expected[1:]]))
    if stacked is None and name in EQUAL:
        assert model.path == "stacked"
    for a, b in pairwise(iterates[:stages]):  # parameters come after x[0], so theirs are exact one iterate earlier
        assert (a - b).abs().max() > 1e-5 * b.abs().max()  # no other iterate would have passed


class Scaled(nn.Linear):
    """A layer with a setting that is no parameter."""

    def __init__(self, scale: float) -> None:
        super().__init__(D, D)
        self.scale = nn.Identity()
        self.scale.factor = torch.tensor(scale)

    def forward(self, x: Any) -> Any:
        return x + self.scale.factor * super().forward(x)


class Choosing(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [nn.Linear(D, D), nn.Sequential(nn.Linear(D, D))], "the layers differ"),
        (lambda: [nn.Linear(D, D)], "one layer only"),
        (lambda: [nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)) for _ in range(2)], "the layers have buffers"),
        (lambda: [nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(2)], "the layers are random"),
        (lambda: [Choosing(D, D) for _ in range(2)], "torch.vmap says"),
        (
            lambda: [Scaled(0.5), Scaled(0.25)],
            "different settings|hold more than parameters|have other values",
        ),
    ],
)
def test_layers_that_cannot_be_pulled_back_all_at_once(layers, reason):
    torch.manual_seed(0)
    model = hb.Sequential(*layers(), iterations=2)
    x = torch.randn(3, D, requires_grad=True)
    model(x).sum().backward()
    assert model.path.startswith("loop: ")
    assert re.search(reason, model.path)
    model.stacked = True
    with pytest.raises(RuntimeError, match=f"stacked=True, but .*({reason})"):
        model(x).sum().backward()


def test_all_at_once_with_arguments_and_frozen_and_tied_parameters():
    torch.manual_seed(0)
    blocks = [Masked() for _ in range(L)]
    blocks[1].linear.weight.requires_grad_(False)
    blocks[3].linear.weight = blocks[2].linear.weight
    model = hb.Sequential(*map(hb.Residual, blocks)).double()
    bias = torch.randn(D, dtype=torch.float64, requires_grad=True)
    mask, x = (torch.rand(3, 2, 1) > 0.3).double(), inputs("")
    expected = gradients(model, x, [bias], mask=mask, bias=bias)[1]
    for model.iterations, model.chunk, model.stacked in ((L, 1, True), (3, 2, True), (2, 1, True), (2, 1, False)):
        found = gradients(model, x, [bias], mask=mask, bias=bias)[1]
        if model.iterations > 2:
            close(found, expected)
        elif model.stacked:
            iterate = found
    assert model.path == "loop: pinned"
    close(iterate, found)


def test_keyword_arguments_reach_every_layer_and_get_gradients():
    torch.manual_seed(0)
    model = hb.Sequential(*(hb.Residual(Masked()) for _ in range(L))).double()
    mask = (torch.rand(3, 2, 1) > 0.3).double()
    bias = torch.randn(D, dtype=torch.float64, requires_grad=True)
    x = inputs("")
    expected = gradients(model, x, [bias], mask=mask, bias=bias)[1]
    model.iterations = L
    close(gradients(model, x, [bias], mask=mask, bias=bias)[1], expected)
    assert expected[1].abs().max() > 0


def test_statistics_are_updated_once_and_eval_and_no_grad_are_plain():
    torch.manual_seed(0)
    model = hb.Sequential(*IMAGES["batch norm"](), iterations=2).double()
    model(inputs("batch norm")).sum().backward()
    assert model[0].block[1].num_batches_tracked == 1
    with torch.no_grad():
        assert not model.eval()(inputs("batch norm")).requires_grad


def test_hooks_frozen_and_unused_parameters():
    torch.manual_seed(0)
    model = hb.Sequential(*STACKS["pre-activation"](), iterations=L).double()
    weight = model[2].block[0].weight
    model[1].block[0].weight.requires_grad_(False)
    model[3].register_parameter("unused", nn.Parameter(torch.ones(2)))
    x = inputs("")
    y, exact = gradients(model, x)
    number = [id(p) for p in model.parameters() if p.requires_grad].index(id(weight))
    calls = []
    weight.register_hook(lambda g: calls.append(1) or 0.5 * g)
    model(x).backward(torch.cos(y))
    assert calls == [1]
    close([weight.grad], [0.5 * exact[1 + number]])
    assert model[1].block[0].weight.grad is None
    assert model[3].unused.grad is None


def test_slices_and_copies_keep_the_options():
    model = hb.Sequential(*STACKS["rectified"](), iterations=2, chunk=3, damping=0.1, residual=hbp.Zero())
    for same in (model[1:4], copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same) is hb.Sequential
        assert (same.iterations, same.chunk, same.damping) == (2, 3, 0.1)
        assert isinstance(same.residual, hbp.Zero)
    assert len(model[1:4]) == 3
    assert model[1:4][0] is model[1]


def test_slices_take_the_options_of_their_layers():
    torch.manual_seed(0)
    layers = STACKS["plain layers"]()
    gammas, scales = [0.1, 0.2, 0.3, 0.4, 0.5], torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]).double()
    part = hb.Sequential(*layers, iterations=1, damping=gammas, residual=hbp.Scalar(scales)).double()[1:4]
    twin = hb.Sequential(*layers[1:4], iterations=1, damping=gammas[1:4], residual=hbp.Scalar(scales[1:4]))
    x = inputs("")
    close(gradients(part, x)[1], gradients(twin, x)[1])


def test_state_dict_keys_are_those_of_nn():
    layers = STACKS["rectified"]()
    assert list(hb.Sequential(*layers).state_dict()) == list(nn.Sequential(*layers).state_dict())


def test_tolerance_and_divergence():
    torch.manual_seed(0)
    model = hb.Sequential(*STACKS["pre-activation"](), tolerance=1e-12).double()
    x = inputs("")
    found = gradients(model, x)[1]
    model.tolerance = None
    close(found, gradients(model, x)[1])

    class Cancelling(nn.Module):
        def forward(self, x: Any) -> Any:
            return 0.1 * x

    model = hb.Sequential(*(Cancelling() for _ in range(9)), tolerance=1e-3)
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(hbp.DivergenceWarning, match="damp the split"):
        model(x).sum().backward()
    model.damping, model.iterations, model.tolerance = 0.9, 0, None
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full((2,), 0.1**9))


def test_down_is_the_left_inverse_of_up():
    for s in (1, 2, 4):
        layer = hb.Downsampled(nn.Identity(), s)
        small = torch.randn(2, 3 * s, 8 // s, 8 // s)
        assert layer.up(small).shape == (2, 3, 8, 8)
        torch.testing.assert_close(layer.down(layer.up(small)), small)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    down = hb.Downsampled(nn.Identity(), 2).down(x)
    assert down[0, :, 0, 0].tolist() == [2.0, 3.0]  # rows (0, 4) and (1, 5) averaged, columns folded into channels


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hb.Sequential(nn.Linear(3, 3), residual="I"), TypeError, "residual is a str; give an operator"),
        (lambda: hb.Sequential(nn.Linear(3, 3), stacked=1.5), ValueError, "stacked=1.5; give True, False, or None"),
        (lambda: hb.Sequential(nn.Linear(3, 3), iterations=-1), ValueError, "iterations=-1 is too small"),
        (
            lambda: hb.Sequential(nn.Linear(3, 3), tolerance=-1)(torch.ones(2, 3)),
            ValueError,
            "tolerance=-1; give a non-",
        ),
        (lambda: hb.Residual(nn.Linear(3, 3), torch.tanh), ValueError, "give None, torch.relu or"),
        (lambda: hb.PostNorm(nn.Linear(3, 3), nn.BatchNorm1d(3)), ValueError, "give a torch.nn.LayerNorm"),
        (lambda: hb.Downsampled(nn.Identity(), 3), ValueError, "factor=3; give a power of two"),
        (lambda: hb.Downsampled(nn.Identity(), 0), ValueError, "factor=0 is too small"),
        (lambda: hb.Downsampled(nn.Identity(), 2.0), TypeError, "factor=2.0 is a float; give an integer"),
        (lambda: hb.Downsampled(None, 2), TypeError, "block is a NoneType; give a torch.nn.Module"),
        (lambda: hb.Residual(None), TypeError, "block is a NoneType; give a torch.nn.Module"),
        (lambda: hb.Residual(nn.Linear), TypeError, "block is a type; give a torch.nn.Module"),
        (lambda: hb.PostNorm(None, nn.LayerNorm(3)), TypeError, "block is a NoneType; give a torch.nn.Module"),
        (lambda: hb.Sequential(3), TypeError, "layer 0 is a int; give torch.nn.Modules"),
        (lambda: hb.Sequential([nn.Linear(3, 3)]), TypeError, "layer 0 is a list; give torch.nn.Modules"),
        (lambda: hb.Sequential(nn.Linear(3, 3), damping=float("nan")), ValueError, "damping is nan; give a finite"),
        (lambda: hb.Sequential(nn.Linear(3, 3), damping=[float("inf")]), ValueError, r"damping is \[inf\]; give a fin"),
        (
            lambda: hb.Sequential(nn.Linear(3, 3), damping=[0.1, 0.2]),
            ValueError,
            "damping has 2 entries",
        ),
        (
            lambda: hb.Sequential(nn.Linear(3, 3), residual=hbp.Scalar(torch.ones(2))),
            ValueError,
            "the residual Scalar has 2 maps and the chain 1 layers; give one map per layer",
        ),
        (lambda: hb.Sequential(nn.Linear(3, 3), damping="0.1"), TypeError, "damping is '0.1'; give a number"),
        (
            lambda: hb.Sequential(nn.Linear(3, 2), iterations=1)(torch.ones(2, 3)),
            ValueError,
            r"output of layer 0, a Linear, has shape \(2, 2\), expected \(2, 3\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
