"""hb.ScheduleHighway against ScheduleGPipe and against iterates of the chain of stages."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
from ranks import square  # noqa: E402
from test_torch_depth import close, jacobian, numpy  # noqa: E402
from torch import nn  # noqa: E402

import hbp  # noqa: E402

D, P = 3, 4


def stages(first: bool) -> list[Any]:
    """Four stages: an embedding stands in the first one, a head in the last."""
    torch.manual_seed(1)
    blocks = [hb.Residual(nn.Sequential(nn.Linear(D, D), nn.Tanh())) for _ in range(2 * P)]
    found = [nn.Sequential(*blocks[2 * i : 2 * i + 2]) for i in range(P)]
    if first:
        found[0] = nn.Sequential(nn.Embedding(7, D), *found[0])
        found[-1] = nn.Sequential(*found[-1], nn.Linear(D, 2), nn.Tanh())
    return [stage.double() for stage in found]


def batch(size: int = 4) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(7, (size, 5), generator=generator), torch.randn(size, 5, 2, generator=generator).double()


def loss_fn(y: Any, target: Any) -> Any:
    return (y - target).square().mean()


def scheduled_on(mesh: Any, microbatches: int, settings: Any, steps: int = 1) -> list[Any]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    here, found = mesh.get_local_rank(), []
    warnings.simplefilter("ignore", hbp.DivergenceWarning)  # where a tolerance of 0 is given, which nothing meets
    ids, target = batch(2 * microbatches)
    for keywords in settings:
        part = stages(first=True)[here]
        stage = PipelineStage(part, here, mesh.size(), torch.device("cpu"), group=mesh.get_group())
        kind = ScheduleGPipe if keywords is None else hb.ScheduleHighway
        schedule = kind(stage, microbatches, loss_fn, **(keywords or {}))
        for _ in range(steps):
            part.zero_grad()
            losses: list[Any] = []
            schedule.step(*[ids] * (here == 0), **{"target": target, "losses": losses} if stage.is_last else {})
        found.append((numpy(p.grad for p in part.parameters()), [loss.item() for loss in losses]))
    return found


def expected(k: int, residual: Any, size: int) -> list[list[Any]]:
    """Per stage the gradients from the iterate at its end: path sums over the two stages in the midst."""
    from oracles import path_sum

    parts, (ids, target) = stages(first=True), batch(size)
    states = [parts[0](ids)]
    for part in parts[1:-1]:
        states.append(part(states[-1]))
    last = states[-1].detach().requires_grad_()
    loss = loss_fn(parts[-1](last), target)
    (c,) = torch.autograd.grad(loss, last, retain_graph=True)
    n = c.numel()
    R = np.stack([jacobian(residual.mv, c)] * (P - 2))
    B = np.stack([jacobian(part, x) for part, x in zip(parts[1:-1], states, strict=False)]) - R
    g = path_sum(R, B, np.concatenate([np.zeros((P - 2, n)), c.reshape(1, -1).numpy()]), k)
    found = []
    for i, part in enumerate(parts[:-1]):
        x = part(ids if i == 0 else states[i - 1].detach())
        cotangent = torch.from_numpy(g[i]).reshape(x.shape)
        found.append(numpy(torch.autograd.grad(x, list(part.parameters()), cotangent)))
    return [*found, numpy(torch.autograd.grad(loss, list(parts[-1].parameters())))]


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_iterates_are_those_of_the_stages_between_and_the_last_is_gpipes(ranks, microbatches):
    left, right = torch.linspace(-1, 1, D).double(), torch.linspace(1, 0.5, D).double()
    along = hbp.Scalar(0.8) + hbp.LowRank(left[None, :, None], right[None, None])
    settings = [None, {"iterations": None}, {"iterations": P - 2}, {"iterations": P - 1, "exchange": hb.HillisSteele()}]
    settings += [{"iterations": 0}, {"iterations": 1, "exchange": hb.Transpose()}]
    settings += [{"iterations": 1, "residual": along}, {"iterations": 9, "tolerance": 0.0}]
    answers = ranks(scheduled_on, microbatches, settings)
    splits, size = ((0, hbp.Identity()), (1, hbp.Identity()), (1, along)), 2 * microbatches
    rough = [expected(k, residual, size) for k, residual in splits]
    for rank, ((gpipe, losses), *others) in enumerate(answers):
        for i, (gradients, values) in enumerate(others):
            close(gradients, rough[i - 3][rank] if 3 <= i < 6 else gpipe)
            assert values == losses
    assert len(losses) == microbatches


def test_a_schedule_of_rounds_counts_steps(ranks):
    settings = [None, {"iterations": hbp.Schedule({0: 0, 1: 1, 2: None})}]
    for steps, same in ((1, False), (2, False), (3, True)):
        for (gpipe, _), (gradients, _) in ranks(scheduled_on, 1, settings, steps)[:1]:
            assert all(np.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(gpipe, gradients, strict=True)) == same


def sharded_on(mesh: Any, k: Any) -> Any:
    """Two stages of two blocks and their ends, each sharded over two ranks; exact at any k."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage

    grid = square()
    here, half = grid.get_local_rank("depth"), grid.get_local_rank("data")
    parts = stages(first=True)
    part = nn.Sequential(*parts[2 * here : 2 * here + 2])
    fully_shard(part, mesh=grid["data"])
    stage = PipelineStage(part, here, 2, torch.device("cpu"), group=grid["depth"].get_group())
    ids, target = (t[2 * half : 2 * half + 2] for t in batch())
    schedule = hb.ScheduleHighway(stage, 2, loss_fn, iterations=k)
    schedule.step(*[ids] * (here == 0), **{"target": target} if here else {})
    return [p.grad.full_tensor().numpy() for p in part.parameters()]


