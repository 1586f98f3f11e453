"""Drop-in `torch.nn.GRU` and `torch.nn.LSTM` whose backward pass is Highway-BP or an exact adjoint without a graph.

The forward is the vendor's own kernel, or a compiled one where that is faster, layer by layer on detached tensors, in
the caller's grad mode. Saved for the backward are each layer's inputs and outputs and, where a compiled forward keeps
them, the gates; else these are computed again, for all steps at once, and the LSTM's states c by a scan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hbp.backends.torch.autograd import opaque, refuse_transforms, transformed
from hbp.backends.torch.options import Ranked
from hbp.backends.torch.recurrent.adjoint import BACKEND
from hbp.backends.torch.recurrent.choice import Exact, Path, choose
from hbp.backends.torch.recurrent.following import Followed, check
from hbp.backends.torch.recurrent.inputs import Sequence, checked, reordered, unbatched
from hbp.backends.torch.recurrent.layer import Compiled, Options, RecurrentLayer, Vendor, without_gradient
from hbp.cells._common import Keep, check_keep
from hbp.core.operator import LinearOperator
from hbp.core.schedule import Schedule
from hbp.core.solver import Solver
from hbp.directions import Directions, Rank


class _Recurrent(Ranked, torch.nn.RNNBase):
    """What `GRU` and `LSTM` share. Their options are plain attributes; each forward reads them."""

    compiled: bool | None = False  # here for layers that were stored before there were these options
    keep: Keep = "gates"
    followed: tuple[Followed, ...] = ()
    """What follows the strong directions of each direction of each layer, where there is a rank."""

    def __init__(
        self,
        *args: Any,
        iterations: int | Schedule | None = None,
        chunk: int = 1,
        tolerance: float | None = None,
        solver: Solver | None = None,
        residual: LinearOperator | None = None,
        exact: Exact | None = None,
        compiled: bool | None = None,
        keep: Keep = "gates",
        rank: int | Literal["auto"] = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.proj_size:
            raise ValueError("proj_size is not supported; use torch.nn.LSTM, or a Linear after a layer without it")
        self.solver = Solver.of(solver, iterations=iterations, chunk=chunk, tolerance=tolerance)
        self.residual = residual
        self.exact, self.compiled, self.keep = exact, compiled, keep
        self.options()
        self.rank = rank

    @property
    def rank(self) -> Rank:
        """How many strong directions of the recurrent weights the residual path takes; setting it checks it."""
        return self.followed[0].rank if self.followed else 0

    @rank.setter
    def rank(self, rank: Any) -> None:
        rank = self.check_rank(rank)
        self.followed = tuple(Followed(rank, name) for name in self.recurrent_weights) if rank else ()

    def check_rank(self, rank: Any) -> Rank:
        return check(rank, self.hidden_size, self.residual)

    @property
    def recurrent_weights(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight_hh")]

    @property
    def directions(self) -> list[Directions | None]:
        """What the last backward pass took, of each direction of each layer: None before, and nothing at rank 0."""
        return [followed.latest for followed in self.followed]

    def options(self) -> Options:
        """The checked options of the next backward pass, the schedule's value for this training step among them.

        Raises:
            TypeError, ValueError: an attribute is not what its name says.
        """
        if self.exact not in (None, "adjoint", "library"):
            raise ValueError(f"exact={self.exact!r}; give 'adjoint', 'library', or None for the faster one")
        if self.compiled not in (None, True, False):
            raise ValueError(
                f"compiled={self.compiled!r}; give True for this library's forward, False for PyTorch's, bit for bit, "
                "or None for the faster one"
            )
        check_keep(self.keep)
        if self.residual is not None and not isinstance(self.residual, LinearOperator):
            raise TypeError(f"residual is a {type(self.residual).__name__}; give an operator, as hbp.Zero(), or None")
        self.check_rank(self.rank)
        forward = Vendor(self.mode == "LSTM", self.bias, self.training, self.bidirectional)
        return Options(forward, self.current(), self.residual)

    def path(self, input: Any) -> Path:  # noqa: A002
        """Who computes forward and backward for such an input, and why: what ``compiled`` and ``exact`` leave open is
        what was measured fastest at the nearest size, by ``hbp tune`` or as shipped.

        Where something transforms the call (`torch.func`, forward mode, a tracer, `torch.export`), exact backprop is
        torch's own.

        Raises:
            TypeError, ValueError, RuntimeError: by kind, dtype, dimensions or features it is no input here.

        >>> GRU(8, 8, iterations=3, compiled=False).path(torch.randn(5, 1, 8))
        Path(forward='library', backward='rounds', why='pinned')
        """
        data, _ = checked(self.mode, input, None, self._flat_weights[0], self.input_size)
        return self._path(input, data, self.options().solver.exact, (data, *self._flat_weights))

    def _path(self, input: Any, data: Tensor, is_exact: bool, tensors: tuple[Tensor, ...]) -> Path:  # noqa: A002
        if is_exact and transformed():
            return Path("library", "library", "something transforms the call, which takes torch's own graph")
        if is_exact and self.exact == "library":
            return Path("library", "library", "pinned")
        chosen: Path = self._chosen(input, data, is_exact, tensors)
        return chosen

    @opaque  # a compiler sees no table of times
    def _chosen(self, input: Any, data: Tensor, is_exact: bool, tensors: tuple[Tensor, ...]) -> Path:  # noqa: A002
        if isinstance(input, PackedSequence):
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        else:
            single, time = data.dim() == 2, int(self.batch_first and data.dim() == 3)
            steps, batch = data.shape[time], 1 if single else data.shape[1 - time]
        compiled = bool(data.numel()) and self.compiled is not False and BACKEND.compiled(self.mode, tensors)
        size = (steps, batch, self.hidden_size)
        return choose(self.mode, data, size, compiled, (self.compiled, self.exact, self.keep, is_exact))

    def extra_repr(self) -> str:
        own = f", solver={self.solver}"
        own += "" if self.residual is None else f", residual={self.residual}"
        own += f", rank={self.rank!r}" if self.rank else ""
        own += "" if self.exact is None else f", exact={self.exact!r}"
        own += "" if self.compiled is None else f", compiled={self.compiled}"
        own += "" if self.keep == "gates" else f", keep={self.keep!r}"
        return f"{super().extra_repr()}{own}"

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - the vendor's name
        options = self.options()
        self._update_flat_weights()  # as torch's forward does: others may have put new tensors in place of the weights
        data, given = checked(self.mode, input, hx, self._flat_weights[0], self.input_size)
        if not options.solver.exact:
            refuse_transforms()
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *given, *self._flat_weights))
        path = self._path(input, data, options.solver.exact, (data, *given, *self._flat_weights))
        own = path.forward == "compiled"
        if path.backward == "library" or not (tracked or own):
            return super().forward(input, hx)
        if own:
            kept = tracked and self.keep == "gates"
            options = replace(options, forward=Compiled(self.mode == "LSTM", self.bidirectional, kept))
        return self._highway(input, hx, given, options)

    @opaque  # one break of a compiled graph
    def _highway(self, input: Any, hx: Any, given: tuple[Tensor, ...], options: Options) -> Any:  # noqa: A002
        if transformed():  # by what the compiler hid
            return self.forward(input, hx)
        if isinstance(input, PackedSequence):
            order, back = input.sorted_indices, input.unsorted_indices
            sequence = Sequence(input.data, input.batch_sizes, int(input.batch_sizes[0]))
            y, finals = self._layers(sequence, self._initial(sequence, given, order), options)
            return PackedSequence(y, input.batch_sizes, order, back), self._finals(finals, back)
        batched = input.dim() == 3
        if not batched:
            input, given = unbatched(input, given)  # noqa: A001
        elif self.batch_first:
            input = input.transpose(0, 1)  # noqa: A001
        sequence = Sequence(input, None, input.shape[1])
        y, finals = self._layers(sequence, self._initial(sequence, given, None), options)
        if not batched:
            return y[:, 0], self._finals(tuple(state[:, 0] for state in finals), None)
        return y.transpose(0, 1) if self.batch_first else y, self._finals(finals, None)

    def _initial(self, x: Sequence, given: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
        """The initial states, (layers x directions, B, H) each, in the order of the batch, checked."""
        shape = (self.num_layers * (2 if self.bidirectional else 1), x.batch, self.hidden_size)
        if not given:
            zeros = torch.zeros(shape, dtype=x.data.dtype, device=x.data.device)
            return (zeros,) * (2 if self.mode == "LSTM" else 1)
        for state in given:
            if tuple(state.shape) != shape:
                raise RuntimeError(f"an initial state has shape {tuple(state.shape)}, expected {shape}")
        return reordered(given, order)

    def _finals(self, finals: tuple[Tensor, ...], order: Tensor | None) -> Any:
        ordered = reordered(finals, order)
        return ordered if self.mode == "LSTM" else ordered[0]

    def _layers(
        self, sequence: Sequence, states: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers, with dropout between them: the outputs and the final states."""
        x, directions = sequence.data, 2 if self.bidirectional else 1
        count = len(self._flat_weights) // self.num_layers
        finals = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            weights = self._flat_weights[layer * count : (layer + 1) * count]
            own = tuple(state[layer * directions : (layer + 1) * directions] for state in states)
            run = RecurrentLayer.apply if torch.is_grad_enabled() else without_gradient
            if self.followed:
                options = replace(options, followed=self.followed[layer * directions : (layer + 1) * directions])
            x, *final = run(options, sequence.batch_sizes, x, *own, *weights)
            finals.append(final)
        return x, tuple(state[0] if len(state) == 1 else torch.cat(state) for state in zip(*finals, strict=True))


