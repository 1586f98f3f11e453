"""A schedule for `torch.distributed.pipelining` whose stages are pulled back all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.pipelining.stage import _PipelineStageBase

from hbp.backends.torch.depth.backend import RankBackend
from hbp.backends.torch.depth.exchange import Exchange
from hbp.backends.torch.depth.ranks import Ranks
from hbp.backends.torch.options import Scheduled
from hbp.core.adjoint import highway
from hbp.core.backend import Backend, check_count, check_kind
from hbp.core.chain import LayerChain
from hbp.core.operator import Identity, LinearOperator
from hbp.core.pullbacks import Pullbacks
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver

KNOWN = (2, 9), (2, 13)
"""The versions of PyTorch whose schedules were looked at; the package is alpha there and changes."""


class ScheduleHighway(Scheduled, ScheduleGPipe):
    """`ScheduleGPipe` with a backward pass by Highway-BP over the stages, all microbatches at once.

    The forward pass, and each stage's own backward pass from the cotangent of its output, are GPipe's. Between them
    the last stage pulls its losses back to its input, and k times all stages between the first and the last pull back
    together and exchange one cotangent per microbatch, instead of taking turns: k + 2 pullbacks of a stage follow one
    another, whatever the number of stages. Exact from k = P - 2 on P ranks, as the first stage has none before it and
    the last has the losses. It pays where there are fewer microbatches than stages; with many, 1F1B is better.

    Args:
        stage, n_microbatches, loss_fn: as for `ScheduleGPipe`, and so are ``scale_grads`` and the other keywords. What
            a stage passes on is one tensor, of one shape for all stages.
        iterations: k, a `Schedule` of it by calls of `step`, or None for GPipe itself.
        tolerance, solver: as for `DepthParallel`.
        residual: the residual path of this rank's stage, as ``hbp.Scalar(0.9 ** 6)`` for six layers damped by 0.1.
        exchange: as for `DepthParallel`.

    Raises:
        TypeError, ValueError: an option is not what its name says; ranks differ, on all ranks, when `step` is called.
        RuntimeError: this version of PyTorch is not known here.

    >>> from torch.distributed.pipelining import PipelineStage
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does it for several
    >>> stage = PipelineStage(torch.nn.Linear(2, 2), 0, 1, torch.device("cpu"))
    >>> schedule = ScheduleHighway(stage, 2, torch.nn.functional.mse_loss, iterations=1)
    >>> schedule.step(torch.ones(4, 2), target=torch.ones(4, 2)).shape
    torch.Size([4, 2])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        stage: Any,
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        iterations: int | Schedule | None = None,
        tolerance: float | None = None,
        solver: Solver | None = None,
        residual: LinearOperator = Identity(),
        exchange: Exchange | None = None,
        **keywords: Any,
    ) -> None:
        check_version(torch.__version__)
        check_kind("stage", stage, _PipelineStageBase, "a PipelineStage of torch.distributed.pipelining")
        n_microbatches = check_count("n_microbatches", n_microbatches, 1)
        check_kind("residual", residual, LinearOperator, "an operator, as hbp.Identity()")
        check_kind("exchange", exchange, Exchange | None, "hb.AllGather(), hb.HillisSteele(), hb.Transpose() or None")
        self.solver = Solver.of(solver, iterations=iterations, tolerance=tolerance)
        self.residual, self.exchange = residual, exchange
        super().__init__(stage, n_microbatches, loss_fn, **keywords)
        self._ranks = Ranks(stage.group or dist.group.WORLD, torch.device(stage.device))

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        """As `ScheduleGPipe.step`, if the ranks agree; collective."""
        solver = self.current()
        facts = {
            "n_microbatches": self._n_microbatches,
            "iterations": solver.iterations,
            "tolerance": solver.tolerance,
            "exchange": self.exchange,
            "scale_grads": self.scale_grads,
        }
        self._ranks.agree("a step of the schedule", facts, [], self._trouble(args, kwargs, target))
        return super().step(*args, target=target, **kwargs)

    def _trouble(self, args: Any, kwargs: dict[str, Any], target: Any) -> str:
        """Why this rank's batch cannot be cut into microbatches, or ""."""
        known = {"losses", "return_outputs", "loss_kwargs"}  # step's own keywords
        cut = [] if self._args_chunk_spec else [(f"argument {i}", value) for i, value in enumerate(args)]
        cut += [] if self._kwargs_chunk_spec else [(k, value) for k, value in kwargs.items() if k not in known]
        for name, value in [*cut, ("target", target)]:
            if isinstance(value, Tensor) and (not value.ndim or len(value) % self._n_microbatches):
                shape, M = tuple(value.shape), self._n_microbatches
                return f"{name} has shape {shape}; give a batch that {M} microbatches divide"
        return ""

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> Any:
        solver, stage = self.current(), self._stage
        if not self._has_backward or solver.exact:
            self.training_step += self._has_backward
            return super()._step_microbatches(*args, **kwargs)

        def solved(number: int) -> list[Any]:
            if not number:  # before the first microbatch goes back, all of them are solved together
                self._solve(solver)
            return []

        stage.get_bwd_recv_ops = solved
        stage.get_bwd_send_ops = lambda number: [stage.bwd_cache.pop(number, None)][:0]
        try:
            return super()._step_microbatches(*args, **kwargs)
        finally:
            del stage.get_bwd_recv_ops, stage.get_bwd_send_ops
            self.training_step += 1

    def _solve(self, solver: Solver) -> None:
        """Leave the cotangents of this stage's outputs where GPipe would receive them."""
        stage, numbers = self._stage, range(self._n_microbatches)
        if stage.is_first and stage.is_last:
            return
        outputs, inputs = self._states()
        if isinstance(stage.submod, FSDPModule):  # as for all but the last backward
            stage.submod.set_is_last_backward(False)
            stage.submod.set_reshard_after_backward(False)
            stage.submod.set_requires_gradient_sync(False)
        if stage.is_last:
            losses = [self._maybe_get_loss(stage, i) for i in numbers]
            cotangent = torch.stack(torch.autograd.grad(losses, inputs, retain_graph=True))
        else:
            cotangent = torch.zeros_like(torch.stack([output.detach() for output in outputs]))
        between = not stage.is_first and not stage.is_last
        pullbacks = Between(outputs if between else [], inputs if between else [])
        chain = LayerChain(pullbacks, self.residual if between else Identity())
        backend = RankBackend(self._ranks, stage.num_stages - 2, self.exchange)
        g = highway(chain, cotangent, solver=solver, backend=backend)
        if not stage.is_last:
            for i in numbers:
                stage.grad_recv_info[i][0].buffer.copy_(g[-1, i])

    def _states(self) -> tuple[list[Tensor], list[Tensor]]:
        """This stage's outputs and inputs, one per microbatch."""
        stage = self._stage
        kept = [stage.fwd_cache[i] for i in range(self._n_microbatches)]
        outputs, inputs = [output for output, _ in kept], [given[0] for _, given in kept]
        several = not stage.is_last and len(outputs[0]) != 1
        state = inputs[0] if stage.is_last else outputs[0][0]
        trouble = f"the stage passes on {len(outputs[0])} tensors; Highway-BP needs one" if several else ""
        facts = {"what a stage passes on": f"{tuple(state.shape)} {state.dtype}"}
        self._ranks.agree("the backward pass of the schedule", facts, [], trouble)
        return [output[0] for output in outputs], inputs


@dataclass(frozen=True, eq=False)
class Between(Pullbacks):
    """The pullback of one stage, for all microbatches at once; or of no stage."""

    outputs: list[Tensor]
    inputs: list[Tensor]

    def __len__(self) -> int:
        return bool(self.outputs)

    def __getitem__(self, index: slice) -> Between:
        return self if range(len(self))[index] else Between([], [])

    def __call__(self, cotangents: Tensor, backend: Backend) -> Tensor:
        if not self.outputs:
            return cotangents
        pulled = torch.autograd.grad(self.outputs, self.inputs, list(cotangents[0]), retain_graph=True)
        return torch.stack(pulled)[None]


def check_version(version: str) -> None:
    """Refuse a PyTorch whose schedules are not known here (RuntimeError).

    >>> check_version("2.13.0+cpu")
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    if not KNOWN[0] <= found <= KNOWN[1]:
        first, last = (".".join(map(str, known)) for known in KNOWN)
        raise RuntimeError(
            f"PyTorch {version} may have changed its pipeline schedules, of which those of {first} to {last} are known "
            "here; use ScheduleGPipe, or hb.DepthParallel"
        )
