"""Layers under what transforms, traces, exports or compiles a call: torch's own gradients, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")

T, B, H = 4, 2, 3
SIZES = torch.arange(1.0, T * B * H + 1, dtype=torch.float64).reshape(T, B, H)
REFUSED = "would lose the backward pass by Highway-BP; set iterations=None"


class First(torch.nn.Module):
    """The outputs of a recurrent layer alone."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)[0]


class Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2 * H, 2 * H)

    def forward(self, h: Any, x: Any) -> Any:
        gate, update = self.linear(torch.cat([h, x], -1)).chunk(2, -1)
        return torch.sigmoid(gate), torch.tanh(update)


class Scan(torch.nn.Module):
    def __init__(self, iterations: int | None) -> None:
        super().__init__()
        self.cell, self.iterations = Cell(), iterations

    def forward(self, x: Any) -> Any:
        return hb.scan(self.cell, x.new_zeros(B, H), x, iterations=self.iterations)[0]


class Loop(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(blocks())

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def blocks() -> list[Any]:
    return [torch.nn.Sequential(torch.nn.LayerNorm(H), torch.nn.Linear(H, H)) for _ in range(4)]


LAYERS: dict[str, Callable[[int | None], Any]] = {
    "GRU": lambda k: First(hb.GRU(H, H, iterations=k)),
    "LSTM": lambda k: First(hb.LSTM(H, H, iterations=k)),
    "scan": Scan,
    "Sequential": lambda k: hb.Sequential(*blocks(), iterations=k),
    "converted": lambda k: hb.convert(Loop(), iterations=k),
}


def layer(name: str, iterations: int | None) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](iterations).double()


def inputs() -> Any:
    return torch.sin(SIZES)


def parameters(module: Any) -> dict[str, Any]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss(y: Any) -> Any:
    return (SIZES * y.square()).sum()


def at(module: Any) -> Callable[..., Any]:
    """The loss as a function of the input and the parameters."""
    return lambda x, own: loss(torch.func.functional_call(module, own, (x,)))


def plain(module: Any) -> list[Any]:
    x = inputs().requires_grad_()
    return list(torch.autograd.grad(loss(module(x)), [x, *module.parameters()]))


def exact(name: str) -> list[Any]:
    """The gradients by torch's own graph: of torch's own layers where there are any."""
    module = layer(name, None)
    if name in ("GRU", "LSTM"):
        vendor = First(getattr(torch.nn, name)(H, H).double())
        vendor.load_state_dict(module.state_dict())
        module = vendor
    return plain(module)


def func_grad(module: Any) -> list[Any]:
    dx, own = torch.func.grad(at(module), argnums=(0, 1))(inputs(), parameters(module))
    return [dx, *own.values()]


def func_vjp(module: Any) -> list[Any]:
    _, pullback = torch.func.vjp(at(module), inputs(), parameters(module))
    dx, own = pullback(torch.ones((), dtype=torch.float64))
    return [dx, *own.values()]


def func_jacrev(module: Any) -> list[Any]:
    dx, own = torch.func.jacrev(at(module), argnums=(0, 1))(inputs(), parameters(module))
    return [dx, *own.values()]


def func_jacfwd(module: Any) -> list[Any]:
    dx, own = torch.func.jacfwd(at(module), argnums=(0, 1))(inputs(), parameters(module))
    return [dx, *own.values()]


def tracer(module: Any) -> list[Any]:
    own, x = {name: p.requires_grad_() for name, p in parameters(module).items()}, inputs().requires_grad_()
    traced = torch.fx.experimental.proxy_tensor.make_fx(at(module))(inputs(), own)
    return list(torch.autograd.grad(traced(x, own), [x, *own.values()]))


def jit_trace(module: Any) -> list[Any]:
    return plain(torch.jit.trace(module, (inputs(),), check_trace=False))


def export(module: Any, strict: bool = False) -> list[Any]:
    exported = torch.export.export(module, (inputs(),), strict=strict).module()
    own, x = dict(exported.named_parameters()), inputs().requires_grad_()
    return list(torch.autograd.grad(loss(exported(x)), [x, *(own[name] for name, _ in module.named_parameters())]))


TRANSFORMS = (func_grad, func_vjp, func_jacrev, func_jacfwd, tracer, jit_trace, export)


