"""Which of several ways to do one thing is the fastest on this processor, from times measured at a few sizes.

``hbp tune`` measures on the user's machine and keeps the times in the user's cache folder; without them the ones
shipped with the library speak, of other machines. The environment variable ``HBP_TUNED`` names a file to read instead,
or is "shipped".
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

from hbp.backends._tuned import VARIABLE, Timings, read

_pinned: ContextVar[Mapping[str, str]] = ContextVar("hbp_pinned_ways", default=MappingProxyType({}))


@contextmanager
def pinned(ways: Mapping[str, str]) -> Iterator[None]:
    """Take these ways, by task, in this thread; for measuring.

    >>> with pinned({"gru forward": "calls"}):
    ...     fastest("gru forward", "numpy", 1, 8, ("loop", "calls"))
    'calls'
    """
    token = _pinned.set({**_pinned.get(), **ways})
    try:
        yield
    finally:
        _pinned.reset(token)


def fastest(task: str, library: str, rows: int, width: int, among: tuple[str, ...], steps: float = math.inf) -> str:
    """The fastest of some ways at the nearest size measured, in calls of so many steps; the first where none was."""
    return explained(task, library, rows, width, among, steps)[0]


def explained(
    task: str, library: str, rows: int, width: int, among: tuple[str, ...], steps: float = math.inf
) -> tuple[str, str]:
    """As `fastest`, in calls of so many steps, with the reason."""
    way = _pinned.get().get(task)
    return (way, "pinned") if way is not None and way in among else _explained(task, library, rows, width, among, steps)


@lru_cache(4096)
def _explained(task: str, library: str, rows: int, width: int, among: tuple[str, ...], steps: float) -> tuple[str, str]:
    row = timings().nearest(task, library, rows, width)
    if row is None or row.seconds.keys().isdisjoint(among):
        return among[0], "nothing was measured"
    times = ", ".join(f"{way} {1e6 * row.per_step(way, steps):.3g}" for way in among if way in row.seconds)
    where = f"B = {row.rows}, H = {row.width}, the nearest size measured"
    where = f"{where}, T = {steps}" if math.isfinite(steps) else where
    return row.best(among, steps), f"microseconds a step at {where}: {times}; {row.source or timings().source}"


@lru_cache(4096)
def expected(task: str, library: str, rows: int, width: int, way: str) -> float:
    """The seconds of a step by some way, from the nearest size measured, by its work; infinite where none was."""
    row = timings().nearest(task, library, rows, width)
    if row is None or way not in row.seconds:
        return math.inf
    return row.seconds[way] * max(rows * width**2 / (row.rows * row.width**2), 1)


_given: list[Timings] = []


@contextmanager
def given(found: Timings) -> Iterator[None]:
    """Let these times decide, in the whole process."""
    _given.append(found)
    forget()
    try:
        yield
    finally:
        _given.pop()
        forget()


@cache
def timings() -> Timings:
    """The times that decide here.

    Raises:
        ValueError, OSError: the file is none that ``hbp tune`` writes, or cannot be read, as one that
            ``HBP_TUNED`` names and that is missing.
    """
    if _given:
        return _given[-1]
    chosen = os.environ.get(VARIABLE)
    if chosen and chosen != "shipped":
        return read(Path(chosen))
    return read(shipped() if chosen else _own() or shipped())


def shipped() -> Path:
    """The file that comes with the library for processors with such vectors."""
    return Path(__file__).with_name(f"tuned-{vector_bytes()}.json")


@cache
def vector_bytes() -> int:
    """Bytes in this processor's widest vectors, as far as compiled loops care: 64 with AVX-512, else 32."""
    try:
        features = import_module("llvmlite.binding").get_host_cpu_features()
    except (ImportError, OSError):  # without a compiler there are no such loops
        return 32
    return 64 if features.get("avx512f") else 32


def _own() -> Path | None:
    """The file in the cache folder, if there are both: a container's user may have no home, or see none."""
    try:
        return path if (path := cache_file()).exists() else None
    except (RuntimeError, OSError):
        return None


def forget() -> None:
    """Read the times anew when they are next needed."""
    timings.cache_clear()
    _explained.cache_clear()
    expected.cache_clear()


def cache_file() -> Path:
    """Where ``hbp tune`` keeps this processor's times; a folder that several machines share has a file of each.

    Raises:
        RuntimeError: the user has no home.
    """
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "hbp" / f"tuned-{crc32(f'{processor()}, {os.cpu_count()}'.encode()):08x}.json"


@cache
def processor() -> str:
    """This machine's processor, by its name."""
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
