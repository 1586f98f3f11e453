"""What a stack of layers leaves alone: hooks of every kind, and writes into what it returned."""

from __future__ import annotations

import copy
import gc
import warnings
from contextlib import nullcontext
from typing import Any

import pytest

import hbp

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
nn = torch.nn
everywhere = nn.modules.module

D, L = 8, 5


class Tapped(nn.Module):
    """A residual layer that hands a tensor from inside to whoever taps it."""

    def __init__(self, tap: Any = None) -> None:
        super().__init__()
        self.linear, self.tap = nn.Linear(D, D), tap

    def forward(self, x: Any) -> Any:
        inner = torch.tanh(self.linear(x))
        if self.tap is not None:
            self.tap(inner, x)
        return x + inner


def layers(tap: Any = None) -> Any:
    torch.manual_seed(0)
    return [Tapped(tap) for _ in range(L)]


def sequential(blocks: Any, k: Any, stacked: Any = None) -> Any:
    return hb.Sequential(*blocks, iterations=k, stacked=stacked).double()


def converted(blocks: Any, k: Any, stacked: Any = None) -> Any:
    return hb.convert(nn.Sequential(*blocks).double(), k, stacked=stacked)


def gradients(model: Any) -> Any:
    torch.manual_seed(1)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(model(x).cos().sum(), [x, *model.parameters()])


def close(found: Any, expected: Any) -> None:
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).abs().max() <= 1e-11 * reference.abs().max()


def halved(gradient: Any) -> Any:
    return 0.5 * gradient


# How a hook inside a layer is set: on a module before the call, or on a tensor or a node during it.
SET_BEFORE = {
    "module full backward": lambda m: m.linear.register_full_backward_hook(lambda m, given, out: (0.5 * given[0],)),
    "module full backward that looks": lambda m: m.linear.register_full_backward_hook(lambda *_: None),
    "module backward pre": lambda m: m.linear.register_full_backward_pre_hook(lambda m, out: (0.5 * out[0],)),
    "module backward, old": lambda m: m.linear.register_backward_hook(lambda *_: None),
    "all modules full backward": lambda m: everywhere.register_module_full_backward_hook(lambda *_: None),
    "all modules backward pre": lambda m: everywhere.register_module_full_backward_pre_hook(lambda *_: None),
}
SET_DURING = {
    "tensor": lambda inner, x: inner.register_hook(halved),
    "tensor that looks": lambda inner, x: inner.register_hook(lambda g: None),
    "state": lambda inner, x: x.register_hook(halved),
    "node": lambda inner, x: inner.grad_fn.register_hook(lambda *_: None),
    "node pre": lambda inner, x: inner.grad_fn.register_prehook(lambda *_: None),
    "several tensors": lambda inner, x: torch.autograd.graph.register_multi_grad_hook([inner, inner], lambda *_: None),
}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")  # torch's own
@pytest.mark.parametrize("make", [sequential, converted])
@pytest.mark.parametrize("kind", [*SET_BEFORE, *SET_DURING])
def test_backward_hooks_inside_a_layer_are_refused_and_exact_without_rounds(kind, make):
    blocks = layers(SET_DURING.get(kind))
    handle = SET_BEFORE[kind](blocks[2]) if kind in SET_BEFORE else None
    try:
        expected = gradients(nn.Sequential(*blocks).double())
        model = make(blocks, 2)
        with pytest.raises(RuntimeError, match=r"a Tapped, sets backward hooks inside.*remove them, or set iterations"):
            gradients(model)
        hb.set_iterations(model, None)
        close(gradients(model), expected)
    finally:
        if handle is not None:
            handle.remove()


def test_the_refusal_names_the_module():
    model = sequential([hb.Residual(nn.Linear(D, D)) for _ in range(L)], 5)
    model[3].block.register_full_backward_hook(lambda m, given, out: (0.5 * given[0],))
    with pytest.raises(RuntimeError, match="layer 3, a Residual, sets backward hooks inside, on block; "):
        gradients(model)


