"""``hbp tune``: a short calibration, whose times decide which way is taken at which size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from hbp.backends import _tuning
from hbp.backends._kernels import CPU
from hbp.backends._tuned import Timing, Timings, check_writable, read, write

LIBRARIES = ("numpy", "torch")


def tune(libraries: Sequence[str], tell: Callable[[str], None] = print, path: Path | None = None) -> Path:
    """Measure on this machine, tell each result, and keep them; a minute or two for both libraries.

    Args:
        libraries: "numpy", "torch" or both; those left out keep the times that they have.
        tell: is called with a line for each size measured.
        path: a file instead of the one in the user's cache folder, for the environment variable ``HBP_TUNED``.

    Raises:
        ImportError: a library is not installed, or, for "numpy", Numba.
        OSError, RuntimeError: the times cannot be written, or the user has no home.
    """
    for library in libraries:
        _check(library)
    path = _tuning.cache_file() if path is None else path
    check_writable(path)
    kept = _kept()
    rows = [replace(row, source=row.source or kept.source) for row in kept.rows if not _measured(row, libraries)]
    source = f"hbp tune, {date.today().isoformat()}, {_tuning.processor()}"
    for measure in (_loops, _steps):
        with _tuning.given(Timings(source, tuple(rows))):  # the steps take the loops' fastest ways
            for row in measure(libraries):
                tell(_line(row))
                rows.append(row)
    write(path, Timings(source, tuple(rows)))
    _tuning.forget()
    return path


def _kept() -> Timings:
    """The times so far; those shipped where the kept ones cannot be read."""
    try:
        return _tuning.timings()
    except (ValueError, OSError):
        return read(_tuning.shipped())


def _measured(row: Timing, libraries: Sequence[str]) -> bool:
    """Whether times of such a row are measured now."""
    if row.task == "stack" or CPU.load() is not None:
        return row.library in libraries
    return row.library == "torch, plain"


def _check(library: str) -> None:
    if library not in LIBRARIES:
        raise ImportError(f"{library!r} has nothing to tune; give one of {', '.join(LIBRARIES)}")
    if find_spec(library) is None:
        raise ImportError(f"{library} is not installed")
    if library == "numpy" and CPU.load() is None:
        raise ImportError(f"NumPy has nothing to tune without compiled loops: {CPU.state()}")


def _loops(libraries: Sequence[str]) -> Iterator[Timing]:
    if CPU.load() is None:
        return
    from hbp.backends._numba.compile import own_threads
    from hbp.backends._numba.tuning import loops

    if "numpy" in libraries:
        from hbp.backends.numpy import backend

        yield from loops(backend, lambda array: array, own_threads())
    if "torch" in libraries:
        import torch

        from hbp.backends.torch.recurrent.adjoint import BACKEND
        from hbp.backends.torch.threads import torch_threads

        yield from loops(BACKEND, torch.from_numpy, torch_threads())


def _steps(libraries: Sequence[str]) -> Iterator[Timing]:
    if "torch" in libraries:
        from hbp.backends.torch.tuning import stacks, steps

        yield from steps()
        yield from stacks()


def _line(row: Timing) -> str:
    stack = row.task == "stack"
    rows, width = ("numbers in a state", "parameters a layer") if stack else ("B", "H")
    times = ", ".join(
        f"{way} {1e6 * seconds:.3g}" + (f" and {1e6 * row.once[way]:.3g} once" if way in row.once else "")
        for way, seconds in row.seconds.items()
    )
    what = f"{row.task} ({row.library}), {rows} = {row.rows}, {width} = {row.width}"
    return f"{what}: {row.best(tuple(row.seconds))} ({times} us a {'layer' if stack else 'step'})"
