"""Reports on backward passes that somebody watches from outside of a traced program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hbp.core.increments import Report
from hbp.core.solver import Solver

_WATCHERS: ContextVar[Callable[[Report], None] | None] = ContextVar("watchers", default=None)


@contextmanager
def watching(watch: Callable[[Report], None]) -> Iterator[None]:
    """Let the transforms traced meanwhile hand a report on each backward pass to ``watch``."""
    token = _WATCHERS.set(watch)
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def watched(solver: Solver) -> Solver:
    """The solver of a transform that is traced now."""
    watch = _WATCHERS.get()
    return solver if watch is None else solver.watched(watch)
