"""The suffix scan over more ranks than there are processes for: threads hand arrays to one another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from oracles import converted, residual_case, suffix_loop

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
from hbp.backends.torch.depth.backend import RankBackend  # noqa: E402
from hbp.backends.torch.depth.exchange import LOCAL  # noqa: E402
from hbp.backends.torch.depth.ranks import Ranks  # noqa: E402

SHAPE = (2, 3)


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, here: int, slots: list[Any], barrier: Barrier) -> None:
        self.here, self.slots, self.barrier = here, slots, barrier
        self.count, self.device = len(slots), torch.device("cpu")

    def gather(self, x: Any) -> list[Any]:
        self.slots[self.here] = x
        self.barrier.wait(10)
        found = list(self.slots)
        self.barrier.wait(10)
        return found

    def transposed(self, x: Any) -> Any:
        return torch.stack([other[self.here] for other in self.gather(x)])

    def shifted(self, arrays: Any, shift: int) -> Any:
        found = self.gather(arrays)
        return list(found[self.here + shift]) if self.here + shift < self.count else None


def scanned(sizes: list[int], operator: Any, c: Any, exchange: Any) -> tuple[list[Any], list[float]]:
    """The states of all ranks, each of which has the layers that ``sizes`` say, and the norm that each finds."""
    slots, barrier, bounds = [None] * len(sizes), Barrier(len(sizes)), [0, *accumulate(sizes)]

    def of(here: int) -> tuple[Any, float]:
        start, stop = bounds[here : here + 2]
        own = c[start : stop + 1].clone()
        own[-1] *= here == len(sizes) - 1  # enters on the next rank
        backend = RankBackend(Threads(here, slots, barrier), sum(sizes), exchange)
        maps = operator[start:stop].bind(stop - start, own[0], LOCAL)
        g = [backend.propagate(maps.T, factor * own) for factor in (1, 2)][1] / 2
        return g, backend.norm(g)

    with ThreadPoolExecutor(len(sizes)) as threads:
        found = list(threads.map(of, range(len(sizes))))
    return [g for g, _ in found], [norm for _, norm in found]


@pytest.mark.parametrize("exchange", ["AllGather", "HillisSteele", "Transpose"])
@pytest.mark.parametrize(
    "kind", ["identity", "zero", "number", "scalars", "diagonal", "diagonal-shared", "dense", "dense-entries"]
)
def test_it_is_one_scan_over_all_layers(rng, kind, exchange):
    for sizes in ([2], [1, 2], [2, 1, 3], [1, 2, 1, 1, 3], [1, 1, 2, 1, 1, 1, 2, 1, 1]):
        operator, matrices = residual_case(kind, rng, sum(sizes), SHAPE)
        c = rng.normal(size=(sum(sizes) + 1, *SHAPE))
        expected = suffix_loop(matrices.transpose(0, 2, 1), c.reshape(len(c), -1)).reshape(c.shape)
        given = converted(operator, lambda x: torch.from_numpy(np.array(x)))
        states, norms = scanned(sizes, given, torch.from_numpy(c), getattr(hb, exchange)())
        for found, stop in zip(states, accumulate(sizes), strict=True):
            reference = expected[stop + 1 - len(found) : stop + 1]
            assert np.allclose(found.numpy(), reference, rtol=1e-12, atol=1e-12 * abs(expected).max())
        assert norms == pytest.approx([np.linalg.norm(expected)] * len(sizes), rel=1e-12)
        assert len(set(norms)) == 1
