"""Data sets as files: where they lie, whether they are whole, and what is kept of them; each failure a sentence."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SUMS = "SHA256SUMS"
"""A file of this name in a data set's folder, as ``sha256sum`` writes it, is checked before the data are read."""


class DataError(RuntimeError):
    """A data set is missing or broken: one sentence for the person at the command line."""


def default_folder() -> Path:
    """``$HBP_DATA``, or a folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HBP_DATA") or Path(cache, "hbp-experiments"))


def place_of(name: str, folder: Path | None) -> Path:
    """Where a data set or model of the Hugging Face hub is looked for before the hub is asked."""
    return (folder or default_folder()) / name


def from_hub(name: str, folder: Path | None, load: Callable[[str], Any], kind: str = "dataset") -> Any:
    """What ``load`` makes of a data set or model of the Hugging Face hub.

    Args:
        name: as on the hub, ``owner/name``.
        folder: ``folder/owner/name``, a copy of the hub's files, is taken instead where it exists.
        load: called with that folder or the name.
        kind: "dataset" or "model".

    Raises:
        DataError: it is neither here nor to be had, or not whole.
    """
    place = place_of(name, folder)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try to reach the hub
    with sentences(name, place, f"hf download {name} --repo-type {kind} --local-dir {place}"):
        if place.is_dir():
            check_sums(place)
            return load(str(place))
        return load(name)


@contextmanager
def sentences(what: str, place: Path, cure: str) -> Iterator[None]:
    """Turn what libraries raise about the files of ``place`` into one sentence, `DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # libraries' own errors have no common class
        if full := next((cause for cause in _causes(error) if getattr(cause, "errno", None) == errno.ENOSPC), None):
            raise DataError(f"the disk is full, while {what} is read or kept: {full}; make room") from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        state = f"cannot be read from {place}" if place.exists() else f"is neither in {place} nor to be had"
        raise DataError(f"{what} {state} ({reason}); get it by: {cure}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_sums(folder: Path) -> None:
    """Compare a folder's files with its `SUMS`, where there is one.

    Raises:
        DataError: a file listed there is missing or another.
    """
    sums = folder / SUMS
    for line in sums.read_text().splitlines() if sums.is_file() else []:
        expected, _, name = line.partition(" ")
        path = folder / name.strip().lstrip("*")
        if not path.is_file():
            raise DataError(f"{path} is missing, and {sums} lists it; get the data set again, or remove the line")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.lower():
            raise DataError(
                f"{path} has the SHA-256 checksum {found}, and {sums} says {expected}; get the file again, or correct "
                "the line"
            )


def kept(name: str, folder: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that takes long to make, kept as ``folder/made/name.npy``.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    path = (folder or default_folder()) / "made" / f"{name}.npy"
    with sentences(path.name, path.parent, f"removing {path}, so that it is made anew"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            try:
                with unfinished.open("wb") as file:
                    np.save(file, make())
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        return np.load(path, mmap_mode="r")
