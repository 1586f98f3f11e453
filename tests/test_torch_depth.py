"""hb.DepthParallel on several ranks against one process: every iterate of the chain of stages, exact at its end.

The functions whose first argument is a mesh run on the ranks (tests/ranks.py).
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from oracles import path_sum

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import hbp  # noqa: E402

D = 3
COUNTS = {1: (3,), 2: (2, 2), 3: (1, 3, 2), 4: (1, 2, 1, 2)}
EXCHANGES = ("AllGather", "HillisSteele", "Transpose")


def block() -> Any:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


class Dense(nn.Module):
    """``x A + tanh(x W)``, whose residual map is A."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(D, D) / 3, requires_grad=False)
        self.w = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Any) -> Any:
        return x @ self.a + torch.tanh(x @ self.w)

    def residual_map(self, x: Any, y: Any) -> Any:
        return hbp.Dense(self.a.T.detach())


class Directed(Dense):
    """The same, whose residual map is of rank 1."""

    def residual_map(self, x: Any, y: Any) -> Any:
        return hbp.LowRank(self.a.T[:, :1], self.a.T[:1])


def directions(shared: bool) -> Any:
    """Six maps with a strong direction each, or one for all."""
    left, right, path = (
        torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    if shared:
        return hbp.Scalar(0.8) + hbp.LowRank(left[:1, :, None] / 2, right[:1, None])
    return hbp.Diagonal(path / 2) + hbp.LowRank(left[..., None] / 2, right[:, None])


STACKS = {
    "identity": (lambda i: hb.Residual(block()), {}),
    "rectified": (lambda i: hb.Residual(block(), torch.relu), {}),
    "post-norm": (lambda i: hb.PostNorm(block(), nn.LayerNorm(D)), {}),
    "damped": (lambda i: hb.Residual(block()), {"damping": 0.3}),
    "each damped its own way": (lambda i: hb.Residual(block()), {"damping": (0.1, 0.5, -0.2, 0.3, 0.0, 0.7)}),
    "numbers": (lambda i: hb.Residual(block()), {"residual": hbp.Scalar(0.8)}),
    "none": (lambda i: hb.Residual(block()), {"residual": hbp.Zero()}),
    "dense": (lambda i: Dense(), {}),
    "kinds that differ from rank to rank": (lambda i: hb.Residual(block(), torch.relu if i == 1 else None), {}),
    "strong directions": (lambda i: hb.Residual(block()), {"residual": directions(shared=False)}),
    "the same directions": (lambda i: hb.Residual(block()), {"residual": directions(shared=True), "damping": 0.3}),
    "directions on one rank": (lambda i: Directed() if i == 1 else hb.Residual(block(), torch.relu), {}),
    "three kinds": (lambda i: Dense() if i == 2 else hb.Residual(block(), torch.relu if i == 1 else None), {}),
}


def model(name: str, layers: int) -> tuple[list[Any], dict[str, Any]]:
    torch.manual_seed(1)
    make, options = STACKS[name]
    found = [make(i).double() for i in range(layers)]
    with torch.no_grad():
        for layer in found:
            for p in layer.parameters():
                p.mul_(1.5)
    return found, options


def inputs() -> Any:
    return torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def own(counts: Any, here: int) -> slice:
    bounds = [0, *accumulate(counts)]
    return slice(bounds[here], bounds[here + 1])


def piece(name: str, counts: Any, mesh: Any, **keywords: Any) -> Any:
    """A rank's DepthParallel."""
    layers, options = model(name, sum(counts))
    place = own(counts, mesh.get_local_rank())
    cut = {key: value if isinstance(value, float) else value[place] for key, value in options.items()}
    return hb.DepthParallel(*layers[place], mesh=mesh, **cut, **keywords)


def numpy(tensors: Any) -> list[Any]:
    return [None if t is None else t.detach().numpy().copy() for t in tensors]


def gradients_on(mesh: Any, name: str, counts: Any, settings: Any) -> list[Any]:
    """Per setting: this rank's parameters' gradients, that of x, and the value."""
    found = []
    warnings.simplefilter("ignore", hbp.DivergenceWarning)  # where a tolerance of 0 is given, which nothing meets
    for keywords in settings:
        stack = piece(name, counts, mesh, **keywords)
        x = inputs().requires_grad_()
        y = stack(x)
        torch.cos(y).sum().backward()
        found.append((numpy(p.grad for p in stack.parameters() if p.requires_grad), *numpy((x.grad, y))))
    return found


def jacobian(f: Any, x: Any) -> np.ndarray:
    found = torch.autograd.functional.jacobian(f, x.detach())
    return found.reshape(x.numel(), x.numel()).numpy()


def expected(name: str, counts: Any, k: int, sources: Any = None) -> tuple[list[list[Any]], Any]:
    """Iterate k by its definition: path sums over the stages' explicit Jacobians, then each stage's own backprop.

    Per rank the parameters' gradients, and that of x.
    """
    layers, options = model(name, sum(counts))
    states, maps = [inputs()], []
    for i, layer in enumerate(layers):
        states.append(layer(states[-1]).detach())
        one = layer.residual_map(states[i], states[i + 1])
        if "residual" in options:
            one = options["residual"][i]
        gamma = options.get("damping", 0)
        one = one.scaled(1 - (gamma[i] if isinstance(gamma, tuple) else gamma)) if gamma else one
        n = states[0].numel()
        maps.append(jacobian(lambda v, one=one: one.mv(v), states[0]) if n else None)
    places = [own(counts, rank) for rank in range(len(counts))]
    R, B = [], []
    for place in places:
        R.append(np.linalg.multi_dot([np.eye(len(maps[0])), *maps[place][::-1], np.eye(len(maps[0]))]))
        B.append(jacobian(nn.Sequential(*layers[place]), states[place.start]) - R[-1])
    y = states[-1].clone().requires_grad_()
    (last,) = torch.autograd.grad(torch.cos(y).sum(), y)
    c = np.zeros((len(counts) + 1, last.numel()))
    c[-1] = last.reshape(-1)
    if sources is not None:  # one per layer, at the state after it; inside stages they are pulled back exactly
        for rank, place in enumerate(places):
            start = states[place.start].clone().requires_grad_()
            total, x = 0, start
            for i in range(place.start, place.stop):
                x = layers[i](x)
                total = total + (x * sources[i]).sum() * (i < place.stop - 1)
                if i == place.stop - 1:
                    c[rank + 1] += sources[i].reshape(-1).numpy()
            if isinstance(total, torch.Tensor) and total.requires_grad:
                c[rank] += torch.autograd.grad(total, start)[0].reshape(-1).numpy()
    g = path_sum(np.stack(R), np.stack(B), c, k)
    found = []
    for rank, place in enumerate(places):
        x = states[place.start].clone()
        loss: Any = 0
        for i in range(place.start, place.stop):
            x = layers[i](x)
            if sources is not None and i < place.stop - 1:
                loss = loss + (x * sources[i]).sum()
        loss = loss + (x * torch.from_numpy(g[rank + 1]).reshape(x.shape)).sum()
        wanted = [p for layer in layers[place] for p in layer.parameters() if p.requires_grad]
        found.append(numpy(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)))
    return found, g[0].reshape(inputs().shape)