@pytest.mark.parametrize("stacked", [None, False])
def test_backward_hooks_on_converted_layers_are_called_once_with_the_gradient(stacked):
    calls: list[Any] = []
    blocks = layers()
    blocks[2].register_full_backward_hook(lambda m, given, out: calls.append(out[0]) or (0.5 * given[0],))
    expected = gradients(nn.Sequential(*blocks).double())
    model = converted(blocks, 1, stacked)
    hb.set_iterations(model, 3)  # the run through the last layers is exact from there, that of the first two too
    with pytest.warns(UserWarning, match="a backward hook stands on a layer"):
        close(gradients(model), expected)
    assert len(calls) == 2
    close(calls[1:], calls[:1])


@pytest.mark.parametrize("way", ["hook", "retain_grad"])
def test_hooks_on_states_see_the_whole_gradient_and_change_it(way):
    def through(blocks: Any) -> Any:
        torch.manual_seed(1)
        first = state = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        for i, block in enumerate(blocks):
            state = block(state)
            if i == 2:
                middle = state
                state.register_hook(halved) if way == "hook" else state.retain_grad()
        state.cos().sum().backward()
        return [first.grad] if way == "hook" else [first.grad, middle.grad]

    blocks = nn.ModuleList(layers()).double()
    expected = through(blocks)
    hb.convert(blocks, 3)
    with pytest.warns(UserWarning, match="a hook or retain_grad stands on the state"):
        close(through(blocks), expected)


@pytest.mark.parametrize("way", ["hook", "retain_grad"])
def test_hooks_set_on_states_too_late_are_refused(way):
    blocks = hb.convert(nn.ModuleList(layers()), 3)
    states = [torch.randn(3, D)]
    for block in blocks:
        states.append(block(states[-1]))
    states[2].register_hook(halved) if way == "hook" else states[2].retain_grad()
    with pytest.raises(RuntimeError, match="set on a state after the next layer took it; between"):
        states[-1].sum().backward()


@pytest.mark.parametrize("stacked", [None, False])
@pytest.mark.parametrize("make", [sequential, converted])
def test_hooks_outside_are_called_once_with_the_gradient(make, stacked):
    def run(model: Any) -> Any:
        torch.manual_seed(1)
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        stem = 2 * x
        seen: dict[str, list[Any]] = {name: [] for name in ("stem", "y", "weight", "grad", "model")}
        weight = model[2].linear.weight
        stem.register_hook(lambda g: seen["stem"].append(g) or 0.5 * g)
        handles = [
            weight.register_hook(lambda g: seen["weight"].append(g) or 3 * g),
            model.register_full_backward_hook(lambda m, given, out: seen["model"].append(out[0])),
            weight.register_post_accumulate_grad_hook(lambda p: seen["grad"].append(p.grad.clone())),
        ]
        y = model(stem)
        y.register_hook(lambda g: seen["y"].append(g) or 2 * g)
        y.cos().sum().backward()
        for handle in handles:
            handle.remove()
        assert [len(found) for found in seen.values()] == [1] * 5
        found = [x.grad, *(p.grad for p in model.parameters()), *(found[0] for found in seen.values())]
        model.zero_grad(set_to_none=True)
        return found

    blocks = layers()
    expected = run(nn.Sequential(*blocks).double())
    model = make(blocks, L, stacked)
    close(run(model), expected)
    assert [path.startswith("stacked" if stacked is None else "loop") for path in paths(model)] == [True]


def paths(model: Any) -> Any:
    return [stack.path for stack in hb.options.scheduled(model).values()]


def test_a_hook_set_between_forward_and_backward_does_not_reach_that_backward():
    blocks = layers()
    expected = gradients(nn.Sequential(*blocks).double())
    model = sequential(blocks, L)
    gradients(model)
    torch.manual_seed(1)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    loss = model(x).cos().sum()
    blocks[1].linear.register_full_backward_hook(lambda m, given, out: (0.5 * given[0],))
    blocks[3].register_forward_hook(lambda m, given, out: 2 * out)
    close(torch.autograd.grad(loss, [x, *model.parameters()]), expected)
    assert paths(model) == ["loop: there are hooks inside the layers"]


