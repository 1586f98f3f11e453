"""The spectrum of a recurrent weight: what training has put into it, above what it started with."""

from __future__ import annotations

from dataclasses import dataclass

from hbp.directions import MARGIN, above_edge, flat_edge

SHOWN = 4
"""Values of the flat part that are printed behind the strong ones."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight beside the edge that a flat spectrum of the remainder's size would have.

    Attributes:
        values: all of them, in falling order.
        shape: the weight's, (N, H).

    >>> found = Spectrum((9.0, 4.0, *[1.0] * 30), (96, 32))
    >>> found.strong, round(found.edge, 2)
    (2, 1.59)
    """

    values: tuple[float, ...]
    shape: tuple[int, int]

    @property
    def strong(self) -> int:
        """How many directions rise above the flat edge; ``rank="auto"`` takes these and a few more."""
        return above_edge(self.values, self._total, self.shape)

    @property
    def edge(self) -> float:
        """The largest value that noise of the remainder's size would have (`hbp.directions.flat_edge`)."""
        return flat_edge(self.values[: self.strong], self._total, self.shape)

    @property
    def _total(self) -> float:
        return sum(value * value for value in self.values)

    def __str__(self) -> str:
        rank, shown = self.strong, [f"{value:.3g}" for value in self.values]
        rest = shown[rank : rank + SHOWN] + ["..."] * (rank + SHOWN < len(shown))
        above = f"{rank} of {len(shown)} directions above {MARGIN} times the flat edge of {self.edge:.3g}"
        return f"{above}: {' '.join([*shown[:rank], '|', *rest])}"
