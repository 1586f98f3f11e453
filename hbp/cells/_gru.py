"""The gated recurrent unit, with PyTorch's layout: gates r, z, n; h' = (1 - z) n + z h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from hbp.cells._common import (
    Keep,
    check_cell,
    check_cotangent,
    check_keep,
    first,
    matmul,
    merged,
    own_code,
    own_split,
    previous,
    project,
    sigmoid,
    state_cotangents,
    sum_of_gates,
    weight_gradient,
)
from hbp.core.backend import Array, Backend
from hbp.core.chain import LinearizedChain
from hbp.core.increments import Report
from hbp.core.operator import Diagonal, LinearOperator
from hbp.core.pullbacks import Pullbacks
from hbp.core.solver import Solver
from hbp.directions import Directions, Rank
from hbp.lowrank import LowRank


class GRUParameters(NamedTuple):
    """A GRU's parameters, shaped and ordered as in `torch.nn.GRU`: gates r, z, n. Biases may be None."""

    weight_ih: Array
    """(3H, I)"""
    weight_hh: Array
    """(3H, H)"""
    bias_ih: Array | None = None
    """(3H,)"""
    bias_hh: Array | None = None
    """(3H,)"""


def gru(
    params: GRUParameters, x: Array, h0: Array, *, keep: Keep = "states", backend: Backend | str | None = None
) -> tuple[Array, GRUPullback]:
    """Run a GRU over a sequence and return all its states with its pullback.

    Args:
        params: the weights.
        x: the inputs, (T, B, I).
        h0: the initial state, (B, H).
        keep: what a compiled forward keeps for the pullback beside the inputs: "states", or "gates" too, which takes
            five times the memory and spares the pullback two products; another forward keeps the states.
        backend: a backend or its name, where it shall not be chosen by the library's rules.

    Returns:
        ``h``, (T, B, H), and a `GRUPullback`.

    Raises:
        TypeError, ValueError: arrays of several libraries or dtypes, or shapes that do not fit.

    >>> import numpy as np
    >>> params = GRUParameters(np.zeros((3, 1)), np.zeros((3, 1)))
    >>> h, pullback = gru(params, np.zeros((2, 1, 1)), np.ones((1, 1)))
    >>> h.ravel().tolist()
    [0.5, 0.25]
    >>> dparams, dx, dh0 = pullback(np.ones_like(h), iterations=1)
    >>> dh0.item()
    0.75
    """
    check_keep(keep)
    resolved = check_cell(3, params, x, {"h0": h0}, backend)
    run = resolved.kernel("gru_forward", x, h0, *(w for w in params if w is not None))
    if run is not None:
        h, gates = run(params, x, h0, keep == "gates", resolved)
        return h, GRUPullback(params, x, h0, h, resolved, gates)
    inputs = project(x, params.weight_ih, params.bias_ih)

    def step(h: Array, row: Array) -> Array:
        _, z, n, _ = _gates(params, row, h, resolved)
        return n + z * (h - n)

    h = resolved.scan(step, h0, inputs)
    return h, GRUPullback(params, x, h0, h, resolved)


def _gates(params: GRUParameters, inputs: Array, h: Array, backend: Backend) -> tuple[Array, Array, Array, Array]:
    """r, z, n and the candidate's recurrent part ``W_hn h + b_hn``, from projected inputs and previous states."""
    size = h.shape[-1]
    recurrent = project(h, params.weight_hh, params.bias_hh)
    rz = sigmoid(inputs[..., : 2 * size] + recurrent[..., : 2 * size], backend)
    r, z, candidate = rz[..., :size], rz[..., size:], recurrent[..., 2 * size :]
    return r, z, backend.xp.tanh(inputs[..., 2 * size :] + r * candidate), candidate


@dataclass(frozen=True, eq=False)
class GRUBlocks(Pullbacks):
    """The blocks of a GRU's steps, ``B[t]``: all that h[t-1] does to h[t] by way of the gates."""

    gains: Array
    """The derivatives of h[t] by the recurrent pre-activations, (T, B, 3, H)."""
    weight: Array
    traceable = True

    def __len__(self) -> int:
        return len(self.gains)

    def __getitem__(self, index: slice) -> GRUBlocks:
        return GRUBlocks(self.gains[index], self.weight)

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        return matmul(merged(self.gains * cotangents[..., None, :]), self.weight)

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return merged(self.gains[i] * cotangent[..., None, :]) @ self.weight

    def along(self, left: Array, right: Array) -> LowRank:
        """What ``left @ right`` in the place of the weight would do, as residual maps."""
        return LowRank(sum_of_gates(self.gains, left), right[None])


