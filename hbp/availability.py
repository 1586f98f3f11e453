"""Which backends are usable here, for people."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hbp.core.registry import LIBRARIES, load


@dataclass(frozen=True)
class Availability:
    """What `available` says of one backend; true where it is usable.

    Attributes:
        version: the library's version, or None where it is missing.
        device: the device new arrays would live on, or None where the backend is unusable.
        reason: why it is unusable, or None.
    """

    version: str | None
    device: str | None
    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return f"{self.version}, {self.device}" if self else f"unusable: {self.reason}"


def available() -> dict[str, Availability]:
    """Each backend's version and device, or why it is unusable. Imports every installed library.

    >>> available()["numpy"].device
    'cpu'
    """
    return {name: availability(name) for name in LIBRARIES}


def availability(name: str) -> Availability:
    """One backend's version and device, or why it is unusable. Imports its library, if installed."""
    library = LIBRARIES[name][0]
    try:
        device = load(name).backend.device()
    except (ImportError, RuntimeError) as error:
        return Availability(_version(library), None, str(error))
    return Availability(_version(library), device, None)


def _version(library: str) -> str | None:
    return getattr(sys.modules.get(library), "__version__", None)
