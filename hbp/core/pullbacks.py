"""The pullbacks of maps in a chain: what a chain knows of its expensive part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from hbp.core.backend import Array, Backend, Pullback, check_shape, dtype_name
from hbp.core.registry import backend_of


class Pullbacks:
    """The pullbacks of L maps, applied all at once or one by one; subclasses give the first three.

    They leave their arguments unchanged and return arrays of their own; `PullbackList` sees to the first for callables.
    """

    traceable = False
    """Whether `at` accepts an index known only at run time, as inside a compiled loop."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: slice) -> Pullbacks:
        raise NotImplementedError

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        """Pull cotangents of the L outputs, shape (L, ...), back to the L inputs."""
        raise NotImplementedError

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        """Pull one cotangent back through map i."""
        return self[i : i + 1](cotangent[None], backend)[0]

    def bind(self, like: Array, backend: Backend) -> Self:
        """These pullbacks, checked against states like ``like`` (`LinearOperator.bind`)."""
        return self


@dataclass(frozen=True, eq=False)
class PullbackList(Pullbacks):
    """Pullbacks given as one callable per block; ``numbers`` are the blocks' own, for messages."""

    pullbacks: Sequence[Pullback]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> PullbackList:
        return PullbackList(self.pullbacks[index], self.numbers[index])

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        rows = [*backend.concat([cotangents])]  # a pullback may write into what it is given
        new = zip(self.numbers, backend.map(self.pullbacks, rows), rows, strict=True)
        return backend.stack([check_same(f"what the pullback of block {i} returned", g, row) for i, g, row in new])

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        pulled = self.pullbacks[i](backend.concat([cotangent[None]])[0])
        return check_same(f"what the pullback of block {self.numbers[i]} returned", pulled, cotangent)


def check_same(what: str, new: Array, old: Array) -> Array:
    """``new``, after checking that it has the library, shape and dtype of ``old``, as a chain needs."""
    if not hasattr(new, "shape") or not hasattr(new, "dtype"):
        raise TypeError(f"{what} is a {type(new).__name__}; expected an array of shape {tuple(old.shape)}")
    check_shape(what, new, old.shape)
    if backend_of(new) != backend_of(old):
        raise TypeError(f"{what} belongs to {backend_of(new)}, its input to {backend_of(old)}; nothing is converted")
    if dtype_name(new) != dtype_name(old):
        raise TypeError(f"{what} is {dtype_name(new)}, its input {dtype_name(old)}; keep one dtype along the chain")
    return new
