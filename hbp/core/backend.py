"""What an array library must offer: the `Backend` protocol, and the checks every entrance makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import index
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any
Pullback: TypeAlias = Callable[[Array], Array]
"""The transposed Jacobian of a function at a point: cotangent of the output -> cotangent of the input."""


class Gauge(Protocol):
    """What is measured of the states of an iteration, when that ends it, and who is told."""

    def measure(self, state: Any) -> tuple[float, float]:
        """Two numbers (`Backend.norm`)."""

    def settled(self, sizes: tuple[float, float]) -> Any:
        """Whether the iteration ends."""

    def told(self, sizes: Sequence[tuple[float, float]]) -> None:
        """Take the numbers of all states, when the iteration has ended."""


class Backend(Protocol):
    """The six operations of an array library, two loops, kernels, two of chains over devices, and two for people.

    Nothing is created without a template array, so dtype and device always come from an argument.
    Implementations leave their arguments unchanged.
    """

    name: str
    xp: Any
    """The library's NumPy-like namespace (``tanh``, ``diag``)."""

    def concat(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Join arrays along an existing axis."""

    def stack(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Join arrays of one shape along a new axis."""

    def zeros_like(self, x: Array) -> Array:
        """Zeros with the shape, dtype and device of ``x``."""

    def map(self, pullbacks: Sequence[Pullback], cotangents: Sequence[Array]) -> list[Array]:
        """All ``pullbacks[i](cotangents[i])``, in any order, at once where the library can."""

    def vjp(self, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Pullback]:
        """``fn(x)`` and its pullback at ``x``."""

    def propagate(self, operator: Any, c: Array) -> Array:
        """Solve ``g[i] = A[i] g[i+1] + c[i]``, ``g[L] = c[L]`` for a `LinearOperator` (`hbp.core.scan.sequential`)."""

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, rows: Array | int, reverse: bool = False) -> Any:
        """The carries after each ``carry = step(carry, row)``, stacked in the rows' order (`hbp.core.scan.loop`)."""

    def repeat(self, step: Callable[[Any], Any], state: Any, most: int, gauge: Gauge | None = None) -> Any:
        """``state = step(state)``, ``most`` times, or until the gauge says that the last state is settled."""

    def kernel(self, name: str, *arrays: Array) -> Callable[..., Any] | None:
        """The compiled form of a plain definition for such arrays, or None where the plain one runs."""

    def total(self, length: int) -> int:
        """The length of the whole chain, of which ``length`` layers are here; `propagate` and `norm` take in all."""

    def norm(self, x: Array) -> float:
        """The Euclidean norm of all entries of the chain's states: a Python float, or an array while it is traced."""

    def device(self) -> str:
        """Where new arrays live, for people."""

    def kernel_state(self) -> str:
        """Which kernels run, or why the plain definitions do, for people."""


def dtype_name(x: Array) -> str:
    """The name of an array's dtype in any library, as "float32"."""
    return str(x.dtype).rpartition(".")[2]  # without the library's name


def check_floating(**arrays: Array) -> None:
    """Raise TypeError unless every array holds real floating-point numbers, all of one dtype."""
    kinds = {name: dtype_name(array) for name, array in arrays.items()}
    for name, kind in kinds.items():
        if kind[0] in "<>":
            raise TypeError(f"{name} is {kind}, in a byte order not this machine's; cast it, as by x.astype(float)")
        if not kind.startswith(("float", "bfloat")):
            raise TypeError(f"{name} is {kind}; gradients need real floating-point numbers, cast it first")
    if len(set(kinds.values())) > 1:
        raise TypeError(f"all arrays need one dtype, these differ: {kinds}; cast them first")


def check_shape(name: str, x: Array, expected: Sequence[int]) -> None:
    """Raise ValueError unless ``x`` has the expected shape."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}")


def check_count(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int, after checking that it is one and at least ``minimum``.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below the minimum.
    """
    count = None
    with suppress(TypeError):
        count = None if type(value).__name__ in ("bool", "bool_") else index(value)  # NumPy's too
    if count is None:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an integer of at least {minimum}")
    if count < minimum:
        raise ValueError(f"{name}={count} is too small; give an integer of at least {minimum}")
    return count


def check_kind(name: str, value: Any, kind: Any, cure: str) -> None:
    """Raise TypeError unless ``value`` is of a kind, as `isinstance` takes it; ``cure`` says what to give."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; give {cure}")
