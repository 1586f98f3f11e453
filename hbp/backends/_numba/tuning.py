"""What the compiled loops take by each way to multiply: for ``hbp tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from hbp.backends._numba.adjoints import gru_adjoint, lstm_adjoint
from hbp.backends._numba.compile import Threads
from hbp.backends._numba.forwards import gru_forward, lstm_forward
from hbp.backends._numba.products import ways
from hbp.backends._timing import SIZES, apart, in_ways, steps_of
from hbp.backends._tuned import Timing
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback


def loops(backend: Any, convert: Callable[[np.ndarray], Any], threads: Threads) -> Iterator[Timing]:
    """The times of both cells' loops on a library's arrays, size by size."""
    for cell, (batch, hidden) in product(("gru", "lstm"), SIZES):
        among, count = ways(threads, hidden, batch, np.dtype(np.float32).itemsize), steps_of(batch, hidden)
        lengths = count, count // 2
        whole, part = (_tasks(cell, batch, hidden, steps, backend, convert, threads) for steps in lengths)
        for task in whole:
            runs, shorter = (in_ways(task, among, tasks[task]) for tasks in (whole, part))
            yield Timing(task, backend.name, batch, hidden, *apart(runs, shorter, *lengths))


def _tasks(
    cell: str, batch: int, hidden: int, steps: int, backend: Any, convert: Callable[[np.ndarray], Any], threads: Threads
) -> dict[str, Callable[[], Any]]:
    """The forward that keeps the gates, and the exact way back from them with the inputs' gradients."""
    rng, gates = np.random.default_rng(0), 3 if cell == "gru" else 4

    def array(*shape: int) -> Any:
        return convert(rng.standard_normal(shape, dtype=np.float32) / np.float32(hidden**0.5))

    weights = array(gates * hidden, hidden), array(gates * hidden, hidden), array(gates * hidden), array(gates * hidden)
    x, dh = (array(steps, batch, hidden) for _ in range(2))
    state = array(batch, hidden)
    if cell == "gru":
        gru = GRUParameters(*weights)
        h, kept = gru_forward(gru, x, state, True, backend, threads)
        back = GRUPullback(gru, x, state, h, backend, kept)
        return {
            "gru forward": lambda: gru_forward(gru, x, state, True, backend, threads),
            "gru backward": lambda: gru_adjoint(back, dh, threads=threads),
        }
    lstm = LSTMParameters(*weights)
    h, c, found = lstm_forward(lstm, x, (state, state), backend, threads)
    lstm_back = LSTMPullback(lstm, x, (state, state), (h, c), backend, found)
    return {
        "lstm forward": lambda: lstm_forward(lstm, x, (state, state), backend, threads),
        "lstm backward": lambda: lstm_adjoint(lstm_back, (dh, None), threads=threads),
    }
