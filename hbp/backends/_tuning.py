"""Which of several ways to do one thing is the fastest on this processor, from times measured at a few sizes.

``hbp tune`` measures on the user's machine and keeps the times in the user's cache folder; without them the ones
shipped with the library speak, of other machines. The environment variable ``HBP_TUNED`` names a file to read instead,
or is "shipped".
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from errno import EISDIR
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from zlib import crc32

VARIABLE = "HBP_TUNED"
MARGIN = 0.95
"""The part of the first way's time that another must stay below to be taken instead."""


@dataclass(frozen=True)
class Timing:
    """What the ways to do one thing took at one size."""

    task: str
    """As "gru forward"."""
    library: str
    """Whose arrays and products: "numpy" or "torch"; "torch, plain" is without compiled loops."""
    rows: int
    """The batch size; of a stack, the numbers in a state."""
    width: int
    """The hidden size; of a stack, a layer's parameters."""
    seconds: Mapping[str, float]
    """By the way: those of one step, in float32."""
    once: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each call beside its steps', by the way, where they are known apart."""
    source: str = ""
    """Whose they are, where not its file's."""

    def per_step(self, way: str, steps: float = math.inf) -> float:
        """The seconds of each of so many steps."""
        return self.seconds[way] + self.once.get(way, 0.0) / max(steps, 1)

    def best(self, among: tuple[str, ...], steps: float = math.inf) -> str:
        """The fastest of those of some ways that were measured, where it saves enough; else the first of them."""
        times = {way: self.per_step(way, steps) for way in among if way in self.seconds}
        first, way = next(iter(times)), min(times, key=times.__getitem__)
        return way if times[way] < MARGIN * times[first] else first


@dataclass(frozen=True)
class Timings:
    """All times of a file."""

    source: str
    """For people: whose they are, where a row does not say."""
    rows: tuple[Timing, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Whose the rows are, each once."""
        return tuple(dict.fromkeys(row.source or self.source for row in self.rows))

    def nearest(self, task: str, library: str, rows: int, width: int) -> Timing | None:
        """The times at the size nearest to this one, by its ratios; None where the task was not measured."""

        def distance(row: Timing) -> float:
            return math.hypot(math.log(row.rows / max(rows, 1)), math.log(row.width / max(width, 1)))

        return min((row for row in self.rows if (row.task, row.library) == (task, library)), key=distance, default=None)


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


def read(path: Path) -> Timings:
    """Times from a file.

    Raises:
        ValueError, OSError: it is none that ``hbp tune`` writes, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Timing(**row) for row in found["rows"])
        sound = all(
            row.seconds
            and all(n > 0 for n in (row.rows, row.width, *row.seconds.values()))
            and all(n >= 0 for n in row.once.values())
            for row in rows
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of hbp tune ({error}); delete it, or run hbp tune again") from error
    except OSError as error:
        raise OSError(
            f"the times in {str(path)!r} cannot be read: {error.strerror}; give {VARIABLE} a file that hbp tune "
            "--output wrote, or 'shipped'"
        ) from error
    if not sound:
        raise ValueError(f"{path} has sizes or times that are not above 0; delete it, or run hbp tune again")
    return Timings(str(found.get("source", path)), rows)


def check_writable(path: Path) -> None:
    """Make the folder of a file to be written.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror}; give another file with --output") from error


def write(path: Path, found: Timings) -> None:
    """Times to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(_said(row, found.source)) for row in found.rows)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(f'{{"source": {json.dumps(found.source)}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    beside.replace(path)


def _said(row: Timing, source: str) -> dict[str, object]:
    """A row as JSON: times to three digits, without a source that is its file's."""
    said = {**asdict(row), "seconds": _short(row.seconds), "once": _short(row.once)}
    own = row.source not in ("", source)
    return said if own else {name: value for name, value in said.items() if name != "source"}


def _short(seconds: Mapping[str, float]) -> dict[str, float]:
    return {way: float(f"{time:.3g}") for way, time in seconds.items()}


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
