"""The way back through all steps of a cell: products over spans of time around one loop over their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from hbp.backends._numba.arrays import empty, zeros
from hbp.backends._numba.compile import Threads
from hbp.backends._numba.passes import Loop, Span
from hbp.backends._numba.products import Product
from hbp.core.backend import Array
from hbp.core.solver import Solver
from hbp.directions import Directions

SPAN = 1 << 20
"""Numbers in the largest array of a span of time: it stays in the caches, and in memory that was written before."""
EXACT = Solver()


@dataclass(frozen=True, eq=False)
class How:
    """How a way back is solved: exact, in rounds on single steps, perhaps with directions in the path, or on stages."""

    solver: Solver
    directions: Directions | None
    """Of the recurrent weights; on single steps alone."""
    threads: Threads
    least: int = 8
    """Steps of a span, at least, so that few go through the weights' gradients."""
    spans: int = 1
    """At least so many: no array for all of them."""

    @property
    def in_stages(self) -> bool:
        """Whether in rounds on stages of several steps."""
        return not self.solver.exact and self.solver.chunk > 1


@dataclass(frozen=True)
class Columns:
    """Which columns of the pre-activations' cotangents go into which products."""

    inputs: tuple[tuple[slice, slice], ...]
    """Those of the product with the inputs' weights, each with the rows of the weights."""
    recurrent: slice
    """Those of the product with the states' weights."""


@dataclass(frozen=True, eq=False)
class WayBack:
    """The way back through all steps of either cell: exact, in spans of time, or in rounds over all steps at once."""

    task: str
    """Whose times tell who multiplies, as "gru backward"."""
    pullback: Any
    """The cell's."""
    states: tuple[Array, Array]
    """h, the initial ones and all others."""
    steps: Callable[[int, int, Array, Array], Loop]
    """The loop over the steps from a to b, given a, b, where ``d`` goes, the cotangents of the pre-activations,
    (b - a, B, 4H), and what was pulled back.
    """
    entering: Sequence[Array]
    """The cotangents given from outside."""
    carries: Sequence[Array]
    """What else there is of the last states' cotangents, set before each go; those of the first come in its place."""
    columns: Columns
    """Those of ``d`` in each product."""
    how: How

    def go(self) -> None:
        """Find the carries alone."""
        for _ in self._spans():
            pass

    def gradients(self, with_inputs: bool) -> tuple[Array, Array, Array, Array | None]:
        """Go; returns the gradients of both weights, the sums of ``d``, and dx where it is wanted."""
        x, (h0, h), carry = self.pullback.x, self.states, self.carries[0]
        params, backend, (batch, size) = self.pullback.params, self.pullback.backend, carry.shape
        inputs, recurrent = empty(carry, params.weight_ih.shape), empty(carry, params.weight_hh.shape)
        bias, dx = zeros(carry, (4 * size,)), None
        for a, b, rows in self._spans():
            add = backend.add_product if b < len(x) else partial(_put, backend)  # a matrix of zeros would take its time
            given = x[a:b].reshape((len(rows), x.shape[-1]))
            for part, gates in self.columns.inputs:
                add(inputs[gates], rows[:, part].T, given)
            first = 0 if a else batch  # the rows whose states lie apart
            by_state = rows[:, self.columns.recurrent]
            add(recurrent, by_state[first:].T, h[max(a - 1, 0) : b - 1].reshape((len(rows) - first, size)))
            if first:
                backend.add_product(recurrent, by_state[:first].T, h0)
            bias += rows.sum(0)
            if with_inputs:
                dx = empty(carry, x.shape) if dx is None else dx  # not while rounds hold their arrays
                self._pull_inputs(rows, dx[a:b].reshape(given.shape))
        return inputs, recurrent, bias, dx

    def _pull_inputs(self, rows: Array, dx: Array) -> None:
        """Put the inputs' cotangents into ``dx``, (N, I), from the pre-activations', (N, 4H)."""
        backend, add = self.pullback.backend, partial(_put, self.pullback.backend)
        for part, gates in self.columns.inputs:
            add(dx, rows[:, part], self.pullback.params.weight_ih[gates])
            add = backend.add_product

    @cached_property
    def _product(self) -> Product:
        (batch, size), weight = self.carries[0].shape, self.pullback.params.weight_hh
        if not self.how.solver.exact:
            return Product.called(weight, size, self.how.threads)
        length, backend = len(self.pullback.x), self.pullback.backend
        return Product.of(self.task, backend, weight, size, length, batch, self.how.threads)

    @cached_property
    def _d(self) -> Array:
        """Room for a span's, (steps, B, 4H)."""
        carry, steps = self.carries[0], len(self.pullback.x)
        batch, size = carry.shape
        if self.how.solver.exact:
            steps = min(max(SPAN // max(4 * size * batch, 1), self.how.least), -(-steps // self.how.spans))
        return empty(carry, (steps, batch, 4 * size))

    def _spans(self) -> Iterator[tuple[int, int, Array]]:
        """Solve each span, the last first; yields its first step, the one behind its last, and ``d`` as rows."""
        pullback, columns = self.pullback, self.columns.recurrent
        for b in range(len(pullback.x), 0, -len(self._d)):
            a = max(b - len(self._d), 0)
            d = self._d[: b - a]
            loop, weight = partial(self.steps, a, b, d), pullback.params.weight_hh
            span = Span(loop, self.carries, d, columns, weight, pullback.backend, self._product)
            if self.how.solver.exact:
                span.exact()
            else:
                span.rounds(self.how.solver, self.how.directions, self.entering)
            yield a, b, d.reshape((d.shape[0] * d.shape[1], d.shape[2]))


def _put(backend: Any, product: Array, rows: Array, weight: Array) -> None:
    """The product of two matrices, written into a third."""
    backend.xp.matmul(rows, weight, out=product)
