"""Who multiplies each step's numbers by the recurrent weights, and with which parts of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from hbp.backends._kernels import LOG
from hbp.backends._numba.compile import Threads, as_numpy, compiled, index, own_threads, reads, writes
from hbp.backends._numba.meeting import POSIX, meeting
from hbp.backends._numba.tiles import BYTES, PANEL
from hbp.backends._tuning import expected, fastest
from hbp.core.backend import Array

Way: TypeAlias = Literal["loop", "shared", "calls"]
"""Compiled loops multiply, each thread for its part of the batch, or of the units; or the library's product does."""
Team: TypeAlias = tuple[np.ndarray, int, np.ndarray, int]
"""The loops' ``weight, own, meeting, me`` (`hbp.backends._numba.loops`)."""

LATE = 10
"""Times of what was measured that a step with shared units takes at most, unless threads are kept from running."""
CROWDED = 10.0
"""Seconds in which they are not shared then: the compiled loop, which waits for nobody, finds the same numbers."""

BLOCK = 64
"""Rows of a panel that are filled at once: they and what they come from are in the first cache."""

MOST = 4
"""The most threads that share units: at every step all wait for the last. Two were there when times were measured."""


@dataclass(frozen=True, eq=False)
class Product:
    """The product of each step with the recurrent weights, (K, gates H), and the threads that go through the steps."""

    way: Way
    weight: np.ndarray
    """(parts, P, K, some): of each part of the units all gates' columns, in `panels`; without numbers for "calls"."""
    own: int
    """The units of a part, the last of which may have fewer."""
    work: int
    """Multiplications of a step, for each entry of the batch."""
    threads: Threads
    late: float = math.inf
    """Seconds of a step from which on threads that share units have waited for one that others keep from running."""

    @classmethod
    def of(
        cls, task: str, backend: Any, weight: Array, size: int, length: int, batch: int, threads: Threads | None
    ) -> Product:
        """The fastest way of a task, as "gru forward", at hidden size ``size``, for so many steps of a batch."""
        whole, threads = as_numpy(weight), threads or own_threads()
        among = ways(threads, size, batch, whole.itemsize)
        way = cast(Way, fastest(task, backend.name, batch, size, among, length))
        if way == "calls":
            return cls.called(weight, size, threads)
        if way == "shared" and time.monotonic() < _crowded.until:
            way = "loop"
        if way == "loop":
            return cls(way, panels(whole, size, size), size, whole.size, threads)
        own, late = _own(threads, size, whole.itemsize), LATE * expected(task, backend.name, batch, size, way)
        return cls(way, panels(whole, size, own), own, whole.size, threads, late)

    @classmethod
    def called(cls, weight: Array, size: int, threads: Threads) -> Product:
        """Calls of the library's product, whatever was measured."""
        whole = as_numpy(weight)
        return cls("calls", np.zeros((1, 0, 0, 0), whole.dtype), size, whole.size, threads)

    @property
    def alone(self) -> Team:
        """Of a thread that goes through all parts."""
        return self.weight, self.own, meeting(1), 0

    def run(self, loop: Callable[[Team, int, int], None], length: int, batch: int) -> None:
        """Call ``loop(team, start, stop)`` in each thread, with its part of the batch or of the units."""
        if self.way == "shared":
            counters, members = meeting(len(self.weight)), [(me, me + 1) for me in range(len(self.weight))]
            start = time.monotonic()
            self.threads.spread(lambda me, _: loop((self.weight, self.own, counters, me), 0, batch), members)
            if time.monotonic() - start > length * self.late:
                _crowded.found()
        else:
            self.threads.run(partial(loop, self.alone), batch, length * batch * self.work)


@dataclass
class _Crowded:
    """Until when units are not shared, because other processes were found to keep this one's threads from running."""

    until: float = -math.inf

    def found(self) -> None:
        """From now on for some seconds; said once."""
        if math.isinf(self.until):
            LOG.warning(
                "threads that share a recurrent layer's units wait too long for each other, as other processes keep "
                "them from running; each time the batch alone is divided for %g s; give the processes fewer threads",
                CROWDED,
            )
        self.until = time.monotonic() + CROWDED


_crowded = _Crowded()


def ways(threads: Threads, size: int, batch: int, itemsize: int) -> tuple[Way, ...]:
    """Those that there are for some threads, units and batch entries: units are not shared where the batch keeps more
    threads busy than may share them.
    """
    several = POSIX and _own(threads, size, itemsize) < size and min(threads.count, batch) <= MOST
    return ("loop", "calls", "shared") if several else ("loop", "calls")


def _own(threads: Threads, size: int, itemsize: int) -> int:
    """The units of each thread's part: whole vectors."""
    lanes = BYTES // itemsize
    return -(-size // (min(threads.count, MOST) * lanes)) * lanes


def panels(weight: np.ndarray, size: int, own: int) -> np.ndarray:
    """The columns of a matrix, (K, gates * size), as panels of each part of the units, (parts, P, K, some).

    A part has ``own`` units of each gate, the last perhaps fewer; its columns stand in panels side by side, the last
    filled up with zeros. A panel is read from its first number to its last; going down a large matrix's columns took up
    to twice the time.
    """
    (length, width), most = weight.shape, PANEL // weight.itemsize
    parts, columns = -(-size // own) if size else 1, own * (width // size) if size else 0
    found = np.zeros((parts, -(-columns // most), length, most), weight.dtype)
    _fill(found.dtype)(weight, found, size, own)
    return found


@compiled(reads(2), writes(4), index, index)
def _fill(weight: np.ndarray, found: np.ndarray, size: int, own: int) -> None:
    """Block by block: what is read lies in the first cache, whatever the matrix' order."""
    length, most, gates = weight.shape[0], found.shape[3], weight.shape[1] // max(size, 1)
    for part in range(found.shape[0]):
        units = min(own, size - part * own)
        for p in range(found.shape[1]):
            for first in range(0, length, BLOCK):
                last = min(first + BLOCK, length)
                for j in range(min(most, gates * units - p * most)):
                    gate, unit = divmod(p * most + j, units)
                    column = gate * size + part * own + unit
                    for k in range(first, last):
                        found[part, p, k, j] = weight[k, column]