def close(found: Any, reference: Any, tolerance: float = 1e-12) -> None:
    assert len(found) == len(reference)
    largest = max(abs(r).max() for r in reference)
    for ours, theirs in zip(found, reference, strict=True):
        assert abs(ours - theirs).max() <= tolerance * largest


@pytest.mark.parametrize("name", STACKS)
def test_every_iterate_is_that_of_the_chain_of_stages(ranks, name):
    for count, counts in COUNTS.items():
        ks = range(count + 1) if count == 3 else (1, count - 1)
        ways = EXCHANGES[:1] if "directions" in name else EXCHANGES  # no way but the first takes those
        settings = [{"iterations": k, "exchange": getattr(hb, ways[(k + count) % len(ways)])()} for k in ks]
        answers = ranks(gradients_on, name, counts, settings, ranks=count)
        for i, k in enumerate(ks):
            weights, dx = expected(name, counts, k)
            for rank in range(count):
                close(answers[rank][i][0], weights[rank])
                close([answers[rank][i][1]], [dx])
                assert (answers[rank][i][1] == answers[0][i][1]).all()
                assert (answers[rank][i][2] == answers[0][i][2]).all()


def test_all_exchanges_have_the_same_numbers_and_whole_pieces_are_exact_from_one_less_than_there_are_ranks(ranks):
    for count, counts in COUNTS.items():
        settings = [{"iterations": count - 1, "exchange": getattr(hb, name)()} for name in EXCHANGES]
        settings += [{"iterations": count}, {"iterations": None}, {"iterations": count + 5, "tolerance": 0.0}]
        for name in ("dense", "rectified"):
            layers, _ = model(name, sum(counts))
            x = inputs().requires_grad_()
            y = nn.Sequential(*layers)(x)
            torch.cos(y).sum().backward()
            answers = ranks(gradients_on, name, counts, settings, ranks=count)
            for rank, answer in enumerate(answers):
                parameters = [p for layer in layers[own(counts, rank)] for p in layer.parameters()]
                exact = numpy(p.grad for p in parameters if p.requires_grad)
                for i, (weights, dx, value) in enumerate(answer):
                    close(weights, exact)
                    close([value], numpy([y]))
                    if i >= len(EXCHANGES):
                        close([dx], numpy([x.grad]))
                assert abs(answer[0][1] - x.grad.numpy()).max() > 1e-6  # one more round, for the block of stage 0