@dataclass(frozen=True, eq=False)
class GRUPullback:
    """The pullback of `gru` at a point; it needs no more than the inputs and the states.

    Gates that the forward did not keep are computed again, for all steps at once: by its compiled form at each call,
    else at the first. Change none of the weights, inputs and states in place before.
    """

    params: GRUParameters
    x: Array
    h0: Array
    h: Array
    backend: Backend
    gates: tuple[Array, Array] | None = None
    """r, z, n, (T, B, 3H), and the candidate's recurrent part, (T, B, H), where a forward kept them."""

    @cached_property
    def _linearized(self) -> tuple[LinearizedChain, Array]:
        """The chain of steps, and the derivative of h[t] by the candidate's input pre-activation."""
        h = previous(self.h0, self.h, self.backend)
        r, z, n, candidate = self._gates(h)
        by_input = (1 - z) * (1 - n * n)
        by_recurrent = by_input * r
        gains = self.backend.stack([by_recurrent * (1 - r) * candidate, (h - n) * z * (1 - z), by_recurrent], axis=-2)
        return LinearizedChain(GRUBlocks(gains, self.params.weight_hh), Diagonal(z)), by_input

    def _gates(self, h: Array) -> tuple[Array, Array, Array, Array]:
        if self.gates is None:
            inputs = project(self.x, self.params.weight_ih, self.params.bias_ih)
            return _gates(self.params, inputs, h, self.backend)
        (gates, candidate), size = self.gates, h.shape[-1]
        return gates[..., :size], gates[..., size : 2 * size], gates[..., 2 * size :], candidate

    @property
    def chain(self) -> LinearizedChain:
        """The T steps, linearised: residual path diag(z), blocks the gates."""
        return self._linearized[0]

    def split(self, split: LinearOperator | Directions | None) -> LinearizedChain:
        """The steps under another split: with strong directions of the weights beside diag(z), or another path."""
        if not isinstance(split, Directions):
            return self.chain if split is None else self.chain.resplit(split)
        left, right = split.taken
        own = self.chain.pullbacks
        rest = GRUBlocks(own.gains, own.weight - left @ right)
        return LinearizedChain(rest, self.chain.residual + own.along(left, right))

    def __call__(
        self,
        dh: Array,
        iterations: int | None = None,
        chunk: int = 1,
        residual: LinearOperator | None = None,
        tolerance: float | None = None,
        watch: Callable[[Report], None] | None = None,
        *,
        solver: Solver | None = None,
        rank: Rank = 0,
        with_inputs: bool = True,
    ) -> tuple[GRUParameters, Array | None, Array]:
        """Pull cotangents of the states, (T, B, H), back to the parameters, the inputs and the initial state.

        Args:
            dh: the loss's cotangents of ``h``; zeros but for the last step where only that one counts.
            iterations, chunk, tolerance, watch, solver: as in `hbp.highway`; None is exact BPTT.
            residual: another residual path than diag(z): ``hbp.Zero()`` is the fixed-point baseline.
            rank: how many strong directions of the recurrent weights the path takes beside (`hbp.directions`), for the
                price of as many numbers per step: a number, "auto", or directions given. They are taken anew at each
                call, by a singular value decomposition where none are given.
            with_inputs: whether dx is wanted; else it is None.

        Returns:
            ``dparams`` (a `GRUParameters`), ``dx`` (T, B, I), ``dh0`` (B, H).
        """
        check_cotangent("dh", dh, self.h, self.backend)
        solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance, watch=watch).fixed()
        split = own_split(solver, residual, rank, self.params.weight_hh, self.backend)
        return self.pull(dh, solver, split, with_inputs)

    def pull(
        self, dh: Array, solver: Solver, split: LinearOperator | Directions | None, with_inputs: bool = True
    ) -> tuple[GRUParameters, Array | None, Array]:
        """What a call returns, of arguments known to be sound: the split is another path, or directions beside it."""
        arrays = (self.h, self.x, self.h0, dh, *self.params)
        whole, rounds = own_code("gru", solver, split, self.backend, arrays)
        if whole is not None:
            return whole(self, dh, with_inputs)
        g = state_cotangents(self.split(split) if rounds is None else self.chain, dh, solver, rounds, self.backend)
        inputs, recurrent = self.preactivations(g)
        dx = matmul(inputs, self.params.weight_ih) if with_inputs else None
        return self.parameters(inputs, recurrent), dx, first(g, self.backend)

    def preactivations(self, g: Array) -> tuple[Array, Array]:
        """The cotangents of the gates' input and recurrent pre-activations, (T, B, 3H), from those of the states."""
        chain, by_input = self._linearized
        recurrent = chain.pullbacks.gains * g[1:, ..., None, :]
        candidate = (by_input * g[1:])[..., None, :]
        return merged(self.backend.concat([recurrent[..., :2, :], candidate], axis=-2)), merged(recurrent)

    def parameters(self, inputs: Array, recurrent: Array) -> GRUParameters:
        """The parameters' gradients from the cotangents of both pre-activations, (T, B, 3H)."""
        return GRUParameters(
            weight_gradient(inputs, self.x),
            weight_gradient(recurrent, previous(self.h0, self.h, self.backend)),
            None if self.params.bias_ih is None else inputs.sum((0, 1)),
            None if self.params.bias_hh is None else recurrent.sum((0, 1)),
        )
