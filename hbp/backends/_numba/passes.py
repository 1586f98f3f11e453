"""The way back through a cell's steps: exact, or in rounds of one product over all steps and one compiled pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hbp.backends._numba.arrays import dense, empty
from hbp.backends._numba.compile import as_numpy
from hbp.backends._numba.loops import APART, EXACT, ROUND
from hbp.backends._numba.products import Product
from hbp.backends._numba.tiles import BYTES
from hbp.core.backend import Array
from hbp.core.solver import Solver
from hbp.directions import Directions

Loop = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Span:
    """A span of steps on the way back, and where it writes."""

    loop: Callable[[Array], Loop]
    """The loop over the steps, given what was pulled back: called with the arrays of a round, how, and which steps."""
    carries: Sequence[Array]
    """The cotangents that leave a step, (B, H) each; the first gets the products with the weights."""
    d: Array
    """The cotangents of the pre-activations, (T, B, 4H)."""
    columns: slice
    """Those of ``d`` that belong to the product with the weights."""
    weight: Array
    backend: Any
    product: Product

    @property
    def rows(self) -> Array:
        """What the weights multiply, of all steps, (T * B, N)."""
        length, batch, width = self.d.shape
        return self.d.reshape((length * batch, width))[:, self.columns]

    def exact(self) -> None:
        """From the last step to the first, with the product ``carry += d[t] @ weight`` in the loop or behind each."""
        carry, length = self.carries[0], len(self.d)
        run, others = self.loop(carry[None]), _Round.none(as_numpy(carry)).arrays
        if self.product.way != "calls":
            self.product.run(
                lambda team, start, stop: run(*team, *others, EXACT, 0, length, start, stop), length, len(carry)
            )
            return
        step = partial(run, *self.product.alone, *others, APART)
        for t in range(length - 1, -1, -1):
            step(t, t + 1, 0, len(carry))
            self.backend.add_product(carry, self.d[t][:, self.columns], self.weight)

    def rounds(self, solver: Solver, directions: Directions | None, entering: Sequence[Array]) -> None:
        """A pass over all steps, then in turn a product that pulls all blocks back and a pass that adds what it gave.

        Args:
            solver: with chunks of one step.
            directions: of the weight, for the residual path.
            entering: what enters at the states from outside.
        """
        length, (batch, size) = len(self.d), self.carries[0].shape
        most = solver.most(length)
        pulled = empty(self.carries[0], (length if most else 1, batch, size))
        state = _Round.of(self, solver, directions, entering)
        run = partial(self.loop(pulled), *self.product.alone, *state.arrays)
        sizes: list[tuple[float, float]] = []
        for k in range(most + 1):
            if k:
                self.backend.xp.matmul(self.rows, self.weight, out=pulled.reshape((length * batch, size)))
                for own in self.carries:
                    own[...] = 0
            self.product.threads.run(partial(run, ROUND if k else APART, 0, length), batch, 64 * length * batch * size)
            if state.first:
                sizes.append(state.measured(self.carries))
                if solver.settled(sizes[-1]):
                    break
        if sizes:
            solver.tell(sizes, length)


@dataclass(frozen=True, eq=False)
class _Round:
    """The arrays that rounds hand on to each other, as the loops take them (`hbp.backends._numba.loops`)."""

    left: np.ndarray
    right: np.ndarray
    low: np.ndarray
    fresh: np.ndarray
    before: np.ndarray
    sizes: np.ndarray
    first: list[np.ndarray]
    """The cotangents of the first states, of the last round; none where nothing is measured."""

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The loops' arguments."""
        return self.left, self.right, self.low, self.fresh, self.before, self.sizes

    @classmethod
    def none(cls, carry: np.ndarray) -> _Round:
        """No directions, nothing measured."""
        matrix, cube = np.zeros((0, 0), carry.dtype), np.zeros((1, 0, 0), carry.dtype)
        return cls(matrix, matrix, cube, matrix, cube, np.zeros((0, 3)), [])

    @classmethod
    def of(cls, span: Span, solver: Solver, directions: Directions | None, entering: Sequence[Array]) -> _Round:
        """Before the first round."""
        length, carries = len(span.d), [as_numpy(carry) for carry in span.carries]
        batch, size = carries[0].shape
        state = cls.none(carries[0])
        if directions is not None:
            left, right = _in_vectors(*map(dense, directions.taken))
            low = np.zeros((length, batch, len(right)), left.dtype)
            state = cls(left, right, low, np.empty(low.shape[1:], low.dtype), state.before, state.sizes, [])
        if not solver.measures:
            return state
        largest = max((float(abs(array).max()) for array in map(as_numpy, entering) if array.size), default=0.0)
        factor = 1 / largest if 0 < largest < np.inf else 1.0
        sizes = np.repeat([[factor, 0.0, 0.0]], batch, 0)
        before = np.zeros((length, batch, len(carries) * size), carries[0].dtype)
        first = [np.zeros_like(carry) for carry in carries]
        return cls(state.left, state.right, state.low, state.fresh, before, sizes, first)

    def measured(self, carries: Sequence[Array]) -> tuple[float, float]:
        """The norms of what the last round changed and of the whole, of all states."""
        factor = self.sizes[0, 0] if len(self.sizes) else 1.0
        change, whole = self.sizes[:, 1:].sum(0)
        self.sizes[:, 1:] = 0
        for old, new in zip(self.first, map(as_numpy, carries), strict=True):
            change += float(np.sum(np.square((new - old) * factor, dtype=np.float64)))
            whole += float(np.sum(np.square(new * factor, dtype=np.float64)))
            old[...] = new
        return float(change**0.5 / factor), float(whole**0.5 / factor)


def _in_vectors(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both factors with zeros for further directions, up to whole vectors of the products' tiles."""
    more = -len(right) % (BYTES // left.itemsize)
    beside, below = np.zeros((len(left), more), left.dtype), np.zeros((more, right.shape[1]), left.dtype)
    return np.concatenate([left, beside], 1), np.concatenate([right, below])