def parts_on(mesh: Any) -> list[str]:
    found = []
    for name in EXCHANGES:
        stack = piece("strong directions", COUNTS[3], mesh, iterations=1, exchange=getattr(hb, name)())
        with pytest.raises(TypeError) if name != "AllGather" else nullcontext() as caught:
            stack(inputs()).sum().backward()
        found.append(str(caught and caught.value))
    return found


def test_strong_directions_are_sent_whole(ranks):
    told = [f"{name}() cannot send parts of a LowRank residual; give exchange=hb.AllGather()" for name in EXCHANGES]
    assert ranks(parts_on, ranks=3) == [["None", *told[1:]]] * 3


def states_on(mesh: Any, k: Any) -> list[Any]:
    """With losses on this rank's own states beside the common one."""
    counts = COUNTS[3]
    stack = piece("rectified", counts, mesh, iterations=k, exchange=hb.HillisSteele())
    x, sources = inputs().requires_grad_(), cotangents(sum(counts))
    y, states = stack.states(x)
    own_sources = sources[own(counts, mesh.get_local_rank())]
    loss = torch.cos(y).sum() + sum((state * c).sum() for state, c in zip(states, own_sources, strict=True))
    loss.backward()
    return [numpy(p.grad for p in stack.parameters()), x.grad.numpy()]


