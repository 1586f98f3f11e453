"""What a diagnosis of a backward pass says, for every front end: a row per setting, a recommendation, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hbp.core.increments import ADVICE, Report
from hbp.core.solver import Solver
from hbp.diagnosis import picture
from hbp.diagnosis.agreement import Agreement
from hbp.diagnosis.spectrum import Spectrum
from hbp.directions import Rank

HEADER = f"{'k':>5} {'chunk':>5} {'rank':>5} {'error':>8} {'cosine':>7} {'worst layer':>22} {'increment':>9} {'ms':>8}"
NOTICED = 1e-3
"""A smaller difference of two relative errors is rounding, or no news."""


@dataclass(frozen=True)
class Row:
    """One setting beside exact backprop.

    Attributes:
        iterations, chunk: the setting; None for exact backprop.
        overall: agreement of all parameters' gradients.
        layers: agreement layer by layer, by name.
        reports: the increments of each backward pass, by the name of the layers it went through.
        seconds: the duration of forward and backward, the median of the passes; NaN before it is measured.
        rank: the setting's too, of the layers that take one.
    """

    iterations: int | None
    chunk: int
    overall: Agreement
    layers: Mapping[str, Agreement]
    reports: Mapping[str, Report]
    seconds: float = math.nan
    rank: Rank = 0

    @property
    def solver(self) -> Solver:
        """The setting as a value, to hand on beside the rank."""
        return Solver(self.iterations, self.chunk)

    @property
    def setting(self) -> str:
        """The setting in words."""
        found = f"iterations={self.iterations}, chunk={self.chunk}"
        return f"{found}, rank={self.rank!r}" if self.rank else found

    @property
    def diverges(self) -> bool:
        """Whether some split's increments grow past the solution."""
        return any(report.diverges for report in self.reports.values())

    @property
    def increment(self) -> float:
        """The last increment as a fraction of the solution, the largest of all passes; NaN where there were none."""
        return max((report.shares[-1] for report in self.reports.values()), default=math.nan)

    def __str__(self) -> str:
        k = "exact" if self.iterations is None else self.iterations
        name, worst = max(self.layers.items(), key=lambda item: item[1].error, default=("", Agreement()))
        layer = f"{name[-14:]} {worst.error:.2g}" if worst.error else ""
        increment = f"{self.increment:.2g}" if self.reports else ""
        ms = "" if math.isnan(self.seconds) else f"{1e3 * self.seconds:.2f}"
        columns = f"{k:>5} {self.chunk:>5} {self.rank:>5} {self.overall.error:>8.2g} {self.overall.cosine:>7.4f}"
        return f"{columns} {layer:>22} {increment:>9} {ms:>8}{' diverges' if self.diverges else ''}".rstrip()


