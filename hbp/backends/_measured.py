"""What was measured of kernels on devices: where they are faster than the plain path, and with which block sizes.

``python -m benchmarks gpu`` measures; the page that it writes ends with the rows to copy here. Without a row near the
sizes at hand a kernel runs only where ``HBP_KERNELS`` asks for it, with the block sizes its module guesses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log

REACH = 4
"""The factor in states, and in channels, by which a measurement speaks for sizes beside its own."""


@dataclass(frozen=True)
class Place:
    """Where a kernel runs."""

    device: str
    """The family of devices, as "sm_90"."""
    dtype: str
    states: int
    """Rows of the scan: L + 1."""
    channels: int
    """Numbers in one state."""


@dataclass(frozen=True)
class Measured:
    """One measurement of a kernel against the plain path."""

    kernel: str
    """As "torch.suffix_scan"."""
    place: Place
    faster: bool
    """Than the plain path: then "auto" runs it."""
    source: str
    """The file of results it comes from."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """The fastest block sizes, by the fields of the kernel's ``Blocks``."""


TABLE: tuple[Measured, ...] = ()


def nearest(kernel: str, place: Place) -> Measured | None:
    """The row of this kernel, device and dtype nearest in size, or None where none is within `REACH`."""

    def distance(row: Measured) -> float:
        sizes = (row.place.states, place.states), (row.place.channels, place.channels)
        return max(abs(log(own / other)) for own, other in sizes)

    same = (place.device, place.dtype)
    rows = [row for row in TABLE if row.kernel == kernel and (row.place.device, row.place.dtype) == same]
    found = min(rows, key=distance, default=None) if place.channels else None
    return found if found is not None and distance(found) <= log(REACH) else None


def settings(kernel: str, place: Place) -> Mapping[str, int]:
    """The block sizes measured for a kernel at sizes like these; empty where nothing is known."""
    row = nearest(kernel, place)
    return {} if row is None else row.settings
