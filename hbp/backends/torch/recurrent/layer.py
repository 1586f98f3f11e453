"""One layer of a recurrent net in PyTorch's autograd: outputs computed beforehand, pulled back by hbp's cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hbp.backends.torch.autograd import autocast_of, refuse_second_derivatives, without_autocast, write_counter
from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.backends.torch.recurrent.following import Followed
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback, gru, lstm
from hbp.cells._common import Keep
from hbp.core.operator import LinearOperator
from hbp.core.solver import Solver


@dataclass(frozen=True)
class Vendor:
    """The vendor's kernel for one layer, outside any graph."""

    lstm: bool
    bias: bool
    training: bool
    bidirectional: bool

    def __call__(
        self, x: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs and final states, from inputs (T, B, I) or packed and initial states (directions, B, H).

        In a mode with gradients, as the caller's is: on a CPU oneDNN has another kernel for the LSTM without.
        """
        run: Any = torch.lstm if self.lstm else torch.gru
        initial = tuple(state.detach() for state in states)
        hx = initial if self.lstm else initial[0]
        # torch multiplies a strided input (batch_first) in another order where the weights need gradients; there they
        # are seen to need them, and the graph of this is dropped at once.
        strided = x.stride() != torch.empty(x.shape, device="meta").stride()  # where an axis has one entry too
        flat = [weight.detach().requires_grad_(weight.requires_grad and strided) for weight in weights]
        how = (self.bias, 1, 0.0, self.training, self.bidirectional)
        x = x.detach()
        with torch.enable_grad():
            found = run(x, hx, flat, *how, False) if batch_sizes is None else run(x, batch_sizes, hx, flat, *how)
        return tuple(output.detach() for output in found)


@dataclass(frozen=True)
class Compiled:
    """This library's own forward of one layer, outside any graph; called as `Vendor` is."""

    lstm: bool
    bidirectional: bool
    keep: bool
    """Whether the gates are kept for the way back, which computes them again otherwise."""

    def __call__(
        self, x: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs, final states, and what is kept: of each direction, in the order it runs, the states c first."""
        (given,), lengths = _padded((x.detach(),), batch_sizes)
        count = len(weights) // (2 if self.bidirectional else 1)
        found = []
        for d in range(len(weights) // count):
            own = [weight.detach() for weight in weights[d * count : (d + 1) * count]]
            found.append(self._direction(_turned(given, d, lengths), own, [state[d].detach() for state in states]))
        outputs = [_turned(states[0], d, lengths) for d, (states, _) in enumerate(found)]
        y = outputs[0] if len(found) == 1 else torch.cat(outputs, -1)
        finals = [
            torch.stack([_last(state, lengths) for state in part]) for part in zip(*(s for s, _ in found), strict=True)
        ]
        y = y if lengths is None else pack_padded_sequence(y, lengths).data
        return y, *finals, *(tensor for _, kept in found for tensor in kept)

    def _direction(
        self, x: Tensor, weights: list[Tensor], initial: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pullback: Any
        keep: Keep = "gates" if self.keep else "states"
        if self.lstm:
            (h, c), pullback = lstm(LSTMParameters(*weights), x, (initial[0], initial[1]), keep=keep, backend=BACKEND)
            return (h, c), () if pullback.gates is None else (c, pullback.gates)
        h, pullback = gru(GRUParameters(*weights), x, initial[0], keep=keep, backend=BACKEND)
        return (h,), pullback.gates or ()


@dataclass(frozen=True)
class Options:
    """How one layer runs and is pulled back; it travels on the autograd context, so nothing ambient is read."""

    forward: Vendor | Compiled
    solver: Solver
    residual: LinearOperator | None
    followed: tuple[Followed, ...] = ()
    """The strong directions that the residual path takes, of each direction in time, where it does."""


class RecurrentLayer(torch.autograd.Function):
    """Inputs (T, B, I) or packed, initial states, weights -> the forward's outputs y, and final h (and c)."""

    @staticmethod
    def forward(ctx: Any, options: Options, batch_sizes: Tensor | None, x: Tensor, *tensors: Tensor) -> Any:
        """Run the layer and keep what the pullback needs."""
        ctx.set_materialize_grads(False)  # where no loss sees the final states, no cotangents of theirs are made
        ctx.options, ctx.count, ctx.given = options, 2 if options.forward.lstm else 1, len(tensors)
        outputs = options.forward(x, batch_sizes, tensors[: ctx.count], tensors[ctx.count :])
        outputs, kept = outputs[: 1 + ctx.count], outputs[1 + ctx.count :]
        # The caller may write into y, as into torch's own: the memory is shared all the same, and such a write noticed.
        ctx.writes, ctx.autocast = write_counter(outputs[0]), autocast_of(x)[0]
        ctx.written = ctx.writes._version
        ctx.save_for_backward(batch_sizes, x, outputs[0].data, *tensors, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinals: Tensor | None) -> tuple[Any, ...]:
        """The gradients of x, of the initial states and of the weights."""
        cotangents = (tensor for tensor in (dy, *dfinals) if tensor is not None)
        refuse_second_derivatives('iterations=None, exact="library"', *cotangents)
        batch_sizes, x, y, *rest = ctx.saved_tensors
        rest, kept = rest[: ctx.given], rest[ctx.given :]
        dy = torch.zeros_like(y) if dy is None else dy
        given = (x, *rest)
        if ctx.writes._version != ctx.written:
            with ctx.autocast():
                y = ctx.options.forward(x, batch_sizes, rest[: ctx.count], rest[ctx.count :])[0]
        wide = torch.promote_types(y.dtype, rest[-1].dtype)  # autocast: the weights may be wider than the states
        sequences, lengths = _padded((x, y, dy), batch_sizes)
        sequences = tuple(tensor.to(wide) for tensor in sequences)
        states, weights = ([tensor.to(wide) for tensor in part] for part in (rest[: ctx.count], rest[ctx.count :]))
        directions = len(states[0])
        count = len(weights) // directions
        dx, dstates, dweights = None, [], []
        for d in range(directions):
            own, initial = weights[d * count : (d + 1) * count], [state[d] for state in states]
            with without_autocast(dy.device.type):  # the dtype was chosen above
                seen = _seen(d, own[1].shape[1], sequences, dfinals, lengths)
                part = kept[d * len(kept) // directions : (d + 1) * len(kept) // directions]
                found, back, first = _pull(ctx.options, d, own, initial, *seen, part, ctx.needs_input_grad[2])
            if back is not None:
                back = _turned(back, d, lengths)
                dx = back if dx is None else dx + back
            dweights += found
            dstates.append(first)
        if batch_sizes is not None and dx is not None:
            dx = pack_padded_sequence(dx, lengths).data
        gradients = [dx, *map(torch.stack, zip(*dstates, strict=True)), *dweights]
        return (None, None, *(d if d is None else d.to(like.dtype) for d, like in zip(gradients, given, strict=True)))


def without_gradient(options: Options, batch_sizes: Tensor | None, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`RecurrentLayer` without its way back."""
    count = 2 if options.forward.lstm else 1
    return options.forward(x, batch_sizes, tensors[:count], tensors[count:])[: 1 + count]


def _seen(
    d: int, hidden: int, sequences: tuple[Tensor, ...], dfinals: tuple[Tensor | None, ...], lengths: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """What direction d sees, in its own order: inputs, states, and the cotangents of h (and c) at all steps, if any."""
    x, y, dy = sequences
    own = slice(d * hidden, (d + 1) * hidden)
    dh = _turned(dy[..., own], d, lengths)
    cotangents = [
        (None if n else dh)
        if final is None
        else _with_final(torch.zeros_like(dh) if n else dh, final[d].to(dh.dtype), lengths)
        for n, final in enumerate(dfinals)
    ]
    return _turned(x, d, lengths), _turned(y[..., own], d, lengths), cotangents


def _pull(
    options: Options,
    d: int,
    weights: list[Tensor],
    states: list[Tensor],
    x: Tensor,
    h: Tensor,
    cotangents: list[Tensor | None],
    kept: Sequence[Tensor],
    with_inputs: bool,
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
    """Direction d by its cell's pullback: gradients of the weights, perhaps the inputs, and the initial states."""
    pullback: Any
    given: Any
    if options.forward.lstm:
        c, gates = kept or (None, None)
        pullback = LSTMPullback(LSTMParameters(*weights), x, (states[0], states[1]), (h, c), BACKEND, gates)
        given = cotangents[0], cotangents[1]
    else:
        pullback = GRUPullback(GRUParameters(*weights), x, states[0], h, BACKEND, tuple(kept) or None)
        given = cotangents[0]
    split: Any = None
    if not options.solver.exact:  # which is exact under any split
        split = options.followed[d](weights[1]) if options.followed else options.residual
    dparams, dx, initial = pullback.pull(given, options.solver, split, with_inputs)
    return [d for d in dparams if d is not None], dx, initial if options.forward.lstm else (initial,)


def _padded(sequences: tuple[Tensor, ...], batch_sizes: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Packed data as (T, B, ...) padded with zeros, and the lengths; other sequences as they are.

    No cotangent enters behind a sequence's end, so that nothing comes from the padding.
    """
    if batch_sizes is None:
        return sequences, None
    padded = [pad_packed_sequence(PackedSequence(data, batch_sizes)) for data in sequences]
    return tuple(data for data, _ in padded), padded[0][1]


def _turned(x: Tensor, direction: int, lengths: Tensor | None) -> Tensor:
    """A sequence in the order its direction runs: reversed within its own length for direction 1."""
    if direction == 0:
        return x
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    ends = lengths.to(x.device)[None]
    source = torch.where(t < ends, ends - 1 - t, t)
    return x.gather(0, source[..., None].expand_as(x))


def _last(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence's last state."""
    if lengths is None:
        return states[-1]
    return states[lengths.to(states.device) - 1, torch.arange(len(lengths), device=states.device)]


def _with_final(cotangents: Tensor, final: Tensor, lengths: Tensor | None) -> Tensor:
    """The cotangents of all states with that of each sequence's last one added."""
    if lengths is None:
        return torch.cat([cotangents[:-1], (cotangents[-1] + final)[None]])
    at = (lengths.to(final.device) - 1, torch.arange(len(lengths), device=final.device))
    return cotangents.index_put(at, final, accumulate=True)
