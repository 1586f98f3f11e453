"""What goes wrong on one rank is told on all: before anything can hang, or instead of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
from ranks import Pool, RanksError, square  # noqa: E402
from test_torch_depth import COUNTS, D, block, inputs, own, piece  # noqa: E402
from torch import nn  # noqa: E402

HERE = COUNTS[3]


def changed_stack(kind: str, odd: bool, stack: Any) -> None:
    """Make one rank's stack differ from the others'."""
    if not odd:
        return
    if kind == "iterations":
        hb.set_iterations(stack, 3)
    elif kind == "tolerance":
        stack.tolerance = 0.1
    elif kind == "exact":
        stack.iterations = None
    elif kind == "exchange":
        stack.exchange = hb.Transpose()
    elif kind == "evaluated":
        stack.eval()
    elif kind == "longer":
        stack.add_module("7", nn.Linear(D, D))
    elif kind == "elsewhere":
        stack.to("meta")


DIFFERENT = {
    "iterations": "on a call of the stack: iterations is 2 on rank 0 and 2, 3 on rank 1; give all ranks the same",
    "tolerance": "tolerance is None on rank 0 and 2, 0.1 on rank 1",
    "exact": "iterations is 2 on rank 0 and 2, None on rank 1",
    "exchange": "exchange is None on rank 0 and 2, Transpose() on rank 1",
    "evaluated": "training is True on rank 0 and 2, False on rank 1",
    "longer": "rank 1: has 4 layers and had 3 when the stack was built; build it anew",
    "elsewhere": "rank 1: layer 1 is on meta and the state on cpu; move one of them",
    "batch": "the state is '(2, 5, 3) torch.float64' on rank 0 and 2, '(1, 5, 3) torch.float64' on rank 1",
    "precision": "the state is '(2, 5, 3) torch.float64' on rank 0 and 2, '(2, 5, 3) torch.float32' on rank 1",
    "no gradients": "torch.is_grad_enabled() is True on rank 0 and 2, False on rank 1",
    "no tensor": "rank 1: the state is a NoneType, no real floating point tensor",
    "integers": "rank 1: the state is of torch.int64, no real floating point tensor",
}


def different_on(mesh: Any) -> dict[str, str]:
    found = {}
    for kind in DIFFERENT:
        odd, x = mesh.get_local_rank() == 1, inputs()
        stack = piece("identity", HERE, mesh, iterations=2)
        changed_stack(kind, odd, stack)
        if odd:
            x = {"batch": x[:1], "precision": x.float(), "no tensor": None, "integers": x.long()}.get(kind, x)
        with (
            pytest.raises(ValueError, match=r"\w") as caught,
            torch.set_grad_enabled(not odd or kind != "no gradients"),
        ):
            stack(x)
        found[kind] = str(caught.value)
    return found


def test_ranks_that_differ_say_so_on_all_ranks(ranks):
    answers = ranks(different_on, ranks=3)
    assert answers[1] == answers[2] == answers[0]
    for kind, told in answers[0].items():
        assert DIFFERENT[kind] in told


def apart_on(mesh: Any) -> list[str]:
    """One rank calls the stack again where the others go back, and goes back through another call than they."""
    first = mesh.get_local_rank() == 0
    stack, found = piece("identity", HERE, mesh, iterations=2), []
    losses = [stack(inputs()).sum() for _ in range(2)]
    for ours, theirs in ((lambda: stack(inputs()), losses[0].backward), (losses[1].backward, losses[0].backward)):
        with pytest.raises(ValueError, match=r"\w") as caught:
            (ours if first else theirs)()
        found.append(str(caught.value))
        losses = [stack(inputs()).sum() for _ in range(2)]
    return found


def test_ranks_at_different_points_say_so(ranks):
    for calls, passes in ranks(apart_on, ranks=3):
        expected = (
            "a call of the stack on rank 0, the backward pass on rank 1 and 2; every rank must make the same calls"
        )
        assert calls == f"the ranks are not at the same point: {expected}"
        assert "the backward pass: the call is 2 on rank 0, 1 on rank 1 and 2" in passes


def asked_on(mesh: Any) -> str:
    """The gradients of the parameters alone, where ranks take turns; then those of x too."""
    stack = piece("identity", HERE, mesh)
    wanted = list(stack.parameters())
    with pytest.raises(ValueError, match=r"\w") as caught:
        torch.autograd.grad(stack(inputs()).sum(), wanted)
    x = inputs().requires_grad_()
    assert all(g is not None for g in torch.autograd.grad(stack(x).sum(), [x, *wanted]))
    return str(caught.value)


def test_gradients_that_would_leave_the_ranks_before_waiting_are_refused(ranks):
    answers = ranks(asked_on, ranks=3)
    assert len(set(answers)) == 1
    assert answers[0].startswith("rank 1 and 2: with iterations=None the ranks before wait for the gradient of")


def built_on(mesh: Any) -> None:
    layers = [hb.Residual(block()) for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"mesh has the axes data, depth; give the one along depth, as mesh\['depth'\]"
    ):
        hb.DepthParallel(*layers, mesh=square())
    with pytest.raises(TypeError, match=r"mesh is a int; give a torch.distributed DeviceMesh of one axis"):
        hb.DepthParallel(*layers, mesh=4)
    with pytest.raises(
        ValueError, match=r"^rank 2: has no layers; give each rank at least one, or use a smaller mesh$"
    ):
        hb.DepthParallel(*layers[: mesh.get_local_rank() != 2], mesh=mesh)
    with pytest.raises(ValueError, match=r"^rank 0 and 2: has no layers; give each rank at least one"):
        hb.convert(nn.Sequential(*layers), mesh=mesh)
    with pytest.raises(TypeError, match=r"layer 0 is a int; give torch.nn.Modules"):
        hb.DepthParallel(3, mesh=mesh)
    with pytest.raises(TypeError, match=r"exchange is a str; give hb\.AllGather\(\), hb\.HillisSteele\(\)"):
        hb.DepthParallel(*layers, mesh=mesh, exchange="all-gather")
    with pytest.raises(TypeError, match="abstract class Exchange"):
        hb.AllGather.__base__()
    with pytest.raises(ValueError, match=r"chunk=0 is too small; give an integer of at least 1"):
        hb.DepthParallel(*layers, mesh=mesh, chunk=0)
    with pytest.raises(TypeError, match=r"last_only=1; give True or False"):
        hb.DepthParallel(*layers, mesh=mesh, last_only=1)
    with pytest.raises(ValueError, match=r"stacks names 2 lists; over several ranks one stack is converted"):
        hb.convert(nn.ModuleDict({n: nn.Sequential(*layers) for n in "ab"}), stacks=["a", "b"], mesh=mesh)
    with pytest.raises(ValueError, match=r"stacked=True is given beside a mesh"):
        hb.convert(nn.Sequential(*layers), stacked=True, mesh=mesh)
    with pytest.raises(ValueError, match=r"exchange=AllGather.. is given without a mesh"):
        hb.convert(nn.Sequential(*layers), exchange=hb.AllGather())
    with pytest.raises(ValueError, match=r"no stack of this Sequential lies on several ranks; use torch.nn.utils' own"):
        hb.clip_grad_norm_(nn.Sequential(hb.Sequential(*layers)), 1.0)
    stack = hb.DepthParallel(*layers, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"the layers lie on several ranks, .*; measure the whole model on one process"
    ):
        hb.diagnose(stack, lambda stack, x: stack(x).sum(), inputs().float())
    with pytest.raises(ValueError, match=r"the layers lie on several ranks"):
        hb.estimate_damping(stack, inputs().float())
    with pytest.raises(ValueError, match=r"the layers lie on several ranks"):
        hb.plan(stack, lambda stack, x: stack(x).sum(), inputs().float())
    for sizes in ((-1.0,), (float("nan"),), (None,), ("much",), (1.0, "two"), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match=r"^(max_norm|norm_type)=.*; give a number (of at least|above) 0"):
            hb.clip_grad_norm_(stack, *sizes)
    with pytest.raises(TypeError, match=r"layers over several ranks cannot be pickled; save their state_dict"):
        stack.__reduce_ex__(2), torch.save(stack, os.devnull)


def test_bad_input_is_refused_when_the_stack_is_built(ranks):
    ranks(built_on)


def odd_on(mesh: Any) -> list[str]:
    """What one rank alone is given, or all of them, is refused on all."""
    found, layers, here = [], [hb.Residual(block()) for _ in range(3)], mesh.get_local_rank()
    for odd in (here == 1, True):
        own: Any = [3] if odd else layers[:1]
        for build in (
            lambda odd=odd: hb.DepthParallel(layers[here], mesh=mesh, exchange="x" if odd else None),
            lambda odd=odd: hb.DepthParallel(layers[here], mesh=mesh, damping=[0.1, 0.2] if odd else 0),
            lambda own=own: hb.DepthParallel(*own, mesh=mesh),
            lambda odd=odd: hb.convert(nn.Sequential(*layers), mesh=mesh, iterations=-1 if odd else 1),
            lambda odd=odd: hb.convert(nn.Sequential(*layers), mesh=mesh, stacks="x" if odd else None),
        ):
            with pytest.raises((TypeError, ValueError)) as caught:
                build()
            found.append(f"{caught.type.__name__}: {caught.value}")
    return found


def test_what_is_wrong_on_one_rank_is_told_on_all(ranks):
    told = [
        "TypeError: exchange is a str; give hb.AllGather(), hb.HillisSteele(), hb.Transpose() or None",
        "ValueError: damping has 2 entries and the stack 1 layers",
        "TypeError: layer 0 is a int; give torch.nn.Modules, as hbp's Residual",
        "ValueError: iterations=-1 is too small; give an integer of at least 0",
        "ValueError: stacks='x': ",
    ]
    for rank, found in enumerate(ranks(odd_on, ranks=3)):
        for one, everywhere, expected in zip(found[:5], found[5:], told, strict=True):
            kind, sentence = expected.split(": ", 1)
            assert everywhere.startswith(expected)
            assert one.startswith(f"{kind if rank == 1 else 'ValueError'}: rank 1: {sentence}")


def transformed_on(mesh: Any) -> list[str]:
    """Calls that something transforms; afterwards the ranks are together as before."""
    found, x = [], inputs()
    for k in (None, 1):
        stack = piece("identity", HERE, mesh, iterations=k)
        calls = (
            lambda stack=stack: torch.func.grad(lambda x: stack(x).sum())(x),
            lambda stack=stack: torch.vmap(stack)(x),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match=r"\w") as caught:
                call()
            found.append(str(caught.value))
        stack(x).sum().backward()
    return found


def test_a_transform_is_refused_before_a_rank_waits_for_another(ranks):
    said = "torch.func cannot follow a state from rank to rank; call a stack over several ranks without it"
    for told in ranks(transformed_on, ranks=3):
        assert told == [said] * 4


def hooked_on(mesh: Any) -> str:
    """One rank has a backward hook inside a layer, which exact backprop alone can do with."""
    stack = piece("identity", HERE, mesh, iterations=1)
    if mesh.get_local_rank() == 1:
        next(stack.children()).block[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"\w") as caught:
        stack(inputs())
    with torch.no_grad():
        stack(inputs())
    hb.set_iterations(stack, None)
    stack(inputs()).sum().backward()
    return str(caught.value)


def test_a_hook_inside_a_layer_is_told_on_all_ranks(ranks):
    for told in ranks(hooked_on, ranks=3):
        assert told.startswith("rank 1: layer 1, a Residual, sets backward hooks inside, on block.0; they would run")
        assert told.endswith("remove them, or set iterations=None")


class Failing(torch.autograd.Function):
    """The identity, whose pullback does something else."""

    @staticmethod
    def forward(ctx: Any, x: Any, pullback: Any) -> Any:
        ctx.pullback = pullback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return ctx.pullback(g), None


class Faulty(nn.Module):
    def __init__(self, pullback: Any) -> None:
        super().__init__()
        self.linear, self.pullback = nn.Linear(D, D), pullback

    def forward(self, x: Any) -> Any:
        return x + Failing.apply(torch.tanh(self.linear(x)), self.pullback)


def to_nan(g: Any) -> Any:
    return g * float("nan")


def nan_on(mesh: Any) -> Any:
    layers, _ = [hb.Residual(block()).double() for _ in range(2)], torch.manual_seed(1)
    if mesh.get_local_rank() == 1:
        layers[1] = Faulty(to_nan).double()
    stack = hb.DepthParallel(*layers, mesh=mesh, iterations=1)
    stack.reports = []
    stack(inputs()).sum().backward()
    with pytest.raises(RuntimeError, match=r"the norm of order 2.0 of all ranks' gradients is nan"):
        hb.clip_grad_norm_(stack, 1.0, error_if_nonfinite=True)
    own_finite = all(p.grad.isfinite().all() for p in stack.parameters())
    x = inputs()
    with torch.no_grad():
        x[0] = float("nan") if mesh.get_local_rank() == 0 else 0.0
        return own_finite, stack.reports[0].verdict, stack(x).isnan().any().item()


def test_a_nan_on_one_rank_is_seen_on_all(ranks):
    answers = ranks(nan_on, ranks=3)
    assert answers[2][0]  # its own gradients are fine
    for _, verdict, value in answers:
        assert verdict == "not finite: an increment holds NaN or infinity"
        assert value


def exit_now(g: Any) -> Any:
    os._exit(9)


def training_on(mesh: Any, folder: str, steps: int, resume: bool, dies: bool) -> list[float]:
    """Train, saving after each step; the rank that dies does so in a round of its third backward pass."""
    from torch.distributed import checkpoint

    torch.manual_seed(1)
    layers = [hb.Residual(block()).double() for _ in range(3)] + [Faulty(to_nan).double()]
    stack = hb.DepthParallel(*layers[own((2, 2), mesh.get_local_rank())], mesh=mesh, iterations=1)
    optimizer, losses = torch.optim.SGD(stack.parameters(), lr=0.1), []
    group = mesh.get_group()
    if resume:
        state = {"model": stack.state_dict(), "step": 0}
        last = max(path.parent for path in Path(folder).glob("*/.metadata"))
        checkpoint.load(state, checkpoint_id=last, process_group=group)
        stack.load_state_dict(state["model"])
        steps -= state["step"]
    for step in range(steps):
        layers[3].pullback = exit_now if dies and step == 2 else torch.clone
        loss = stack(inputs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not resume:
            state = {"model": stack.state_dict(), "step": step + 1}
            checkpoint.save(state, checkpoint_id=Path(folder, str(step)), process_group=group)
    return losses


def test_a_killed_rank_ends_the_others_and_training_resumes(ranks, tmp_path):
    pool, (plain, broken) = Pool(2), (str(tmp_path / name) for name in ("plain", "broken"))
    try:
        (survived, told), (lived, gone) = pool.outcomes(training_on, broken, 4, False, True, ranks=2)
    finally:
        pool.close()
    assert not survived
    assert "RuntimeError" in told
    assert "in backward" in told
    assert not lived
    assert "gone, exit code 9" in gone
    (expected, _) = ranks(training_on, plain, 4, False, False, ranks=2)
    (resumed, other) = ranks(training_on, broken, 4, True, False, ranks=2)
    assert resumed == other == expected[2:]


def late_on(mesh: Any) -> None:
    raise ArithmeticError("as asked")


def test_the_pool_tells_what_a_rank_raised(ranks):
    with pytest.raises(RanksError, match=r"rank 1: Traceback[^$]*ArithmeticError: as asked"):
        ranks.pool(late_on, ranks=2)