@pytest.mark.parametrize("k", [0, None])
def test_stages_may_be_sharded(ranks, k):
    parts, (ids, target) = stages(first=True), batch()
    loss_fn(nn.Sequential(*parts)(ids), target).backward()
    for rank, found in enumerate(ranks(sharded_on, k)):
        here = rank % 2
        own = [p for part in parts[2 * here : 2 * here + 2] for p in part.parameters()]
        close(found, numpy(p.grad for p in own))


class Pair(nn.Module):
    def forward(self, x: Any) -> Any:
        return x, 2 * x


def refused_on(mesh: Any) -> list[str]:
    from torch.distributed.pipelining import PipelineStage

    here, found = mesh.get_local_rank(), []
    for case in ("microbatches", "iterations"):
        part = stages(first=True)[here]
        stage = PipelineStage(part, here, P, torch.device("cpu"), group=mesh.get_group())
        odd = here == 2
        schedule = hb.ScheduleHighway(
            stage, 2 if case == "microbatches" and odd else 1, loss_fn, iterations=1 + (case == "iterations" and odd)
        )
        ids, target = batch()
        with pytest.raises(ValueError, match=r"\w") as caught:
            schedule.step(*[ids] * (here == 0), **{"target": target} if stage.is_last else {})
        found.append(str(caught.value))
    schedule = hb.ScheduleHighway(stage, 3, loss_fn, iterations=1)
    for uncut in (ids, target):
        given = {"target": target if uncut is target else target[:3]} if stage.is_last else {}
        with pytest.raises(ValueError, match=r"\w") as caught:
            schedule.step(*[ids if uncut is ids else ids[:3]] * (here == 0), **given)
        found.append(str(caught.value))
    with pytest.raises(TypeError, match="residual is a float; give an operator"):
        hb.ScheduleHighway(stage, 1, loss_fn, residual=0.5)
    with pytest.raises(TypeError, match=r"stage is a Sequential; give a PipelineStage of torch\.dist"):
        hb.ScheduleHighway(part, 1, loss_fn)
    with pytest.raises(ValueError, match="n_microbatches=0 is too small; give an integer of at least 1"):
        hb.ScheduleHighway(stage, 0, loss_fn)
    return found


def test_ranks_that_differ_say_so(ranks):
    for microbatches, iterations, cut, target in ranks(refused_on):
        assert "on a step of the schedule: n_microbatches is 1 on rank 0 and 1 and 3, 2 on rank 2" in microbatches
        assert "iterations is 1 on rank 0 and 1 and 3, 2 on rank 2" in iterations
        assert cut.startswith("rank 0: argument 0 has shape (4, 5); give a batch that 3 microbatches divide")
        assert target == "rank 3: target has shape (4, 5, 2); give a batch that 3 microbatches divide"


def test_unknown_versions_are_refused():
    from hbp.backends.torch.depth.pipeline import check_version

    check_version(torch.__version__)
    for version in ("2.8.1", "2.14.0a0+git", "3.0"):
        with pytest.raises(RuntimeError, match=r"of which those of 2\.9 to 2\.13 are known here; use ScheduleGPipe"):
            check_version(version)