@pytest.mark.parametrize("where", ["layer", "inside", "all modules"])
@pytest.mark.parametrize("make", [sequential, converted])
def test_forward_hooks_that_change_results(make, where):
    blocks = layers()
    model = make(blocks, L)
    gradients(model)
    hook = lambda m, given, out: 1.1 * out if isinstance(m, nn.Linear | Tapped) else None  # noqa: E731
    if where == "all modules":
        handle = everywhere.register_module_forward_hook(hook)
    else:
        handle = (blocks[2] if where == "layer" else blocks[2].linear).register_forward_hook(hook)
    try:
        with warnings.catch_warnings():  # where it changes the state between converted layers, a run is broken
            warnings.simplefilter("ignore")
            found = gradients(model)
        hb.set_iterations(model, None)
        close(found, gradients(model))
    finally:
        handle.remove()


def test_hooks_on_saved_tensors():
    def halving(tensor: Any) -> Any:
        return 0.5 * tensor if tensor.is_floating_point() else tensor

    blocks = layers()
    for context in (
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(halving, lambda packed: packed),
    ):
        with context():
            expected = gradients(nn.Sequential(*blocks).double())
        model = sequential(blocks, L)
        with context():
            close(gradients(model), expected)
        assert paths(model) == ["loop: hooks on saved tensors held in the forward"]


class Reversed(torch.autograd.Function):
    """A function whose backward is not its derivative, and is written down."""

    generate_vmap_rule = True
    seen: list[Any] = []  # noqa: RUF012

    @staticmethod
    def forward(x: Any) -> Any:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_: Any, g: Any) -> Any:
        Reversed.seen.append(1)
        return -0.5 * g