def cotangents(layers: int) -> Any:
    return torch.randn(layers, *inputs().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("k", [0, 1, 2, None])
def test_losses_on_states_enter_where_they_are(ranks, k):
    for rank, (weights, dx) in enumerate(ranks(states_on, k, ranks=3)):
        reference, first = expected("rectified", COUNTS[3], 9 if k is None else k, cotangents(6))
        close(weights, reference[rank])
        close([dx], [first])


def test_pieces_are_cut_into_chunks(ranks):
    stages, counts = (2, 1, 1, 2), (3, 1, 2)
    settings = [{"iterations": k, "chunk": 2} for k in range(5)]
    answers = ranks(gradients_on, "post-norm", counts, settings, ranks=3)
    for k in range(5):
        weights, dx = expected("post-norm", stages, k)
        for answer, reference in zip(answers, (weights[0] + weights[1], weights[2], weights[3]), strict=True):
            close(answer[k][0], reference)
            close([answer[k][1]], [dx])


def stopped_on(mesh: Any, tolerance: float) -> Any:
    stack = piece("identity", COUNTS[4], mesh, tolerance=tolerance)
    stack.reports = []
    torch.cos(stack(inputs())).sum().backward()
    return stack.reports[0], numpy(p.grad for p in stack.parameters())


def test_all_ranks_stop_at_the_same_round(ranks):
    answers = ranks(stopped_on, 0.5)
    report = answers[0][0]
    rounds = len(report.sizes) - 1
    assert 0 < rounds < 4
    assert report.shares[-1] <= 0.5 < report.shares[-2]
    assert all(answer[0] == report for answer in answers)
    weights, _ = expected("identity", COUNTS[4], rounds)
    for answer, reference in zip(answers, weights, strict=True):
        close(answer[1], reference)


class Counted:
    """What is called of torch.distributed, with the bytes of each call, and how often graphs are walked."""

    NAMES = ("all_gather", "all_to_all_single", "batch_isend_irecv", "send", "recv", "broadcast", "all_reduce")

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Any:
        self.kept = {name: getattr(dist, name) for name in self.NAMES}
        self.grad = torch.autograd.grad
        for name in self.NAMES:
            setattr(dist, name, self._wrapped(name))
        torch.autograd.grad = self._walked
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)
        torch.autograd.grad = self.grad

    def _walked(self, ends: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("pullback", len(ends)))
        return self.grad(ends, *args, **kwargs)

    def _wrapped(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sizes = [move.tensor.nbytes for move in args[0] if move.op is dist.isend]
            else:
                sizes = [args[1 if name.startswith("all_") and name != "all_reduce" else 0].nbytes]
            self.calls.append((name, sum(sizes)))
            return self.kept[name](*args, **kwargs)

        return call


def counted_on(mesh: Any, k: Any, exchange: Any, name: str) -> Any:
    stack = piece(name, COUNTS[4], mesh, iterations=k, exchange=exchange)
    x = inputs().requires_grad_()
    loss = torch.cos(stack(x)).sum()
    with Counted() as counted:
        loss.backward()
    return counted.calls


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_backward_pass_is_one_more_pullback_and_exchange_than_rounds_and_sends_states_only(ranks, k):
    state = inputs().nbytes
    for told in ranks(counted_on, k, hb.AllGather(), "identity"):
        assert [n for name, n in told if name == "pullback"] == [1] * (k + 1)
        assert Counter(told)["all_gather", state] == k + 1
        assert Counter(told)["broadcast", state] == 1  # the gradient of x
        rest = [call for call in told if call[0] != "pullback" and call[1] >= state]
        assert len(rest) == k + 2  # and a few numbers beside
    slices = -(-inputs().numel() // 4) * 4 * 8
    for told in ranks(counted_on, k, hb.Transpose(), "rectified"):  # twice a round, and once the maps
        assert [n for name, n in told if name == "all_to_all_single"] == [slices] * (2 * k + 3)
    for rank, told in enumerate(ranks(counted_on, k, hb.HillisSteele(), "rectified")):
        one, two = state * (rank >= 1), state * (rank >= 2)  # 1 and 2 ranks back, and once the maps, 1 back
        assert [n for name, n in told if name == "batch_isend_irecv"] == [one, *[one, two] * (k + 1)]


def test_exact_takes_turns(ranks):
    state = inputs().nbytes
    for rank, told in enumerate(ranks(counted_on, None, None, "rectified")):
        turn = [("recv", state)] * (rank < 3) + [("send", state)] * (rank > 0)
        assert [call for call in told if call[1] >= state] == [*turn, ("broadcast", state)]


def last_on(mesh: Any, k: Any) -> Any:
    stack = piece("rectified", COUNTS[3], mesh, iterations=k, last_only=True)
    x = inputs().requires_grad_()
    y = stack(x)
    (torch.cos(y) if mesh.get_local_rank() == 2 else y).sum().backward()
    return numpy(p.grad for p in stack.parameters()), *numpy((x.grad, y))


@pytest.mark.parametrize("k", [1, None])
def test_the_last_state_may_stay_on_the_last_rank(ranks, k):
    weights, dx = expected("rectified", COUNTS[3], 9 if k is None else k)
    for rank, (found, first, y) in enumerate(ranks(last_on, k, ranks=3)):
        close(found, weights[rank])
        close([first], [dx])
        assert y.any() == (rank == 2)


class Biased(nn.Module):
    """A block with a bias and a mask given to all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Any, bias: Any, mask: Any = None) -> Any:
        return x + torch.tanh(self.linear(x) + bias[0]) * mask


def biased(place: slice) -> tuple[list[Any], Any, Any]:
    torch.manual_seed(3)
    layers = [Biased().double() for _ in range(4)]
    return layers[place], torch.randn(D, dtype=torch.float64).requires_grad_(), torch.rand(D, dtype=torch.float64)


def shared_on(mesh: Any, k: Any) -> Any:
    layers, bias, mask = biased(own((1, 2, 1), mesh.get_local_rank()))
    stack = hb.DepthParallel(*layers, mesh=mesh, iterations=k)
    x = inputs()  # needs no gradient
    torch.cos(stack(x, [bias], mask=mask)).sum().backward()
    return [bias.grad.numpy(), *numpy(p.grad for p in stack.parameters())]


@pytest.mark.parametrize("k", [2, None])
def test_what_all_layers_share_gets_the_sum_of_all_ranks(ranks, k):
    layers, bias, mask = biased(slice(None))
    x = inputs()
    for layer in layers:
        x = layer(x, [bias], mask)
    torch.cos(x).sum().backward()
    answers = ranks(shared_on, k, ranks=3)
    for rank, answer in enumerate(answers):
        own_layers = layers[own((1, 2, 1), rank)]
        close(answer, [bias.grad.numpy(), *numpy(p.grad for layer in own_layers for p in layer.parameters())])
        assert (answer[0] == answers[0][0]).all()


def embedded_on(mesh: Any, k: Any, frozen: int) -> Any:
    """A common embedding and head, with two passes whose gradients add up, and a rank whose layers are frozen."""
    torch.manual_seed(4)
    embedding, head = nn.Linear(D, D).double(), nn.Linear(D, 2).double()
    common = [*embedding.parameters(), *head.parameters()]
    stack = piece("rectified", COUNTS[3], mesh, iterations=k)
    stack.requires_grad_(mesh.get_local_rank() != frozen)
    for x in inputs():
        head(stack(embedding(x))).square().mean().backward()
    with torch.no_grad():
        value = stack(embedding(inputs()))
    return numpy(p.grad for p in common), numpy(p.grad for p in stack.parameters()), value.numpy()


@pytest.mark.parametrize("k", [3, None])
def test_common_parts_get_equal_gradients_over_several_passes(ranks, k):
    torch.manual_seed(4)
    embedding, head = nn.Linear(D, D).double(), nn.Linear(D, 2).double()
    common = [*embedding.parameters(), *head.parameters()]
    layers, _ = model("rectified", 6)
    for x in inputs():
        head(nn.Sequential(*layers)(embedding(x))).square().mean().backward()
    answers = ranks(embedded_on, k, 1, ranks=3)
    for rank, (shared, weights, value) in enumerate(answers):
        close(shared, numpy(p.grad for p in common))
        assert all((a == b).all() for a, b in zip(shared, answers[0][0], strict=True))
        close([value], numpy([nn.Sequential(*layers)(embedding(inputs()))]))
        if rank == 1:
            assert weights == [None] * len(weights)
        else:
            close(weights, numpy(p.grad for layer in layers[own(COUNTS[3], rank)] for p in layer.parameters()))


def random_on(mesh: Any, k: Any, counts: Any) -> Any:
    torch.manual_seed(1)
    layers = [hb.Residual(nn.Sequential(block(), nn.Dropout(0.5))).double() for _ in range(4)]
    here = own(counts, mesh.get_local_rank())
    stack = hb.DepthParallel(*layers[here], mesh=mesh, iterations=k)
    torch.manual_seed(7)
    y = stack(inputs())
    torch.cos(y).sum().backward()
    return y.detach().numpy(), {name: p.grad.numpy() for name, p in stack.named_parameters()}, torch.rand(1).item()


def test_dropout_draws_by_layer_however_many_ranks_there_are(ranks):
    (value, weights, after), *_ = ranks(random_on, None, (4,), ranks=1)
    for k in (3, None):
        answers = ranks(random_on, k, (1, 2, 1), ranks=3)
        found: dict[str, Any] = {}
        for y, own_weights, following in answers:
            close([y], [value])
            assert following == after
            found |= own_weights
        assert found.keys() == weights.keys()
        close([found[name] for name in weights], list(weights.values()))


def queued_on(mesh: Any) -> list[int]:
    stack = hb.DepthParallel(hb.Residual(nn.Dropout(0.5)), mesh=mesh)
    found = []
    for _ in range(3):
        stack(inputs())
        found.append(len(torch.cuda._queued_calls))
    return found


def test_random_numbers_leave_nothing_behind_for_devices_that_are_not_there(ranks):
    """`torch.manual_seed` queues a call, with its traceback, for each kind of device, where none is."""
    if torch.cuda.is_available():
        pytest.skip("calls are not queued: there is a device")
    for found in ranks(queued_on, ranks=2):
        assert len(set(found)) == 1


def tied_on(mesh: Any) -> Any:
    layers, _ = model("identity", 5)
    layers[1] = layers[0]
    stack = hb.DepthParallel(*layers[own((3, 2), mesh.get_local_rank())], mesh=mesh, iterations=1)
    torch.cos(stack(inputs())).sum().backward()
    return numpy(p.grad for p in stack.parameters())


def test_layers_of_one_rank_may_have_parameters_in_common(ranks):
    layers, _ = model("identity", 5)
    layers[1] = layers[0]
    torch.cos(nn.Sequential(*layers)(inputs())).sum().backward()
    for rank, found in enumerate(ranks(tied_on, ranks=2)):
        close(found, numpy(p.grad for p in nn.Sequential(*layers[own((3, 2), rank)]).parameters()))


def again(stack: Any, x: Any) -> None:
    """Checkpointed as a whole, and its result written into."""
    y = checkpoint(stack, x, use_reentrant=False)
    torch.cos(y.mul_(2)).sum().backward()


def again_on(mesh: Any, k: Any) -> Any:
    stack = piece("rectified", (1, 2), mesh, iterations=k)
    again(stack, inputs())
    return numpy(p.grad for p in stack.parameters())


@pytest.mark.parametrize("k", [1, None])
def test_a_stack_may_be_checkpointed_and_its_result_written_into(ranks, k):
    layers, _ = model("rectified", 3)
    again(nn.Sequential(*layers), inputs())
    for rank, found in enumerate(ranks(again_on, k, ranks=2)):
        close(found, numpy(p.grad for layer in layers[own((1, 2), rank)] for p in layer.parameters()))
