"""Whether a model's layers over devices would pay: its costs measured here, its gradients' errors, and a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hbp import diagnosis
from hbp.backends.torch.damping import calls_of, one_stack
from hbp.backends.torch.diagnosis import BACKEND, Steps, check_one_process, undisturbed
from hbp.backends.torch.options import Scheduled, scheduled
from hbp.backends.torch.stack.conversion import convert, revert
from hbp.backends.torch.stack.graphs import Call, pull_back
from hbp.backends.torch.stack.options import Stack
from hbp.core.backend import check_kind
from hbp.core.solver import Solver
from hbp.planning import Costs, Plan, Settings

PASSES = 5
"""That are timed, after one that is not; times are the medians."""


def plan(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    stages: Iterable[int] = (2, 4, 8, 16),
    microbatches: Iterable[int] = (1, 2, 4, 8),
    bandwidth: float = 10e9,
    latency: float = 20e-6,
    iterations: Iterable[int] = (1, 2, 3),
    target: float = 0.05,
    plot: str | Path | None = None,
) -> Plan:
    """Predict whether Highway-BP over devices would pay: the time of a step beside those of pipelines.

    The layers' forward F, pulling a cotangent through them Bi and their weight gradients Bw are timed here, on this
    device with its threads, and so is what the model does outside of them; a stage of P has a P-th of the layers,
    rounded up. The error of each k is measured on the whole batch, a stage as one chunk, as `diagnose` does. From
    these the times on P devices like this one follow by formulas (`hbp.planning.Step`), which take a microbatch to last
    an M-th of the batch's time: plan with the batch that would be cut. Options, gradients, random state and buffers
    are afterwards what they were.

    Args:
        model: a module with one stack, a `Sequential` or a converted one, or a model in which `convert` finds it.
        loss_fn: ``loss_fn(model, batch)``, a scalar tensor.
        batch: what it takes.
        stages, microbatches: the numbers P and M to try; a P above the number of layers is left out.
        bandwidth, latency: of the link between two devices, in bytes per second and seconds.
        iterations: Highway-BP's k to try.
        target: the relative error of the parameters' gradient that is good enough.
        plot: a file for a picture.

    Returns:
        The plan, after printing it: ``rows``, ``costs``, ``errors``, and ``advice``, which may well be 1F1B.

    Raises:
        TypeError, ValueError: the model has no such stack or no parameters that need gradients, the loss is no finite
            scalar, or a number is not what its name says; the layers lie on several ranks.
        ImportError, OSError, ValueError: the picture could not be drawn or written.

    >>> import hbp.backends.torch as hb
    >>> model = hb.Sequential(*(hb.Residual(nn.Linear(4, 4)) for _ in range(8)))
    >>> def loss(model, x):
    ...     return model(x).square().mean()
    >>> found = plan(model, loss, torch.randn(8, 4), stages=(2, 4), iterations=(3,))  # doctest: +ELLIPSIS
        k chunk  rank    error  cosine ...
    >>> found.errors[4, 3] < 1e-5, sorted(found.costs)  # exact from k = P - 1
    (True, [2, 4])
    """
    settings = Settings(stages, microbatches, iterations, bandwidth, latency, target, plot)
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    with _in_a_stack(model) as stack:
        length = len(list(stack.members()))
        sizes = {P: -(-length // P) for P in settings.stages if length >= P}
        _check_stages(settings, sizes, length)
        layers = scheduled(model)
        steps = Steps.of(model, loss_fn, batch, layers)
        with undisturbed(model, layers.values()):
            tried = diagnosis.Settings(tuple(settings.iterations), sorted(set(sizes.values())), target, None)
            exact, *rows = diagnosis.compared(tried, BACKEND, steps.gradient)
            whole = _costs(stack, steps, layers.values())
    good = {(row.iterations, row.chunk) for row in diagnosis.Diagnosis(exact, tuple(rows), target).within}
    errors = {(row.iterations, row.chunk): row.overall.error for row in rows}
    found = Plan(
        settings,
        {P: whole.share(size / length, 2 if length >= 2 * P else 1) for P, size in sizes.items()},
        {(P, k): errors[k, size] for P, size in sizes.items() for k in settings.iterations},
        frozenset((P, k) for P, size in sizes.items() for k in settings.iterations if (k, size) in good),
    )
    print(found)
    if plot is not None:
        found.plot(plot)
    return found


@contextmanager
def _in_a_stack(model: nn.Module) -> Iterator[Stack]:
    """The model's stack; where it has no layers of this library the one that `convert` finds, converted meanwhile."""
    try:
        scheduled(model)
    except ValueError:
        convert(model)
        try:
            yield one_stack(model, "")
        finally:
            revert(model)
        return
    check_one_process(scheduled(model).values())
    yield one_stack(model, "plan takes a model with one")


def _check_stages(settings: Settings, sizes: dict[int, int], length: int) -> None:
    left_out = ", ".join(str(P) for P in settings.stages if P not in sizes)
    if not sizes:
        raise ValueError(f"stages={left_out}: the stack has {length} layers; give a number of stages up to that")
    if left_out:
        print(f"left out: P = {left_out}, as the stack has {length} layers")


def _costs(stack: Stack, steps: Steps, layers: Iterable[Scheduled]) -> Costs:
    """What the whole stack costs, as one stage."""
    for part in layers:
        part.reports = None
    with torch.enable_grad():
        calls = calls_of(stack, lambda: steps.loss_fn(steps.model, steps.batch))
    stack.solver = Solver()  # of the calls from here on
    ends, starts = [call.ends[0] for call in calls], [call.start for call in calls]
    weights = {id(p): p for call in calls for p in call.parameters.values() if p.requires_grad}
    cotangents = [torch.ones_like(start) for start in starts]
    works: tuple[Callable[[], Any], ...] = (
        lambda: _forward(calls),
        lambda: pull_back(ends, starts, cotangents),
        lambda: pull_back(ends, [*starts, *weights.values()], cotangents),
    )
    times = [[_seconds(work) for work in works] + [steps.seconds(Solver())] for _ in range(PASSES + 1)]
    forward, pull, both, step = (median(column) for column in zip(*times[1:], strict=True))
    size = starts[0].numel() * starts[0].element_size()
    return Costs(forward, pull, max(0.0, both - pull), size, max(0.0, step - forward - both))


def _forward(calls: list[Call]) -> list[Tensor]:
    """The layers called once more, each on its own state, with plain graphs."""
    ends = []
    for call in calls:
        args, kwargs = call.arguments
        with call.modes.autocast(), torch.enable_grad():
            found = call.module(call.start, *args, **kwargs)
        ends.append(found[0] if isinstance(found, tuple) else found)
    return ends


def _seconds(work: Callable[[], list[Tensor | None]]) -> float:
    start = time.perf_counter()
    found = work()
    float(next(one for one in reversed(found) if one is not None).detach().sum())  # waits for the device
    return time.perf_counter() - start