class Function(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x + Reversed.apply(super().forward(x))


@pytest.mark.parametrize("stacked", [True, False])
def test_own_functions_are_part_of_the_pullback(stacked):
    torch.manual_seed(0)
    blocks = [Function(D, D) for _ in range(L)]
    expected = gradients(nn.Sequential(*blocks).double())
    for make in (sequential, converted):
        model = make(blocks, L, stacked)
        close(gradients(model), expected)
        if make is converted:
            hb.revert(model)
    assert Reversed.seen


class Pretending(nn.Linear):
    """A layer with equal states and other derivatives than its parameters tell."""

    def __init__(self, factor: float) -> None:
        super().__init__(D, D)
        self.factor = [factor]

    def forward(self, x: Any) -> Any:
        inner = super().forward(x)
        return x + inner.detach() + self.factor[0] * (inner - inner.detach())


def test_batched_pullbacks_are_proved_not_only_the_states():
    torch.manual_seed(0)
    blocks = [Pretending(1.0 + i) for i in range(L)]
    expected = gradients(nn.Sequential(*blocks).double())
    model = sequential(blocks, L, True)
    with pytest.raises(RuntimeError, match="all at once they have other gradients"):
        gradients(model)
    model.stacked = None
    close(gradients(model), expected)


class Faint(nn.Linear):
    """A layer one of whose parameters moves the state by little, and by how much its parameters do not tell."""

    def __init__(self, factor: float) -> None:
        super().__init__(D, D)
        self.shift, self.factor = nn.Parameter(torch.zeros(D)), [factor]

    def forward(self, x: Any) -> Any:
        return x + super().forward(x).tanh() + self.factor[0] * self.shift


@pytest.mark.parametrize(("size", "proved"), [(3e-16, True), (1e-13, False)])
def test_a_whole_gradient_as_small_as_rounding_does_not_speak_against_all_at_once(size, proved):
    """One is well below what counts as rounding of the largest gradient, the other well above."""
    torch.manual_seed(0)
    model = sequential([Faint(size * (1 + i)) for i in range(L)], L, True)
    with nullcontext() if proved else pytest.raises(RuntimeError, match="all at once they have other gradients"):
        gradients(model)
    assert not proved or paths(model) == ["stacked"]


def test_each_layer_is_proved_whichever_run_it_stands_in():
    torch.manual_seed(0)
    blocks = [*(Pretending(1.0) for _ in range(3)), *(Pretending(2.0) for _ in range(3))]
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    rows = hb.convert(nn.ModuleList(blocks).double(), 3, stacked=True)
    for part in (rows[:3], rows[1:3], rows[3:]):
        state = x
        for block in part:
            state = block(state)
        state.sum().backward()
    state = x
    for block in rows[1:4]:
        state = block(state)
    with pytest.raises(RuntimeError, match="all at once they have other gradients"):
        state.sum().backward()


def test_a_layer_compiled_inside_is_no_hook():
    blocks = layers()
    expected = gradients(nn.Sequential(*blocks).double())
    for block in blocks:
        block.linear = torch.compile(block.linear, backend="aot_eager")
    close(gradients(sequential(blocks, L)), expected)


def test_stacks_inside_stacks():
    torch.manual_seed(0)
    blocks = [hb.Residual(hb.Sequential(*(hb.Residual(nn.Linear(D, D)) for _ in range(3)))) for _ in range(3)]
    expected = gradients(nn.Sequential(*blocks).double())
    model = sequential(blocks, 3)
    hb.set_iterations(model, 3)
    close(gradients(model), expected)


WRITES = {
    "add": lambda y: y.add_(1),
    "multiply": lambda y: y.mul_(2),
    "rectify": lambda y: y.relu_(),
    "slice": lambda y: y[:, 0].add_(1),
    "assign": lambda y: y.__setitem__((slice(None), 1), 0.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("stacked", [None, False])
@pytest.mark.parametrize("place", [1, L - 1])
def test_results_may_be_written_into(write, stacked, place):
    def through(blocks: Any) -> Any:
        torch.manual_seed(1)
        x = state = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        for i, block in enumerate(blocks):
            state = block(state)
            if i == place:
                WRITES[write](state)
        return [state.detach(), *torch.autograd.grad(state.cos().sum(), [x, *blocks.parameters()])]

    blocks = nn.ModuleList(layers()).double()
    expected = through(blocks)
    hb.convert(blocks, L, stacked=stacked)
    # Between layers a write breaks the run.
    with pytest.warns(UserWarning, match="the model changes it") if place == 1 else nullcontext():
        close(through(blocks), expected)


@pytest.mark.parametrize("write", WRITES)
def test_results_of_a_container_may_be_written_into(write):
    def through(model: Any) -> Any:
        torch.manual_seed(1)
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        y = model(x)
        WRITES[write](y)
        return torch.autograd.grad(y.cos().sum(), [x, *model.parameters()])

    blocks = layers()
    close(through(sequential(blocks, L)), through(nn.Sequential(*blocks)))


def test_a_write_into_a_result_does_not_change_the_input_that_a_layer_handed_on():
    x = torch.ones(3, D, requires_grad=True)
    stem = x + 1
    y = hb.Sequential(nn.Identity(), nn.Flatten(), iterations=2)(stem)
    y.mul_(3)
    assert stem.eq(2).all()
    (y.sum() + stem.square().sum()).backward()
    assert x.grad.eq(3 + 4).all()


@pytest.mark.parametrize("stacked", [None, False])
def test_writes_into_what_a_graph_needs_are_refused_as_by_torch(stacked):
    model = hb.Sequential(*(nn.Tanh() for _ in range(3)), iterations=3, stacked=stacked)
    for net in (nn.Sequential(*model), model):
        y = net(torch.randn(3, D, requires_grad=True))
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Shift(nn.Module):
    """A layer that needs no state for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(D))

    def forward(self, x: Any) -> Any:
        return x + self.shift


def test_states_may_be_written_into_where_no_layer_needs_them():
    blocks = nn.ModuleList(Shift() for _ in range(4))
    hb.convert(blocks, 4)
    states = [torch.randn(3, D, requires_grad=True)]
    for block in blocks:
        states.append(block(states[-1]))
    states[2].mul_(3)
    (states[2].sum() + states[-1].sum()).backward()
    assert torch.equal(states[0].grad, torch.full((3, D), 4.0))
    assert torch.equal(blocks[0].shift.grad, torch.full((D,), 12.0))
    assert torch.equal(blocks[3].shift.grad, torch.full((D,), 3.0))


@pytest.mark.parametrize("stacked", [True, False])
def test_a_step_leaves_no_cycles(stacked):
    model = sequential(layers(), 2, stacked)
    left = []
    gc.disable()
    try:
        for _ in range(6):
            gradients(model)
            left.append(gc.collect())
    finally:
        gc.enable()
    assert min(left) == 0, left  # what tests before left behind in torch goes when it runs again, now and then


def test_copies_of_a_stack_that_has_run():
    model = converted(layers(), L)
    expected = gradients(model)
    close(gradients(copy.deepcopy(model)), expected)


@pytest.fixture
def mesh() -> Any:
    """A mesh of one process."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def sharded_gradients(model: Any) -> Any:
    torch.manual_seed(1)
    model(torch.randn(3, D, dtype=torch.float64)).cos().sum().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def test_fully_sharded_models_take_k_iterations_and_sharded_layers_say_that_they_do_not(mesh):
    shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    exact = sharded_gradients(nn.Sequential(*layers()).double())
    rough = sharded_gradients(converted(layers(), 1))
    assert (rough[0] - exact[0]).abs().max() > 1e-3 * exact[0].abs().max()
    close(sharded_gradients(shard(converted(layers(), 1), mesh=mesh)), rough)
    close(sharded_gradients(hb.convert(shard(nn.Sequential(*layers()).double(), mesh=mesh), 1)), rough)
    model = converted([shard(layer.double(), mesh=mesh) for layer in layers()], 1)
    with pytest.warns(UserWarning, match="fully_shard on a layer gathers its weights for its own backward only; shard"):
        close(sharded_gradients(shard(model, mesh=mesh)), exact)
    blocks = layers()
    shard(blocks[3].linear, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"layer 3, a Tapped, .* on linear \(by fully_shard: shard the whole model"):
        sharded_gradients(shard(converted(blocks, 1), mesh=mesh))


class Changing(nn.Module):
    """A layer whose value depends on something beside its parameters and its state."""

    scale = 1.0

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(D, D), nn.Dropout(p)

    def forward(self, x: Any) -> Any:
        return x + self.scale * self.dropout(torch.tanh(self.linear(x)))


def trained_in_evaluation(model: Any) -> None:
    model.eval()


def scaled(model: Any) -> None:
    for layer in model:
        layer.scale = 3.0


@pytest.mark.parametrize("change", [trained_in_evaluation, scaled])
def test_what_changes_between_forward_and_backward_does_not_reach_the_gradient(change):
    torch.manual_seed(0)
    model = hb.Sequential(*(Changing(0.5) for _ in range(L)), iterations=L).double().eval()
    gradients(model)
    assert model.path == "stacked"  # proved
    model.train()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    loss = model(x).cos().sum()
    change(model)
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    Changing.scale = 1.0
    for layer in model:
        layer.scale = 1.0
    model.train()
    model.iterations = None
    torch.manual_seed(1)
    close(found, torch.autograd.grad(model(x).cos().sum(), [x, *model.parameters()]))


def test_replicas_of_data_parallel_are_refused():
    model = sequential(layers(), 2)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"replicas of DataParallel .* use DistributedDataParallel"):
        replica(torch.ones(1, D, dtype=torch.float64))


def test_reports_and_a_watching_solver_are_both_told():
    seen: list[Any] = []
    model = hb.Sequential(*layers(), solver=hbp.Solver(2, watch=seen.append)).double()
    model.reports = []
    gradients(model)
    assert len(seen) == len(model.reports) == 1
    assert seen[0] is model.reports[0]
