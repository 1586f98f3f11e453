"""hb.convert: existing models keep their values, keys and arguments, and get Highway-BP's gradients."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from oracles import chunked_path_sum
from torch_oracles import Cuts

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn

pytest.importorskip("torch.utils.checkpoint")
prune: Any = pytest.importorskip("torch.nn.utils.prune")

D, L = 4, 5


class Layer(nn.Module):
    """A layer that takes a shared context and may return a tuple."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)
        self.kind = kind

    def forward(self, x: Any, context: Any = None, scale: Any = 1.0) -> Any:
        inner = torch.tanh(self.linear(self.norm(x)))
        y = x + scale * (inner if context is None else inner * context["value"])
        return {"tensor": y, "tuple": (y, inner.square(), 7), "named": Named(y, inner), "dict": {"y": y}}[self.kind]


class Named(NamedTuple):
    state: Any
    inner: Any


class Model(nn.Module):
    """A loop over a list of layers, in one of the ways such loops are written."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.embed = nn.Linear(3, D)
        self.layers = nn.ModuleList([Layer(kind) for _ in range(L)])
        self.head = nn.Linear(D, 2)
        self.scales = nn.Parameter(torch.rand(L))

    def forward(self, x: Any, way: str = "plain") -> Any:
        x = self.embed(x)
        context = {"value": torch.sigmoid(self.head.weight[0])}
        states, extras = [], []
        for i, layer in enumerate(self.layers[1:] if way == "slice" else self.layers):
            if way == "context":
                x = layer(x, context)
            elif way == "own tensors":
                x = layer(x, scale=self.scales[i])
            elif way == "by name":
                x = layer(x=x)
            else:
                x = layer(x)
            if isinstance(x, tuple):
                extras.append(x[1])
                x = x[0]
            if way == "changed":
                x = 1.1 * x
            states.append(x)
        loss = self.head(x).square().sum()
        if way == "states":
            loss = loss + sum((i * state).sin().sum() for i, state in enumerate(states))
        if way == "early exit":
            loss = states[2].sin().sum()
        if way == "extras":
            loss = loss + sum(extra.sum() for extra in extras[1:3])
        return loss


def gradients(model: Any, way: str = "plain") -> dict[str, Any]:
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 2, 3).requires_grad_()
    model.zero_grad(set_to_none=True)
    loss = model(x, way)
    loss.backward()
    return {"x": x.grad, "loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    largest = max(reference.abs().max() for reference in expected.values())
    for name, reference in expected.items():
        error = (found[name] - reference).abs().max()
        assert error <= tolerance * max(reference.abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("tensor", "plain"),
        ("tensor", "slice"),
        ("tensor", "context"),
        ("tensor", "by name"),
        ("tensor", "states"),
        ("tensor", "early exit"),
        ("tuple", "plain"),
        ("tuple", "states"),
        ("tuple", "extras"),
        ("named", "extras"),
    ],
)
def test_a_loop_over_a_list(kind, way):
    torch.manual_seed(0)
    model = Model(kind).double()
    keys, expected = list(model.state_dict()), gradients(model, way)
    assert hb.convert(model, iterations=L) is model
    close(gradients(model, way), expected)
    close(gradients(copy.deepcopy(model), way), expected)
    close(gradients(pickle.loads(pickle.dumps(model)), way), expected)
    assert list(model.state_dict()) == keys
    hb.set_iterations(model, 0)
    rough = gradients(model, way)
    assert rough["loss"] == expected["loss"]
    assert (rough["x"] - expected["x"]).abs().max() > 1e-3 * expected["x"].abs().max()
    hb.set_iterations(model, None)
    close(gradients(model, way), expected, 0)
    hb.revert(model)
    close(gradients(model, way), expected, 0)
    assert all("forward" not in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize("stacked", [False, None])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("tensor", "plain"),
        ("tensor", "slice"),
        ("tensor", "context"),
        ("tensor", "by name"),
        ("tensor", "states"),
        ("tensor", "early exit"),
        ("tuple", "extras"),
        ("named", "extras"),
    ],
)
def test_iterates_are_path_sums_and_layers_pull_them_back_themselves(kind, way, chunk, stacked):
    """At every k and for every parameter, also those outside the stack and those of what all layers read."""
    torch.manual_seed(0)
    model, cuts, gammas = Model(kind).double(), Cuts(), [0.1, 0.2, 0.0, 0.4, 0.5]
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 2, 3)
    hooks = cuts.register(model.layers)
    loss = model(x, way)
    for hook in hooks:
        hook.remove()
    J, c = cuts.problem(loss)
    kept = 1 - np.array(gammas[1:] if way == "slice" else gammas)[: len(J)]
    R, iterates = kept[:, None, None] * np.eye(c.shape[1]), []
    named = dict(model.named_parameters())
    stages = math.ceil(len(J) / chunk)
    for k in range(stages + 1):
        scalar = cuts.surrogate(loss, chunked_path_sum(R, J - R, c, k, chunk))
        found = torch.autograd.grad(scalar, [*named.values()], allow_unused=True, retain_graph=True)
        iterates.append({name: g for name, g in zip(named, found, strict=True) if g is not None and g.any()})
    hb.convert(model, damping=gammas, chunk=chunk, stacked=stacked)
    for k, expected in enumerate(iterates):
        hb.set_iterations(model, k)
        found = gradients(model, way)
        close({name: g for name, g in found.items() if name in named and g.any()}, expected)
    for a, b in pairwise(iterates):  # no other iterate would have passed
        assert max((a[name] - b[name]).abs().max() / b[name].abs().max() for name in b) > 1e-4


def test_iterates_are_those_of_a_stack_built_by_hand():
    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    twin.layers = nn.ModuleList([hb.Sequential(*twin.layers)])
    hb.convert(model)
    for k, chunk, damping in ((0, 1, 0), (1, 1, 0), (2, 1, 0.2), (1, 2, 0), (1, 1, [0.1, 0.2, 0.3, 0.4, 0.5])):
        for net in (model, twin):
            for options in hb.options.scheduled(net).values():
                options.iterations, options.chunk, options.damping = k, chunk, damping
        found, expected = gradients(model), gradients(twin)
        close(dict(zip(expected, found.values(), strict=True)), expected)


@pytest.mark.parametrize("way", ["own tensors", "changed"])
def test_a_broken_run_is_exact_and_said_so(way):
    torch.manual_seed(0)
    model = Model().double()
    expected = gradients(model, way)
    hb.convert(model, iterations=1)
    with pytest.warns(UserWarning, match="a new run of Highway-BP begins there"):
        close(gradients(model, way), expected)


def test_what_is_converted():
    def layers(n: int) -> Any:
        return [Layer() for _ in range(n)]

    names = {
        "row": nn.Sequential(nn.Linear(3, D), *layers(4), nn.Linear(D, 2)),
        "nested": nn.ModuleDict({"a": nn.ModuleList(layers(2)), "b": nn.Sequential(*layers(3))}),
        "tied": nn.Sequential(*layers(1) * 3),
    }
    for model in names.values():
        hb.convert(model, iterations=1)
    assert ["forward" in layer.__dict__ for layer in names["row"]] == [False, *[True] * 4, False]
    assert "forward" not in names["nested"]["a"][0].__dict__
    assert "forward" in names["nested"]["b"][0].__dict__
    names["row"](torch.randn(2, 3)).sum().backward()
    names["tied"](torch.randn(2, D)).sum().backward()
    hb.revert(names["nested"])
    hb.convert(names["nested"], 2, stacks=["a", "b"])
    assert len(hb.options.scheduled(names["nested"])) == 2


def test_conversion_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, logger="hbp"):
        hb.convert(Model(), iterations=1)
    assert caplog.messages == ["hbp.convert: layers of Model: 5 layers, Layer"]


def test_hooks_see_what_they_see_without_conversion():
    torch.manual_seed(0)
    model = Model().double()
    expected = gradients(model)
    hb.convert(model, iterations=L)
    seen: list[Any] = []
    model.layers[2].register_forward_hook(lambda *given: seen.append(given[2]))
    model.layers[3].linear.weight.register_hook(lambda g: seen.append("weight") or 0.5 * g)
    found = gradients(model)
    assert len(seen) == 2
    assert seen[0].requires_grad
    expected["layers.3.linear.weight"] *= 0.5
    close(found, expected)


def test_a_second_backward_and_a_loss_on_inner_tensors_are_refused():
    model = hb.convert(Model(), iterations=1)
    loss = model(torch.randn(3, 3))
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    inside: list[Any] = []
    model.layers[1].linear.register_forward_hook(lambda *given: inside.append(given[2]))
    with pytest.raises(RuntimeError, match="a tensor made inside"):
        (model(torch.randn(3, 3)) + inside[0].sum()).backward()
    with pytest.raises(RuntimeError, match=r"no second derivatives by .*; set iterations=None"):
        torch.autograd.grad(model(torch.randn(3, 3)), model.embed.weight, create_graph=True)


def test_a_graph_is_freed_by_its_backward_or_when_dropped():
    inside: list[Any] = []

    class Token:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.token = Token()
            inside.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(_: Any, g: Any) -> Any:
            return g

    model = Model()
    model.layers[1].linear.register_forward_hook(lambda *given: Marked.apply(given[2]))
    hb.convert(model, iterations=1)
    gc.collect()
    gc.disable()
    try:
        loss = model(torch.randn(3, 3))
        assert inside[0]() is not None
        loss.backward()
        assert inside[0]() is None
        loss = model(torch.randn(3, 3))
        del loss
        assert inside[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("k", [None, 0, 2])
def test_nan_goes_through(k):
    for model in (hb.convert(Model(), k), hb.Sequential(*(Layer() for _ in range(3)), iterations=k)):
        x = torch.full((2, 3 if isinstance(model, Model) else D), float("nan"), requires_grad=True)
        loss = model(x).square().sum()
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().all()


class Cache:
    def __init__(self) -> None:
        self.layers: list[Any] = []


class Cached(Layer):
    def forward(self, x: Any, cache: Any = None) -> Any:
        earlier = cache.layers[0]["keys"] if cache is not None and len(cache.layers) > 2 else 0
        keys = self.linear(self.norm(x)) + earlier
        if cache is not None:
            cache.layers.append({"keys": keys})
        return x + keys


def test_caches():
    stack = hb.convert(nn.ModuleList([Cached() for _ in range(3)]), iterations=1)
    x, cache = torch.randn(2, D), Cache()
    for layer in stack:
        x = layer(x, cache)
    assert len(cache.layers) == 3
    x.sum().backward()
    assert len(cache.layers) == 3
    with pytest.raises(RuntimeError, match="that needs gradients and is neither its parameter nor"):
        stack[0](torch.randn(2, D), cache)


class Odd(Layer):
    """A layer that does one of the things that would lose a gradient, or a write."""

    def __init__(self, way: str, shared: Any = None) -> None:
        super().__init__()
        self.way, self.held = way, [shared]

    def forward(self, x: Any, given: Any = None) -> Any:
        inner = torch.tanh(self.linear(self.norm(x)))
        if self.way == "holds":
            inner = inner * self.held[0]
        if self.way == "opaque":
            inner = inner * given.value
        if self.way == "counts":
            given["n"] = given.get("n", 0) + 1
            inner = inner * given["n"]
        if self.way == "in place":
            x.add_(1)
        if self.way == "attribute":
            self.penalty = self.linear.weight.square().sum()
        return x + inner


def run(layers: Any, *given: Any) -> Any:
    torch.manual_seed(1)
    x = torch.randn(2, D)
    for layer in layers:
        x = layer(x, *given)
    return x


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("way", "given", "message"),
    [
        ("holds", None, "reads a tensor of shape .* that needs gradients and is neither its parameter nor"),
        ("opaque", Opaque(torch.ones(D, requires_grad=True)), "its gradient would be lost"),
        ("counts", {"a": torch.ones(D, requires_grad=True)}, "wrote into a dict given to it"),
        ("in place", None, "layer 0, a Odd, writes into its input"),
    ],
)
def test_what_would_lose_a_gradient_or_a_write_is_refused(way, given, message):
    shared = nn.Parameter(torch.ones(D))
    layers = hb.convert(nn.ModuleList([Odd(way, shared) for _ in range(3)]), 1)
    with pytest.raises(RuntimeError, match=message):
        run(layers, given)


def test_what_layers_write_into_plain_containers_is_seen():
    layers = nn.ModuleList([Odd("counts") for _ in range(3)])
    expected, converted = run(layers, counter := {}), hb.convert(layers, 1)
    again: dict[str, int] = {}
    assert torch.equal(run(converted, again), expected)
    assert again == counter == {"n": 3}


def test_weights_computed_by_a_hook_are_refused():
    layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
    for layer in layers:
        prune.random_unstructured(layer, "weight", 0.3)
    with pytest.raises(RuntimeError, match="weights computed by a hook"):
        run(hb.convert(layers, 1))


def test_a_penalty_on_an_attribute_is_refused():
    layers = hb.convert(nn.ModuleList([Odd("attribute") for _ in range(3)]), 1)
    with pytest.raises(RuntimeError, match="a tensor made inside"):
        (run(layers).sum() + layers[1].penalty).backward()


def test_a_backward_pass_that_stops_halfway_leaves_nothing():
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer() for _ in range(L)]).double()
    x = torch.randn(2, D, dtype=torch.float64, requires_grad=True)

    def states() -> Any:
        found = [x]
        for layer in layers:
            found.append(layer(found[-1]))
        return found

    expected = torch.autograd.grad(states()[2].cos().sum(), x)
    hb.convert(layers, iterations=L)
    found = states()
    with pytest.raises(RuntimeError, match="the gradient of a state alone was asked for"):
        torch.autograd.grad(found[-1].sin().sum(), found[4], retain_graph=True, allow_unused=True)
    close({"x": torch.autograd.grad(found[2].cos().sum(), x)[0]}, {"x": expected[0]})


def test_damping_belongs_to_the_layers_wherever_a_run_begins_or_ends():
    gammas = [0.1, 0.2, 0.3, 0.4, 0.5]
    torch.manual_seed(0)
    model = hb.convert(Model().double(), 1, damping=gammas)
    found = gradients(model, "slice")
    hb.revert(model)
    model.layers[1:].requires_grad_(True)
    twin = hb.Sequential(*model.layers[1:], iterations=1, damping=gammas[1:])
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 2, 3)
    model.zero_grad()
    model.head(twin(model.embed(x))).square().sum().backward()
    close({"w": found["embed.weight"]}, {"w": model.embed.weight.grad})
    gradients(hb.convert(model, 1, damping=gammas), "early exit")


def test_autocast_holds_in_the_backward_too():
    torch.manual_seed(0)
    model = hb.Sequential(*(hb.Residual(nn.Linear(D, D)) for _ in range(3)), iterations=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, D)).square().sum()
    loss.backward()
    assert model.path == "stacked"


def test_running_all_at_once_leaves_the_layers_as_they_were():
    model = hb.Sequential(*(hb.PostNorm(nn.Linear(D, D), nn.LayerNorm(D)) for _ in range(3)), iterations=1)
    model(torch.randn(2, D)).sum().backward()
    assert model.path == "stacked"
    copy.deepcopy(model)
    model[0].block.register_forward_hook(lambda *_: None)
    model(torch.randn(2, D)).sum().backward()
    assert "hooks inside" in model.path


def test_layers_with_unequal_settings_or_written_weights_are_not_stacked():
    class Flagged(nn.Linear):
        flags: Any = ()

        def forward(self, x: Any) -> Any:
            return x + super().forward(x.detach() if self.flags else x)

    model = hb.Sequential(*(Flagged(D, D) for _ in range(3)), iterations=1)
    model[0].flags, model[1].flags, model[2].flags = [], [1], []
    model(torch.randn(2, D)).sum().backward()
    assert "different settings" in model.path
    model = hb.Sequential(*(nn.Linear(D, D) for _ in range(3)), iterations=1)
    loss = model(torch.randn(2, D, requires_grad=True)).sum()
    with torch.no_grad():
        model[1].weight.mul_(1.00001)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads():
    torch.manual_seed(0)
    model = hb.convert(Model().double(), 2)
    before = list(model.parameters())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model(torch.ones(2, 3, dtype=torch.float64)).backward(), range(40)))
    total = model.head.weight.grad.clone()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    model(torch.ones(2, 3, dtype=torch.float64)).backward()
    torch.testing.assert_close(total, 40 * model.head.weight.grad)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), nn.Linear(D, D)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hb.convert("gpt2", 1), TypeError, "model is a str; give a torch.nn.Module"),
        (lambda: hb.convert(nn.Linear(3, 3), 1), ValueError, "found no stack to convert in this Linear"),
        (lambda: hb.convert(nn.Sequential(nn.LSTM(3, 3))), ValueError, r"found no stack .* put hb\.GRU or hb\.LSTM"),
        (lambda: hb.convert(Sparse(), 1), ValueError, "its lists are: 'layers'; give stacks= to convert one whole$"),
        (lambda: hb.convert(Model(), 1, stacks="h"), ValueError, "stacks='h': there is none; name a"),
        (lambda: hb.convert(Model(), 1, stacks="head"), ValueError, "stacks='head': it is a Linear of 0"),
        (lambda: hb.convert(Model(), 1, stacks=3), TypeError, "stacks=3; give the name of a list"),
        (lambda: hb.convert(Model(), 1, stacks=[]), TypeError, r"stacks=\[\]; give the name of a list"),
        (lambda: hb.convert(Model(), 1, damping=float("inf")), ValueError, "damping is inf; give a finite number"),
        (lambda: hb.convert(Model(), -1), ValueError, "iterations=-1 is too small"),
        (lambda: hb.convert(Model(), 1, chunk=0), ValueError, "chunk=0 is too small"),
        (lambda: hb.convert(Model(), 1, residual=1), TypeError, "residual is a int; give an operator"),
        (lambda: hb.convert(Model(), 1, damping="g"), TypeError, "damping is 'g'; give a number"),
        (lambda: hb.convert(hb.convert(Model(), 1), 1), ValueError, r"layers\[0\], a Layer, .*converted already"),
        (lambda: hb.revert(Model()), ValueError, "nothing in this Model is converted"),
        (lambda: hb.set_iterations(Model(), 1), ValueError, "without any of hbp's layers"),
        (
            lambda: hb.convert(Model("dict"), 1)(torch.ones(2, 3)),
            TypeError,
            "layer 0, a Layer, returned a dict; expected a tensor, or a tuple",
        ),
        (
            lambda: hb.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), 1)(torch.ones(2, 3)),
            ValueError,
            r"the output of layer 1, a Linear, has shape \(2, 2\), expected \(2, 3\)",
        ),
        (
            lambda: hb.convert(nn.Sequential(Layer(), Layer()), 1)(torch.ones(2, D, dtype=torch.int64)),
            TypeError,
            "got a state that is no real floating point tensor",
        ),
        (lambda: hb.convert(Model(), 1).layers[0](), TypeError, "a Layer was called without its state, x"),
        (
            lambda: hb.convert(Model(), 1, damping=[0.1]),
            ValueError,
            "damping has 1 entries and the stack 5 layers",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_replaced_forwards_and_checkpointing_are_refused():
    model = Model()
    model.layers[1].forward = model.layers[1].forward
    with pytest.raises(ValueError, match=r"layers\[1\].*has been replaced"):
        hb.convert(model, 1)
    model = Model()
    model.layers[2].gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"layers\[2\].*checkpointing is on"):
        hb.convert(model, 1)
    model.layers[2].gradient_checkpointing = False
    hb.convert(model, 1)
    model.layers[2].gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="gradient checkpointing is on in a converted layer"):
        model(torch.ones(2, 3))


def test_a_schedule_follows_the_optimiser():
    model = hb.convert(Model(), hbp.Schedule({0: 1, 2: 4}))
    optimizer = torch.optim.SGD(model.parameters())
    hb.follow(optimizer, model)
    (options,) = hb.options.scheduled(model).values()
    for expected in (1, 1, 4, 4):
        assert options.current().iterations == expected
        optimizer.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at a break
def test_a_compiled_model_has_the_same_gradients():
    torch.manual_seed(0)
    model = hb.convert(Model().double(), 2)
    found, expected = gradients(torch.compile(model, backend="eager")), gradients(model)
    close({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected, 0)


def test_checkpoints_inside_a_layer():
    class Checkpointed(Layer):
        def forward(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    model = hb.Sequential(*(Checkpointed() for _ in range(3))).double()
    x = torch.randn(2, D, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.iterations = 3
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [None, 2])
def test_inputs_on_another_device_are_refused(k):
    with pytest.raises(RuntimeError, match="device"):
        hb.convert(Model(), k)(torch.ones(2, 3, device="meta"))
