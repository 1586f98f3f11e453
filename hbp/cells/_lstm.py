"""The long short-term memory, with PyTorch's layout: gates i, f, g, o; c' = f c + i g; h' = o tanh(c')."""

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
from hbp.core.operator import Diagonal, LinearOperator, Pair
from hbp.core.pullbacks import Pullbacks
from hbp.core.solver import Solver
from hbp.directions import Directions, Rank
from hbp.lowrank import LowRank


class LSTMParameters(NamedTuple):
    """An LSTM's parameters, shaped and ordered as in `torch.nn.LSTM`: gates i, f, g, o. Biases may be None."""

    weight_ih: Array
    """(4H, I)"""
    weight_hh: Array
    """(4H, H)"""
    bias_ih: Array | None = None
    """(4H,)"""
    bias_hh: Array | None = None
    """(4H,)"""


def lstm(
    params: LSTMParameters,
    x: Array,
    initial: tuple[Array, Array],
    *,
    keep: Keep = "states",
    backend: Backend | str | None = None,
) -> tuple[tuple[Array, Array], LSTMPullback]:
    """Run an LSTM over a sequence and return all its states with its pullback.

    Args:
        params: the weights.
        x: the inputs, (T, B, I).
        initial: the initial states ``(h0, c0)``, (B, H) each.
        keep: as in `hbp.cells.gru`; the gates take three times the memory of the states alone.
        backend: a backend or its name, where it shall not be chosen by the library's rules.

    Returns:
        ``(h, c)``, (T, B, H) each, and an `LSTMPullback`.

    Raises:
        TypeError, ValueError: arrays of several libraries or dtypes, or shapes that do not fit.

    >>> import numpy as np
    >>> params = LSTMParameters(np.zeros((4, 1)), np.zeros((4, 1)))
    >>> (h, c), pullback = lstm(params, np.zeros((2, 1, 1)), (np.zeros((1, 1)), np.ones((1, 1))))
    >>> c.ravel().tolist()
    [0.5, 0.25]
    >>> dparams, dx, (dh0, dc0) = pullback((np.zeros_like(h), np.ones_like(c)), iterations=1)
    >>> dc0.item()
    0.75
    """
    if not isinstance(initial, tuple | list) or len(initial) != 2:
        raise TypeError(f"the initial state of an LSTM is a pair (h0, c0), not a {type(initial).__name__}")
    h0, c0 = initial
    check_keep(keep)
    resolved = check_cell(4, params, x, {"h0": h0, "c0": c0}, backend)
    run = resolved.kernel("lstm_forward", x, h0, c0, *(w for w in params if w is not None))
    if run is not None:
        h, c, gates = run(params, x, (h0, c0), resolved)
        gates = gates if keep == "gates" else None
        return (h, c), LSTMPullback(params, x, (h0, c0), (h, c), resolved, gates)
    inputs = project(x, params.weight_ih, params.bias_ih, params.bias_hh)

    def step(state: tuple[Array, Array], row: Array) -> tuple[Array, Array]:
        h, c = state
        i, f, g, o = _gates(params, row, h, resolved)
        c = f * c + i * g
        return o * resolved.xp.tanh(c), c

    h, c = resolved.scan(step, (h0, c0), inputs)
    return (h, c), LSTMPullback(params, x, (h0, c0), (h, c), resolved)


def _gates(params: LSTMParameters, inputs: Array, h: Array, backend: Backend) -> tuple[Array, Array, Array, Array]:
    """i, f, g, o from projected inputs (with both biases) and previous states."""
    size = h.shape[-1]
    a = inputs + project(h, params.weight_hh)
    i_f = sigmoid(a[..., : 2 * size], backend)
    g, o = backend.xp.tanh(a[..., 2 * size : 3 * size]), sigmoid(a[..., 3 * size :], backend)
    return i_f[..., :size], i_f[..., size:], g, o


