"""One layer of a recurrent net in PyTorch's autograd: outputs computed beforehand, pulled back by hbp's cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hbp.backends.torch.autograd import refuse_second_derivatives
from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.core.operator import LinearOperator
from hbp.core.solver import Solver


@dataclass(frozen=True)
class Options:
    """How one backward pass is computed; it travels on the autograd context, so nothing ambient is read."""

    lstm: bool
    solver: Solver
    residual: LinearOperator | None


class RecurrentLayer(torch.autograd.Function):
    """Inputs (T, B, I) or packed, initial states, the vendor's outputs and final states, weights -> the outputs."""

    @staticmethod
    def forward(ctx: Any, options: Options, batch_sizes: Tensor | None, x: Tensor, *tensors: Tensor) -> Any:
        """Keep what the pullback needs and pass the outputs on: y, and the final h (and c)."""
        count = 2 if options.lstm else 1
        states, outputs, weights = tensors[:count], tensors[count : 2 * count + 1], tensors[2 * count + 1 :]
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(batch_sizes, x, outputs[0], *states, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dfinals: Tensor) -> tuple[Any, ...]:
        """The gradients of x, of the initial states and of the weights."""
        refuse_second_derivatives('iterations=None, exact="library"')
        batch_sizes, x, y, *rest = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, rest[-1].dtype)  # autocast: the weights may be wider than the states
        given = (x, *rest)
        sequences, lengths = _padded((x, y, dy), batch_sizes)
        x, y, dy = (tensor.to(wide) for tensor in sequences)
        states, weights = ([tensor.to(wide) for tensor in part] for part in (rest[: ctx.count], rest[ctx.count :]))
        directions, hidden = len(states[0]), states[0].shape[-1]
        count = len(weights) // directions
        dx, dstates, dweights = None, [[] for _ in states], []  # type: ignore[var-annotated]
        for d in range(directions):
            own = slice(d * hidden, (d + 1) * hidden)
            dh = _turned(dy[..., own], d, lengths)
            cotangents = [
                _with_final(dh if n == 0 else torch.zeros_like(dh), final[d].to(wide), lengths)
                for n, final in enumerate(dfinals)
            ]
            with torch.autocast(dy.device.type, enabled=False):  # the dtype was chosen above
                found, back, initial = _pull(
                    ctx.options,
                    weights[d * count : (d + 1) * count],
                    _turned(x, d, lengths),
                    [state[d] for state in states],
                    _turned(y[..., own], d, lengths),
                    cotangents,
                    ctx.needs_input_grad[2],
                )
            if back is not None:
                back = _turned(back, d, lengths)
                dx = back if dx is None else dx + back
            dweights += found
            for gathered, one in zip(dstates, initial, strict=True):
                gathered.append(one)
        if batch_sizes is not None and dx is not None:
            dx = pack_padded_sequence(dx, lengths).data
        gradients = [dx, *map(torch.stack, dstates), *dweights]
        dx, *others = (d if d is None else d.to(like.dtype) for d, like in zip(gradients, given, strict=True))
        return (None, None, dx, *others[: ctx.count], *[None] * (ctx.count + 1), *others[ctx.count :])


def _pull(
    options: Options,
    weights: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    h: Tensor,
    cotangents: list[Tensor],
    with_inputs: bool,
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, ...]]:
    """One direction by its cell's pullback: gradients of the weights, perhaps the inputs, and the initial states."""
    pullback: Any
    if options.lstm:
        pullback = LSTMPullback(LSTMParameters(*weights), x, (states[0], states[1]), (h, None), BACKEND)
        given: Any = (cotangents[0], cotangents[1])
    else:
        pullback, given = GRUPullback(GRUParameters(*weights), x, states[0], h, BACKEND), cotangents[0]
    residual = None if options.solver.exact else options.residual  # exact under any split
    dparams, dx, initial = pullback(given, residual=residual, solver=options.solver, with_inputs=with_inputs)
    return [d for d in dparams if d is not None], dx, initial if options.lstm else (initial,)


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


def _with_final(cotangents: Tensor, final: Tensor, lengths: Tensor | None) -> Tensor:
    """The cotangents of all states with that of each sequence's last one added."""
    if lengths is None:
        return torch.cat([cotangents[:-1], (cotangents[-1] + final)[None]])
    at = (lengths.to(final.device) - 1, torch.arange(len(lengths), device=final.device))
    return cotangents.index_put(at, final, accumulate=True)
