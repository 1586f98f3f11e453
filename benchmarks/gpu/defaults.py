"""The rows of `hbp.backends._measured.TABLE` that follow from results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import NONE
from benchmarks.gpu.record import Record
from hbp.backends import _measured
from hbp.backends._measured import Measured, Place

PLAIN = {
    "hbp (kernels)": ("Hillis-Steele (the paper's)", "loop over steps"),
    "Highway-BP (kernels)": ("Highway-BP",),
    "Highway-BP, rank 16 (kernels)": ("Highway-BP, rank 16",),
}
"""Which row is the plain path of a row with kernels, the first of them that there is."""


def family(folder: Path) -> str:
    """The family of the results' device, as "sm_90"; of none in a rehearsal."""
    found = _record(folder, "machine")
    return str(found.results().get("environment", {}).get("family", NONE)) if found else NONE


def searched(folder: Path) -> tuple[Measured, ...]:
    """The block sizes of the search, which the steps after it use; whether a kernel is the faster way is not known."""
    record, source = _record(folder, "search"), str(folder / "search.json")
    found = []
    for one in record.results().values() if record else ():
        place = Place(family(folder), one["dtype"], one["states"], one["channels"])
        found.append(Measured(one["kernel"], place, False, source, one["settings"]))
    return tuple(found)


def measured(folder: Path) -> tuple[Measured, ...]:
    """For each kernel at each size that was timed: whether it is faster than the plain path, with its block sizes."""
    _measured.TABLE, before = searched(folder), _measured.TABLE
    try:
        return tuple(_compared(folder))
    finally:
        _measured.TABLE = before


def _compared(folder: Path) -> Iterator[Measured]:
    for step in ("scan", "rnn", "rank"):
        record = _record(folder, step)
        for rows in record.results().values() if record else ():
            for row in rows:
                other = next((plain for plain in rows if _is_plain(plain, row)), None)
                if other is not None and row["whole_ms"] and other["whole_ms"]:
                    kernel, place = _place(row, family(folder))
                    time = "backward_ms" if row["backward_ms"] else "whole_ms"
                    faster = row[time][2] < other[time][1]  # by more than the quartiles' spread
                    yield Measured(
                        kernel, place, faster, str(folder / f"{step}.json"), _measured.settings(kernel, place)
                    )


def _is_plain(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the first is what the second would be without kernels; k = 3 speaks for all, with directions k = 1."""
    same = all(row[name] == other[name] for name in ("library", "k", "chunk", "case"))
    speaks = (None, None), (1 if "rank" in row["method"] else 3, 1)
    return same and row["method"] in PLAIN.get(other["method"], ()) and (row["k"], row["chunk"]) in speaks


def _place(row: dict[str, Any], device: str) -> tuple[str, Place]:
    case, lib = row["case"], row["library"]
    if "cell" in case:
        kind = "low_rank_rounds" if "rank" in row["method"] else "rounds"
        return f"{lib}.{case['cell']}_{kind}", Place(device, "float32", case["T"], case["B"] * case["H"])
    kernel = "low_rank_scan" if case.get("maps") == "low rank" else "suffix_scan"
    return f"{lib}.{kernel}", Place(device, case.get("dtype", "float32"), case["T"] + 1, case["B"] * case["D"])


def source(rows: tuple[Measured, ...]) -> str:
    """The table as Python, to copy into the module."""
    return "TABLE: tuple[Measured, ...] = (\n" + "".join(f"    {row!r},\n" for row in rows) + ")\n"


def _record(folder: Path, step: str) -> Record | None:
    path = folder / f"{step}.json"
    return Record.read(path) if path.exists() else None