def _memory(i: Array, f: Array, g: Array, c0: Array, backend: Backend) -> Array:
    """The states ``c[t] = f[t] c[t-1] + i[t] g[t]``, by one prefix scan: a suffix scan of reversed time."""
    flip = backend.xp.flip
    entering = backend.concat([flip(i * g, (0,)), c0[None]])
    return flip(backend.propagate(Diagonal(flip(f, (0,))), entering)[:-1], (0,))


@dataclass(frozen=True, eq=False)
class LSTMBlocks(Pullbacks):
    """The blocks of an LSTM's steps on the state (c, h), shape (B, 2, H): all that h[t-1] does by way of the gates."""

    gains: Array
    """The derivatives by the pre-activations i, f, g of c[t] and o of h[t], (T, B, 4, H)."""
    exposed: Array
    """The derivative of h[t] by c[t], o (1 - tanh^2 c), (T, B, H)."""
    weight: Array
    traceable = True

    def __len__(self) -> int:
        return len(self.gains)

    def __getitem__(self, index: slice) -> LSTMBlocks:
        return LSTMBlocks(self.gains[index], self.exposed[index], self.weight)

    def preactivations(self, g: Array, backend: Backend) -> Array:
        """The cotangents of the gates' pre-activations, (..., 4H), from those of the states (c, h)."""
        dc, dh = g[..., 0, :], g[..., 1, :]
        memory = (dc + self.exposed * dh)[..., None, :]
        return merged(
            backend.concat([self.gains[..., :3, :] * memory, self.gains[..., 3:, :] * dh[..., None, :]], axis=-2)
        )

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        dh = matmul(self.preactivations(cotangents, backend), self.weight)
        return backend.stack([backend.zeros_like(dh), dh], axis=-2)

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self[i](cotangent, backend)

    def along(self, left: Array, right: Array, backend: Backend) -> LowRank:
        """What ``left @ right`` in the place of the weight would do, as residual maps."""
        gates = 3 * self.exposed.shape[-1]
        by_c = sum_of_gates(self.gains[..., :3, :], left[:gates])
        by_h = self.exposed[..., None] * by_c + sum_of_gates(self.gains[..., 3:, :], left[gates:])
        return LowRank(backend.concat([by_c, by_h], -2), backend.concat([backend.zeros_like(right), right], -1)[None])