def agree(found: Any, expected: Any) -> None:
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracers warn of much
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_a_transform_takes_torchs_own_path_or_is_refused(name, transform):
    agree(transform(layer(name, None)), exact(name))
    with pytest.raises(RuntimeError, match=REFUSED):
        transform(layer(name, 1))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's forward mode uses it
@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_takes_torchs_own_path_or_is_refused(name):
    x, direction = inputs(), torch.cos(SIZES)
    expected, ours, refused = (exact(name)[0] * direction).sum(), layer(name, None), layer(name, 1)
    for mode in (torch.enable_grad, torch.no_grad):  # which switches off reverse mode only
        with mode():
            _, found = torch.func.jvp(lambda x: loss(ours(x)), (x,), (direction,))
            torch.testing.assert_close(found, expected)
            with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
                refused(torch.autograd.forward_ad.make_dual(x, direction))


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_takes_torchs_own_path_or_is_refused(name):
    x = torch.stack([inputs(), 2 * inputs()]).requires_grad_()
    for own in (layer(name, 1), layer(name, 1).requires_grad_(False)):
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.vmap(own)(x)
        with torch.no_grad():
            if name not in ("GRU", "LSTM"):  # where torch has none
                torch.testing.assert_close(torch.vmap(own)(x)[0], layer(name, None)(inputs()))
    if name in ("GRU", "LSTM"):
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):  # torch's own layers' word
            torch.vmap(layer(name, None))(x)
        return
    (found,) = torch.autograd.grad(loss(torch.vmap(layer(name, None))(x)[0]), x)
    agree([found[0]], exact(name)[:1])


@pytest.mark.parametrize("name", LAYERS)
def test_batched_cotangents_take_torchs_own_path_or_are_refused(name):
    x = inputs()
    found = layer(name, None)
    if name in ("GRU", "LSTM"):
        found.layer.exact = "library"
    agree([torch.autograd.functional.jacobian(lambda x: loss(found(x)), x, vectorize=True)], exact(name)[:1])
    refused = [layer(name, 1)]
    if name in ("GRU", "LSTM"):
        refused.append(layer(name, None))
        refused[1].layer.exact = "adjoint"
    for module in refused:
        with pytest.raises(RuntimeError, match=r"no batched cotangents .* set iterations=None"):
            torch.autograd.functional.jacobian(lambda x, module=module: loss(module(x)), x, vectorize=True)


@pytest.mark.parametrize("name", ["GRU", "Sequential"])
def test_a_strict_export(name):
    agree(export(layer(name, None), strict=True), exact(name))
    with pytest.raises(RuntimeError, match=r"no traceable code; set iterations=None"):
        export(layer(name, 1), strict=True)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")  # as of torch's own layers
@pytest.mark.parametrize("name", LAYERS)
def test_an_export_for_values_alone(name):
    with torch.no_grad():
        exported = torch.export.export(layer(name, 1), (inputs(),)).module()
        torch.testing.assert_close(exported(inputs()), layer(name, None)(inputs()))


@pytest.mark.parametrize("name", ["GRU", "scan", "Sequential"])
def test_a_compiled_transform_is_not_exact_unseen(name):
    module = layer(name, 1)
    gradient = torch.func.grad(lambda own: loss(torch.func.functional_call(module, own, (inputs(),))))
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.compile(gradient, backend="eager")(parameters(module))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own access
@pytest.mark.parametrize("name", ["scan", "Sequential"])
def test_a_compiled_layer_breaks_its_graph_or_says_how_not_to(name):
    agree(plain(torch.compile(layer(name, 1), backend="eager")), plain(layer(name, 1)))
    agree(plain(torch.compile(layer(name, None), backend="eager", fullgraph=True)), exact(name))
    with pytest.raises(RuntimeError, match=r"no traceable code; set iterations=None, .* or fullgraph=False"):
        torch.compile(layer(name, 1), backend="eager", fullgraph=True)(inputs())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GRU", "LSTM", "Sequential"])
def test_torchscript_is_refused(name):
    with pytest.raises(RuntimeError, match=rf"torch.jit.script cannot compile hbp's {name}; load its state_dict"):
        torch.jit.script(layer(name, None))


@pytest.mark.parametrize("k", [None, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_fake_tensors_have_gradients_without_numbers(name, k):
    module = layer(name, k)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(inputs()).requires_grad_()
        found = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    assert [g.shape for g in found] == [g.shape for g in plain(module)]
