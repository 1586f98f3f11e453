"""Who multiplies each step's numbers by the recurrent weights, and with which parts of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from hbp.backends._numba.compile import Threads, as_numpy, own_threads
from hbp.backends._numba.meeting import meeting
from hbp.backends._numba.tiles import BYTES, panels
from hbp.backends._tuning import fastest
from hbp.core.backend import Array

Way: TypeAlias = Literal["loop", "shared", "calls"]
"""In the compiled loop, with the batch divided among the threads; there, with the units divided; by a call of it."""

Team: TypeAlias = tuple[np.ndarray, int, np.ndarray, int]
"""The loops' ``weight, own, meeting, me`` (`hbp.backends._numba.loops`)."""

MOST = 4
"""The most threads that share units: at every step all wait for the last."""


@dataclass(frozen=True, eq=False)
class Product:
    """The product of each step with the recurrent weights, (K, gates H), and the threads that go through the steps."""

    way: Way
    weight: np.ndarray
    """(parts, P, K, some): of each part of the units all gates' columns, in `panels`; without numbers for "calls"."""
    own: int
    """The units of a part, the last of which may have fewer."""
    threads: Threads

    @classmethod
    def of(
        cls, task: str, backend: Any, weight: Array, size: int, steps: tuple[int, int], threads: Threads | None
    ) -> Product:
        """The fastest way of a task, as "gru forward", at hidden size ``size`` and so many steps and batch entries."""
        whole, threads, (length, batch) = as_numpy(weight), threads or own_threads(), steps
        sizes = size, whole.itemsize, length * batch * whole.size
        way: Any = fastest(task, backend.name, batch, size, ways(threads, *sizes))
        if way == "calls":
            return cls.called(weight, size, threads)
        own = _own(threads, *sizes) if way == "shared" else size
        by_gate = whole.reshape((len(whole), -1, size))
        parts = [by_gate[:, :, first : first + own] for first in range(0, max(size, 1), max(own, 1))]
        found = [panels(part.reshape((len(whole), -1)), parts[0][0].size) for part in parts]
        return cls(way, np.stack(found) if len(found) > 1 else found[0][None], own, threads)

    @classmethod
    def called(cls, weight: Array, size: int, threads: Threads) -> Product:
        """Calls of the library's product, whatever was measured."""
        return cls("calls", np.zeros((1, 0, 0, 0), as_numpy(weight).dtype), size, threads)

    @property
    def alone(self) -> Team:
        """Of a thread that goes through all parts."""
        return self.weight, self.own, meeting(1), 0

    def run(self, loop: Callable[[Team, int, int], None], length: int, batch: int) -> None:
        """Call ``loop(team, start, stop)`` in each thread, with its part of the batch or of the units."""
        if self.way == "shared":
            counters, members = meeting(len(self.weight)), [(me, me + 1) for me in range(len(self.weight))]
            self.threads.spread(lambda me, _: loop((self.weight, self.own, counters, me), 0, batch), members)
        else:
            self.threads.run(partial(loop, self.alone), batch, length * batch * self.weight.size)


def ways(threads: Threads, size: int, itemsize: int, work: int) -> tuple[Way, ...]:
    """Those that there are for some threads and units, if so many multiplications are to be done."""
    several = os.name == "posix" and _own(threads, size, itemsize, work) < size
    return ("loop", "calls", "shared") if several else ("loop", "calls")


def _own(threads: Threads, size: int, itemsize: int, work: int) -> int:
    """The units of each thread's part: whole vectors."""
    lanes = BYTES // itemsize
    return -(-size // (min(threads.paid(work), MOST) * lanes)) * lanes