@dataclass(frozen=True, eq=False)
class LSTMPullback:
    """The pullback of `lstm` at a point; it needs no more than the inputs and the states h.

    Where the states c are not at hand (None), they are one scan, since the gates depend on h alone.

    Gates that the forward did not keep are computed again, for all steps at once: by its compiled form at each call,
    else at the first. Change none of the weights, inputs and states in place before.
    """

    params: LSTMParameters
    x: Array
    initial: tuple[Array, Array]
    states: tuple[Array, Array | None]
    backend: Backend
    gates: Array | None = None
    """i, f, g, o, (T, B, 4H), where a forward kept them."""

    def _gates(self, h: Array) -> tuple[Array, Array, Array, Array]:
        if self.gates is None:
            inputs = project(self.x, self.params.weight_ih, self.params.bias_ih, self.params.bias_hh)
            return _gates(self.params, inputs, h, self.backend)
        size = h.shape[-1]
        i, f, g, o = (self.gates[..., n * size : (n + 1) * size] for n in range(4))
        return i, f, g, o

    @cached_property
    def chain(self) -> LinearizedChain:
        """The T steps, linearised: residual path c[t-1] -> c[t] -> h[t], blocks the gates."""
        h = previous(self.initial[0], self.states[0], self.backend)
        i, f, g, o = self._gates(h)
        memory = _memory(i, f, g, self.initial[1], self.backend) if self.states[1] is None else self.states[1]
        c, tanh_c = previous(self.initial[1], memory, self.backend), self.backend.xp.tanh(memory)
        exposed = o * (1 - tanh_c * tanh_c)
        gains = [g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
        blocks = LSTMBlocks(self.backend.stack(gains, axis=-2), exposed, self.params.weight_hh)
        zero = self.backend.zeros_like(f[:, :1, :1])
        stack = self.backend.stack
        return LinearizedChain(blocks, Pair(stack([f, exposed * f], axis=-2), stack([zero + 1, zero], axis=-2)))

    def split(self, split: LinearOperator | Directions | None) -> LinearizedChain:
        """As `GRUPullback.split`, beside the path c[t-1] -> c[t] -> h[t]."""
        if not isinstance(split, Directions):
            return self.chain if split is None else self.chain.resplit(split)
        left, right = split.taken
        own = self.chain.pullbacks
        rest = LSTMBlocks(own.gains, own.exposed, own.weight - left @ right)
        return LinearizedChain(rest, self.chain.residual + own.along(left, right, self.backend))

    def __call__(
        self,
        dstates: tuple[Array, Array | None],
        iterations: int | None = None,
        chunk: int = 1,
        residual: LinearOperator | None = None,
        tolerance: float | None = None,
        watch: Callable[[Report], None] | None = None,
        *,
        solver: Solver | None = None,
        rank: Rank = 0,
        with_inputs: bool = True,
    ) -> tuple[LSTMParameters, Array | None, tuple[Array, Array]]:
        """Pull cotangents of the states back to the parameters, the inputs and the initial states.

        Args:
            dstates: ``(dh, dc)``, (T, B, H) each; dc may be None.
            iterations, chunk, tolerance, watch, solver: as in `hbp.highway`; None is exact BPTT.
            residual: another residual path than c[t-1] -> c[t] -> h[t], on states (c, h) of shape (B, 2, H):
                ``hbp.Zero()`` is the fixed-point baseline.
            rank: how many strong directions of the recurrent weights the path takes beside (`hbp.directions`), for the
                price of as many numbers per step: a number, "auto", or directions given. They are taken anew at each
                call, by a singular value decomposition where none are given.
            with_inputs: whether dx is wanted; else it is None.

        Returns:
            ``dparams`` (an `LSTMParameters`), ``dx`` (T, B, I), ``(dh0, dc0)`` (B, H) each.
        """
        if not isinstance(dstates, tuple | list) or len(dstates) != 2:
            raise TypeError(f"the cotangents of an LSTM are a pair (dh, dc), not a {type(dstates).__name__}")
        dh, dc = dstates
        check_cotangent("dh", dh, self.states[0], self.backend)
        if dc is not None:
            check_cotangent("dc", dc, self.states[0], self.backend)
        solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance, watch=watch).fixed()
        split = own_split(solver, residual, rank, self.params.weight_hh, self.backend)
        return self.pull((dh, dc), solver, split, with_inputs)

    def pull(
        self,
        dstates: tuple[Array, Array | None],
        solver: Solver,
        split: LinearOperator | Directions | None,
        with_inputs: bool = True,
    ) -> tuple[LSTMParameters, Array | None, tuple[Array, Array]]:
        """As `GRUPullback.pull`."""
        dh, dc = dstates
        arrays = (*self.states, self.x, *self.initial, dh, dc, *self.params)
        whole, rounds = own_code("lstm", solver, split, self.backend, arrays)
        if whole is not None:
            return whole(self, dstates, with_inputs)
        d = self.backend.stack([self.backend.zeros_like(dh) if dc is None else dc, dh], axis=-2)
        g = state_cotangents(self.split(split) if rounds is None else self.chain, d, solver, rounds, self.backend)
        a = self.chain.pullbacks.preactivations(g[1:], self.backend)
        d0 = first(g, self.backend)
        dx = matmul(a, self.params.weight_ih) if with_inputs else None
        return self._parameters(a), dx, (d0[:, 1], d0[:, 0])

    def _parameters(self, a: Array) -> LSTMParameters:
        """The parameters' gradients from the cotangents of the pre-activations, (T, B, 4H)."""
        bias = a.sum((0, 1))
        return LSTMParameters(
            weight_gradient(a, self.x),
            weight_gradient(a, previous(self.initial[0], self.states[0], self.backend)),
            None if self.params.bias_ih is None else bias,
            None if self.params.bias_hh is None else self.backend.concat([bias]),  # apart: they may be written into
        )