@dataclass(frozen=True)
class Diagnosis:
    """Highway-BP's gradients of one batch beside exact backprop's, for several k, chunks and ranks.

    Attributes:
        exact: exact backprop.
        rows: the other settings.
        target: the error wished for.
        spectra: of the recurrent weights of layers that take a rank, by the weights' names.
    """

    exact: Row
    rows: tuple[Row, ...]
    target: float
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def within(self) -> tuple[Row, ...]:
        """The rows from which on every larger k tried with the chunk and rank is within the target, by k, then chunk.

        The error does not fall monotonically with k: a k that hits the target by luck does not count.
        """
        if not self._seen:
            return ()
        good = [row for row in self.rows if all(r.overall.error <= self.target for r in self._from(row))]
        return tuple(sorted(good, key=lambda row: (row.iterations or 0, row.chunk)))

    @property
    def recommended(self) -> Row:
        """The fastest of exact backprop and the rows `within` the target; exact where none is faster."""
        return min((self.exact, *self.within), key=lambda row: row.seconds)

    @property
    def worse(self) -> tuple[Row, ...]:
        """The rows whose rank makes the gradient worse than none does, at the same k and chunk."""
        none = {(row.iterations, row.chunk): row.overall.error for row in self.rows if not row.rank}

        def worsens(row: Row) -> bool:
            plain = none.get((row.iterations, row.chunk), math.inf) if row.rank else math.inf
            return math.isfinite(plain) and not row.overall.error <= plain + NOTICED

        return tuple(filter(worsens, self.rows))

    @property
    def advice(self) -> str:
        """A sentence or more for people."""
        if not self._seen:
            return "no backward pass by Highway-BP was seen: does the loss hand iterations and chunk on?"
        return "\n".join(filter(None, (self._advised(), self._diverging(), self._worsened(), self._unheeded())))

    def _advised(self) -> str:
        exact = f"{1e3 * self.exact.seconds:.3g} ms"
        fastest = min(self.within, key=lambda row: row.seconds, default=None)
        if fastest is None:
            untried = any(spectrum.strong for spectrum in self.spectra.values()) and not any(r.rank for r in self.rows)
            cures = ", larger chunks, or ranks=(0, 'auto')" if untried else " or larger chunks"
            return (
                f"recommended: exact backprop, {exact}; no setting tried is within the target error of "
                f"{self.target:.2g}, more iterations{cures} may be"
            )
        figures = f"error {fastest.overall.error:.2g}, {1e3 * fastest.seconds:.3g} ms"
        found = f"recommended for an error of {self.target:.2g}:"
        if self.recommended is fastest:
            return f"{found} {fastest.setting} ({figures}; exact backprop takes {exact})"
        return (
            f"{found} exact backprop, which is the fastest here, {exact}; of Highway-BP's settings within it "
            f"{fastest.setting} is the fastest ({figures}), and on other hardware it may pay"
        )

    def _diverging(self) -> str:
        ranks = dict.fromkeys(str(row.rank) for row in self.rows if row.diverges)
        with_ranks = f" (rank {', '.join(ranks)})" if any(row.rank for row in self.rows) else ""
        return f"the split diverges at some settings{with_ranks}: {ADVICE}" if ranks else ""

    def _worsened(self) -> str:
        worst = max(self.worse, key=lambda row: row.overall.error, default=None)
        if worst is None:
            return ""
        ranks = ", ".join(dict.fromkeys(str(row.rank) for row in self.worse))
        plain = next(row for row in self.rows if not row.rank and row.solver == worst.solver)
        errors = f"error {worst.overall.error:.2g} at {worst.setting}, {plain.overall.error:.2g} without"
        return f"rank {ranks} is worse than none at some settings ({errors}): too low a rank is; raise it, or take none"

    def _unheeded(self) -> str:
        ranked = [row for row in self.rows if row.rank not in (0, "auto")]  # "auto" may take none
        alike = [(a, b) for a in ranked for b in self.rows if not b.rank and a.solver == b.solver]
        if alike and all(a.overall == b.overall for a, b in alike):
            return "no rank changed the gradient: does the loss hand rank on?"
        return ""

    def _from(self, row: Row) -> list[Row]:
        """The row and those of its chunk and rank with larger k."""
        alike = (r for r in self.rows if (r.chunk, r.rank) == (row.chunk, row.rank))
        return [r for r in alike if (r.iterations or 0) >= (row.iterations or 0)]

    @property
    def _seen(self) -> bool:
        """Whether some setting was heeded: its increments were reported, or its gradient differs."""
        return any(row.reports or row.overall.difference for row in self.rows)

    def __str__(self) -> str:
        rows = [f"{row}{' worse than rank 0' if row in self.worse else ''}" for row in self.rows]
        spectra = [f"{name}: {spectrum}" for name, spectrum in self.spectra.items()]
        return "\n".join([HEADER, str(self.exact), *rows, *spectra, self.advice])

    def plot(self, path: str | Path) -> None:
        """Write a picture: error against k, error by layer, the increments of the largest k, and the spectra."""
        picture.draw(self.rows, self.spectra, self.target, path)
