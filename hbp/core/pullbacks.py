"""Blocks and their pullbacks: all that a chain knows of its expensive part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from hbp.core.backend import Array, Backend, Pullback, check_shape, dtype_name
from hbp.core.registry import backend_of

Block: TypeAlias = Callable[[Array], tuple[Array, Pullback]]
"""A differentiable function: x -> (y, pullback)."""


class Pullbacks(Protocol):
    """The pullbacks of L blocks, applied all at once or one by one."""

    traceable: bool
    """Whether `at` accepts an index known only at run time, as inside a compiled loop."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> Pullbacks: ...

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        """Pull cotangents of the L block outputs, shape (L, ...), back to the L block inputs."""

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        """Pull one cotangent back through block i."""


@dataclass(frozen=True, eq=False)
class PullbackList:
    """Pullbacks given as one callable per block; ``numbers`` are the blocks' own, for messages."""

    pullbacks: Sequence[Pullback]
    numbers: Sequence[int]
    traceable = False

    def __len__(self) -> int:
        return len(self.pullbacks)

    def __getitem__(self, index: slice) -> PullbackList:
        return PullbackList(self.pullbacks[index], self.numbers[index])

    def __call__(self, cotangents: Array, backend: Backend) -> Array:
        pulled = backend.map(self.pullbacks, [cotangents[i] for i in range(len(self))])
        return backend.stack([self._checked(i, new, cotangents[i]) for i, new in enumerate(pulled)])

    def at(self, i: Any, cotangent: Array, backend: Backend) -> Array:
        return self._checked(i, self.pullbacks[i](cotangent), cotangent)

    def _checked(self, i: int, pulled: Array, cotangent: Array) -> Array:
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