class GRU(_Recurrent, torch.nn.GRU):
    """`torch.nn.GRU` with another backward pass: the same constructor, state_dict and values.

    Args:
        *args, **kwargs: those of `torch.nn.GRU`.
        iterations: Highway-BP's k, a `Schedule` of it (advanced by `hbp.backends.torch.step`), or None for exact.
        chunk: steps per chunk.
        tolerance: stop when the last increment is at most this fraction of the gradient, or is not finite;
            ``iterations`` is the cap.
        solver: these three in one `hbp.Solver`, instead; all are attributes afterwards.
        residual: another residual path than the update gate's, as ``hbp.Zero()`` for the fixed point.
        rank: how many strong directions of each layer's recurrent weights the residual path takes beside the gate's
            diagonal (`hbp.directions`): a number, or "auto" for those above the flat edge of their spectrum and four
            more, a change of which the log "hbp" tells at INFO. Each backward pass takes them from the weights as they
            are, by a step of subspace iteration (two products with the weight's 3 H x H, or 4 H x H, by the rank) from
            those before, the first by a singular value decomposition. ``directions`` lists them. Exact backprop ignores
            them.
        exact: pins what None means: "adjoint" (this library's, without a graph) or "library" (torch's own).
        compiled: pins whether the forward on a CPU is this library's, compiled by Numba, in training and evaluation:
            off torch's by rounding (at initial weights less than 1e-6 in float32, 1e-14 in float64); False is torch's,
            bit for bit; None the faster one at the input's length and batch size, which `path` tells. Torch's own
            runs where there is none: on other devices, under autocast, in half precision, with ``exact="library"``.
        keep: what is kept for the backward: "gates" (fastest), or "states", the least memory, by which PyTorch's own
            exact backward is only taken where ``exact="library"`` asks for it; on a GPU, too, where it is faster.

    Outputs may be written into, as torch's own, but for writes that torch does not count, through ``.data`` or NumPy:
    those must wait for the backward. Second derivatives and batched cotangents need ``iterations=None,
    exact="library"``. Under `torch.func`, forward mode, tracers and `torch.export`, ``iterations=None`` is torch's own
    path, and Highway-BP is refused where gradients are on; `torch.compile` breaks its graph here once.

    >>> layer = GRU(3, 8, iterations=3, chunk=4)
    >>> y, h = layer(torch.randn(20, 2, 3))
    >>> y.sum().backward()
    """


class LSTM(_Recurrent, torch.nn.LSTM):
    """`torch.nn.LSTM` with another backward pass; arguments as for `GRU`. ``proj_size`` is refused.

    >>> y, (h, c) = LSTM(3, 8, iterations=3)(torch.randn(20, 2, 3))
    >>> y.shape
    torch.Size([20, 2, 8])
    """
