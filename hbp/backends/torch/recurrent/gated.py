"""Scans of a user's own gated cell, ``h' = gate * h + update``, with the split derived by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbp.backends.torch.array import TorchBackend
from hbp.backends.torch.autograd import (
    SWAPPING,
    alike,
    autocast_of,
    foreign_leaf,
    opaque,
    refuse_second_derivatives,
    refuse_transforms,
    without_autocast,
    write_counter,
)
from hbp.backends.torch.hooks import no_backward_hooks
from hbp.backends.torch.recurrent.blocks import Cell, CellBlocks, checked
from hbp.backends.torch.recurrent.following import Followed, followed
from hbp.core.adjoint import highway
from hbp.core.chain import LinearizedChain
from hbp.core.operator import Diagonal
from hbp.core.solver import Solver
from hbp.directions import Rank
from hbp.lowrank import LowRank

BACKEND = TorchBackend()


def scan(cell: Cell, h0: Tensor, xs: Tensor, *, iterations: int | None = None, chunk: int = 1,
    tolerance: float | None = None, solver: Solver | None = None, rank: Rank = 0, weight: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run ``h[t] = gate * h[t-1] + update`` with ``gate, update = cell(h[t-1], xs[t])`` over a sequence.

    The residual path is diag(gate), the block whatever h[t-1] does by way of gate and update. The forward builds no
    graph; the backward calls the cell again, once on all steps, so a cell must treat leading axes as a batch, and
    hold no randomness and no state. Parameters get gradients where the cell is a `torch.nn.Module`; with None, whatever
    torch's own graph reaches does. Under `torch.func`, forward mode, tracers and `torch.export` only None will do.

    Args:
        cell: (B, H), (B, ...) -> two tensors (B, H), and likewise with further leading axes.
        h0: the initial state, (B, H).
        xs: the inputs, (T, B, ...).
        iterations: Highway-BP's k; None is exact, by torch's own graph through the steps. A cell whose gate and update
            do not read h is exact at k = 0.
        chunk: steps per chunk.
        tolerance: stop when the last increment is at most this fraction of the gradient; ``iterations`` is the cap.
        solver: these three in one `hbp.Solver`, instead.
        rank: how many strong directions of ``weight`` the residual path takes beside diag(gate) (`hbp.directions`): a
            number, or "auto". What the block does along them costs as many pullbacks through all steps at each
            backward, and the directions a step of subspace iteration, the first time a singular value decomposition.
        weight: which parameter of the cell they are of, by its name: (N, H), as ``"linear.weight"`` of what h enters.

    Returns:
        ``h``, (T, B, H), and a copy of its last entry.

    Raises:
        TypeError, ValueError: no tensors, a cell that returns no pair of tensors like its state, no step, counts that
            are none, or a rank without such a parameter.
        RuntimeError: a transform of the call that would lose Highway-BP; in the backward, where the cell gives other
            states for all steps at once.

    >>> cell = lambda h, x: (torch.sigmoid(x), torch.tanh(x + h))
    >>> h, last = scan(cell, torch.zeros(2, 3), torch.randn(5, 2, 3, requires_grad=True), iterations=1)
    >>> h.shape, torch.equal(last, h[-1])
    (torch.Size([5, 2, 3]), True)
    """
    solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance).fixed()
    _check_input(cell, h0, xs)
    strong = followed(cell, rank, weight, h0)
    if not solver.exact:
        refuse_transforms()
    ours = torch.is_grad_enabled() and not solver.exact
    h = _highway(cell, solver, strong, h0, xs) if ours else _states(cell, h0, xs)
    return h, h[-1].clone()  # whoever writes into one does not change the other


