"""Performing pieces of work: those that measure time alone, the others side by side, each on its own threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.environment import commit
from experiments.experiment import Work
from experiments.folder import Folder, write
from hbp.backends._tuning import processor
from hbp.demo.threads import limited

Show = Callable[[str, int, int, str], None]
"""Told of a piece of work's key how far it is, of how much, and a remark."""


@dataclass
class Place:
    """Where a piece of work is performed: its checkpoint, whom it tells how far it is, and what parts before took."""

    key: str
    checkpoint: Path
    show: Show
    earlier: float = 0.0

    def advance(self, done: int, total: int, text: str = "") -> None:
        self.show(self.key, done, total, text)


def perform(work: Work, folder: Folder, threads: int, show: Show, beside: bool = False) -> None:
    """Do a piece of work on so many threads, and write its record."""
    place = Place(work.key, folder.checkpoint(work.key), show)
    start = perf_counter()
    with limited(threads):
        found = work.perform(place)
    where = {"key": work.key, "alone": work.alone or not beside, "commit": commit(), "processor": processor()}
    seconds = round(place.earlier + perf_counter() - start, 2)
    where |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "performed_s": seconds}
    write(folder.record(work.key), where | found)
    place.checkpoint.unlink(missing_ok=True)


def perform_all(
    works: Sequence[Work], folder: Folder, threads: int, jobs: int, show: Show, finished: Callable[[str], None]
) -> None:
    """Perform all pieces of work, ``jobs`` side by side of those that may; a record is written as each ends."""
    beside = [] if jobs == 1 else [work for work in works if not work.alone]
    if beside:
        _side_by_side(beside, folder, threads, jobs, show, finished)
    for work in works:
        if work not in beside:
            perform(work, folder, threads, show)
            finished(work.key)


def _side_by_side(
    works: Sequence[Work], folder: Folder, threads: int, jobs: int, show: Show, finished: Callable[[str], None]
) -> None:
    context = get_context("spawn")
    told, ended = context.SimpleQueue(), context.Event()
    listener = threading.Thread(target=_listen, args=(told, show), daemon=True)
    listener.start()
    with limited(threads), ProcessPoolExecutor(jobs, context, _start, (told, ended, os.getpid())) as pool:
        futures = {pool.submit(_perform_there, work, folder, threads): work for work in works}
        try:
            for future in as_completed(futures):
                future.result()
                finished(futures[future].key)
        except BaseException:
            ended.set()
            pool.shutdown(cancel_futures=True)
            raise
    told.put(None)
    listener.join()


def _listen(told: Any, show: Show) -> None:
    while (message := told.get()) is not None:
        show(*message)


_THERE: tuple[Any, Any, int] | None = None
"""Of a process beside the first: whom it tells, whether to end, and the first one's number."""


def _start(told: Any, ended: Any, parent: int) -> None:
    global _THERE  # what a pool's initializer leaves for its tasks
    _THERE = told, ended, parent


def _perform_there(work: Work, folder: Folder, threads: int) -> None:
    assert _THERE is not None
    told, ended, parent = _THERE

    def show(*message: Any) -> None:
        if ended.is_set() or os.getppid() != parent:  # it was killed, and nobody waits for what this one does
            os._exit(1)
        told.put(message)

    perform(work, folder, threads, show, beside=True)
