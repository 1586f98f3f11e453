"""A step of layers over several ranks, measured, beside what `hb.plan`'s formulas predict from one process's costs.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.depth --out depth.json

All ranks measure the costs of the whole stack at the same time, as they share caches and memory afterwards, and the
slowest counts; the link is measured by the collective that each round waits for. A prediction is worth something only
where every rank has a core of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import hbp.backends.torch as hb
from benchmarks.environment import environment
from hbp.planning import Costs, Link, Step

REPEATS, ROUNDS = 5, 5
KS = (None, 1, 3)


def layers_of(length: int, width: int) -> list[Any]:
    """Residual perceptrons, the same on every rank."""
    torch.manual_seed(0)

    def block() -> Any:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    return [hb.Residual(block()) for _ in range(length)]


def loss_of(model: Any, x: Any) -> Any:
    return model(x).square().mean()


def milliseconds(steps: dict[Any, Callable[[], Any]], times: dict[Any, list[float]]) -> None:
    """Interleaved rounds, of the slowest rank each, added to ``times``; collective."""
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            dist.barrier()
            start = perf_counter()
            step()
            took = torch.tensor(perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:
                times.setdefault(name, []).append(1e3 * float(took))


def costs_of(whole: Any, x: Any) -> tuple[Costs, dict[int, float]]:
    """What a stage costs on the slowest rank while all of them measure, and the error of each k; collective."""
    count = dist.get_world_size()
    dist.barrier()
    with redirect_stdout(StringIO()):
        plan = hb.plan(whole, loss_of, x, stages=(count,), microbatches=(1,), iterations=(1, 3))
    found: list[Any] = [None] * count
    dist.all_gather_object(found, plan.costs[count])
    slowest = {name: max(getattr(one, name) for one in found) for name in vars(found[0])}
    return Costs(**slowest), {k: plan.errors[count, k] for k in (1, 3)}


def link_of(state: Any) -> Link:
    """Latency and bandwidth of an all-gather, which a round waits for, from a short and a long one; collective."""
    seconds, others = [], dist.get_world_size() - 1
    for x in (torch.zeros(1), torch.zeros_like(state)):
        found, room = [], [torch.empty_like(x) for _ in range(others + 1)]
        for _ in range(16):
            dist.barrier()
            start = perf_counter()
            dist.all_gather(room, x)
            found.append(perf_counter() - start)
        seconds.append(median(found[1:]))
    numbers = torch.tensor(seconds)
    dist.broadcast(numbers, 0)
    short, long = numbers.tolist()
    return Link(others * 4 * state.numel() / max(long - short, 1e-9), short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    here, count = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    x = torch.randn(options.batch, options.width, generator=torch.Generator().manual_seed(1))
    whole = hb.Sequential(*layers_of(options.layers, options.width))
    link = link_of(x)
    share = options.layers // count
    own = layers_of(options.layers, options.width)[here * share : (here + 1) * share]
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("depth",))
    stack = hb.DepthParallel(*own, mesh=mesh["depth"])

    def step(k: int | None) -> Callable[[], None]:
        def run() -> None:
            stack.iterations = k
            stack.zero_grad()
            loss_of(stack, x).backward()

        return run

    def alone() -> None:
        whole.zero_grad()
        if here == 0:
            loss_of(whole, x).backward()

    times: dict[Any, list[float]] = {}
    measured = []
    for _ in range(REPEATS):  # in turns, as a shared machine is now faster and now slower
        costs, errors = costs_of(whole, x)
        measured.append(costs)
        milliseconds({"one process": alone, **{k: step(k) for k in KS}}, times)
    costs = Costs(**{name: median(getattr(one, name) for one in measured) for name in vars(costs)})
    at = Step(costs, link, count, 1)
    predicted = {"one process": None, None: at.gpipe(), **{k: at.highway(k) for k in KS if k is not None}}
    if here == 0:
        rows = []
        for name, ms in ((name, median(found)) for name, found in times.items()):
            guess = predicted[name]
            title = name if isinstance(name, str) else "exact, in turns" if name is None else f"k = {name}"
            error = errors.get(name) if isinstance(name, int) else 0.0
            rows.append({"step": title, "ms": ms, "predicted_ms": guess and 1e3 * guess, "error": error})
            beside = "" if guess is None else f", predicted {1e3 * guess:7.1f} ({1e3 * guess / ms:.2f} of it)"
            print(f"{title:16} {ms:7.1f} ms{beside}, gradient off by {error:.1e}", flush=True)
        document = {
            "ranks": count,
            **{name: getattr(options, name) for name in ("layers", "width", "batch")},
            "costs_ms": {name: 1e3 * getattr(costs, name) for name in ("forward", "pull", "weights", "outside")},
            "link": {"bandwidth": link.bandwidth, "latency": link.latency},
            "environment": environment([], with_limits=False),
            "rows": rows,
        }
        if options.out is not None:
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