def _check_input(cell: Any, h0: Any, xs: Any) -> None:
    if not callable(cell):
        raise TypeError(f"cell is a {type(cell).__name__}; give a function (h, x) -> (gate, update)")
    for name, value in (("h0", h0), ("xs", xs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; give a torch.Tensor")
    if not h0.is_floating_point():
        raise TypeError(f"h0 is {h0.dtype}; give real floating point numbers")
    if not xs.dim() or not len(xs):
        raise ValueError(f"xs has shape {tuple(xs.shape)}; expected (T, B, ...) with at least one step")


def _states(cell: Cell, h0: Tensor, xs: Tensor) -> Tensor:
    """The states after each step, one by one."""
    states = [h0]
    for x in xs.unbind(0):  # indexing a tensor that needs gradients costs the whole sequence at every step
        gate, update = checked(cell(states[-1], x), states[-1])
        states.append(gate * states[-1] + update)
    return torch.stack(states[1:])


@opaque  # one break of a compiled graph
def _highway(cell: Cell, solver: Solver, strong: Followed | None, h0: Tensor, xs: Tensor) -> Tensor:
    parameters = dict(cell.named_parameters()) if isinstance(cell, torch.nn.Module) else {}
    if _needs_gradients(cell, h0, xs, list(parameters.values())):
        found: Tensor = _GatedScan.apply((cell, solver, strong, tuple(parameters)), h0, xs, *parameters.values())
        return found
    with torch.no_grad():
        return _states(cell, h0, xs)


def _needs_gradients(cell: Cell, h0: Tensor, xs: Tensor, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether anything a scan depends on needs gradients, tried on its first step.

    Raises:
        ValueError: something that is no argument and no parameter of the cell does; its gradient would be lost.
    """
    h, x = h0.detach().requires_grad_(), xs[0].detach().requires_grad_(xs.requires_grad)
    module = cell if isinstance(cell, torch.nn.Module) else torch.nn.Module()
    with no_backward_hooks("the cell", module, module):
        pair = checked(cell(h, x), h)
    foreign = foreign_leaf(pair, h, set(map(id, (x, *parameters))))
    if foreign is not None:
        raise ValueError(
            f"the cell reads a tensor of shape {tuple(foreign.shape)} that needs gradients and is no parameter of it; "
            "give a torch.nn.Module with it as a parameter, or iterations=None"
        )
    return any(tensor.requires_grad for tensor in (h0, xs, *parameters))


def _check_alike(again: Tensor, h: Tensor, precision: torch.dtype) -> None:
    if not alike(again, h, precision):
        raise RuntimeError(
            "the cell gives other states for all steps at once than it gave one by one; it must treat leading axes as "
            "a batch and hold no randomness and no state (iterations=None takes any cell)"
        )


class _GatedScan(torch.autograd.Function):
    """Initial state, inputs, parameters -> the states."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], h0: Tensor, xs: Tensor, *parameters: Tensor) -> Tensor:
        h = _states(options[0], h0, xs)
        ctx.options = (*options, *autocast_of(h))
        ctx.writes = write_counter(h)  # as in RecurrentLayer
        ctx.written = ctx.writes._version
        ctx.save_for_backward(h0, xs, h.data, *parameters)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("iterations=None", dh)
        cell, solver, strong, names, autocast, precision = ctx.options
        h0, xs, h, *given = ctx.saved_tensors
        # Copies as leaves: hooks on the parameters see the final gradient only, once.
        parameters = [p.detach().requires_grad_(p.requires_grad) for p in given]
        x = xs.detach().requires_grad_(xs.requires_grad)
        copies = dict(zip(names, parameters, strict=True))

        def call(h: Tensor, x: Tensor) -> Any:
            with SWAPPING, autocast():
                return torch.func.functional_call(cell, copies, (h, x)) if copies else cell(h, x)

        if ctx.writes._version != ctx.written:
            with torch.no_grad():
                h = _states(call, h0, xs)
        blocks = CellBlocks(call, torch.cat([h0[None], h[:-1]]), x)
        before, gate, update = (part.detach() for part in blocks.graph)
        _check_alike(gate * before + update, h, precision)
        chain = LinearizedChain(blocks, Diagonal(gate))
        sources = torch.cat([torch.zeros_like(dh[:1]), dh[:-1]])
        with without_autocast(dh.device.type):  # the states' dtype is that of all; the cell has its own state
            if strong is not None:
                right = strong(copies[strong.name].detach()).taken[1].to(h.dtype)
                chain = chain.resplit(chain.residual + LowRank(blocks.along(right), right[None]))
            g = highway(chain, dh[-1], sources=sources, solver=solver, backend=BACKEND)
        leaves = tuple(leaf for leaf in (x, *parameters) if leaf.requires_grad)
        found = iter(blocks.pull(g[1:], leaves))
        dx, *dparameters = (next(found) if leaf.requires_grad else None for leaf in (x, *parameters))
        return (None, g[0], dx, *dparameters)
