"""The Markdown tables, from a document's rows."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

Rows = list[dict[str, Any]]


def cases_of(rows: Rows) -> Iterator[tuple[dict[str, Any], Rows]]:
    for _, group in groupby(rows, key=lambda row: row["case"]):
        members = list(group)
        yield members[0]["case"], members


def of_parts(results: dict[str, Any]) -> Rows:
    """All rows that worked, of the parts of a step, each case's together."""
    rows = [row for part in results.values() for row in part if row["failed"] is None]
    return sorted(rows, key=lambda row: title(row["case"]))


def title(case: dict[str, Any]) -> str:
    shown = {name: value for name, value in case.items() if name not in ("cell", "weights", "setting", "inputs")}
    extra = f", weights x {case['weights']:g}" if case.get("weights", 1) != 1 else ""
    sizes = ", ".join(f"{name} = {value}" for name, value in shown.items())
    return f"{case.get('cell', '').upper()} {sizes}{extra}".strip()


def method_of(row: dict[str, Any]) -> str:
    k = "" if row["k"] is None else f", k = {row['k']}"
    chunk = f", chunk {row['chunk']}" if (row["chunk"] or 1) > 1 else ""
    return f"{row['method']}{k}{chunk}"


def by_case(table: str, rows: Rows) -> Iterator[str]:
    """One Markdown table for each case, ours in bold."""
    for case, members in cases_of(rows):
        columns = _MEMORY if table == "memory" else _SCAN if table == "scan" else _TIMES
        lines = [["library", "method", *columns]]
        for row in members:
            name = f"**{method_of(row)}**" if row["ours"] else method_of(row)
            lines.append([row["library"], name, *(show(row) for show in columns.values())])
        rule = ["---", "---", *["---:"] * len(columns)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        yield f"### {title(case)}\n\n{body}\n\n"


_SHORT: dict[str, tuple[str, dict[str, tuple[str, str, int | None, int | None]]]] = {
    "rnn": (
        "backward",
        {
            "torch.nn": ("torch", "torch.nn*)", None, None),
            "`iterations=None`": ("torch", "iterations=None", None, None),
            "k = 3": ("torch", "Highway-BP", 3, 1),
            "k = 3, chunk 8": ("torch", "Highway-BP", 3, 8),
            "NumPy, exact": ("numpy", "exact adjoint", None, 1),
            "jitted `lax.scan`": ("jax", "jax.lax.scan", None, None),
        },
    ),
    "rank": (
        "backward",
        {
            "torch.nn": ("torch", "torch.nn*)", None, None),
            "`iterations=None`": ("torch", "iterations=None", None, None),
            "k = 1": ("torch", "Highway-BP", 1, 1),
            "k = 1, rank 16": ("torch", "Highway-BP, rank 16", 1, 1),
            "rank 16, tolerance 0.1": ("torch", "Highway-BP, rank 16, tolerance 0.1", None, 1),
        },
    ),
    "crossover": (
        "whole",
        {
            "torch.nn": ("torch", "torch.nn*)", None, None),
            "jitted `lax.scan`": ("jax", "jax.lax.scan", None, None),
            "`iterations=None`": ("torch", "iterations=None", None, None),
            "k = 3": ("torch", "Highway-BP", 3, 1),
            "k = 1": ("torch", "Highway-BP", 1, 1),
        },
    ),
    "precision": (
        "backward",
        {
            "torch.nn": ("torch", "torch.nn*)", None, None),
            "torch.nn, medium": ("torch", "torch.nn*, medium", None, None),
            "`iterations=None`": ("torch", "iterations=None", None, None),
            "`iterations=None`, medium": ("torch", "iterations=None, medium", None, None),
            "k = 3": ("torch", "Highway-BP", 3, 1),
            "k = 3, medium": ("torch", "Highway-BP, medium", 3, 1),
            "k = 1, medium": ("torch", "Highway-BP, medium", 1, 1),
        },
    ),
}
"""For each table with a short form the time it shows, and its columns: library, the method's pattern, k and chunk."""
SMALL = 1e-4
"""The error from which on it stands beside what is exact, too: its products are in a lower precision."""


def in_short(table: str, rows: Rows) -> str:
    """A line for each case: milliseconds, how much faster than torch.nn's, what it is off by; "" for other tables."""
    if table not in _SHORT:
        return ""
    time, columns = _SHORT[table]
    lines = [[f"{time}, ms", *columns], ["---", *["---:"] * len(columns)]]
    for case, members in cases_of(rows):
        found = [_pick(members, *key) for key in columns.values()]
        base = found[0] and found[0][f"{time}_ms"][0]
        lines.append([title(case), *(_short(row, f"{time}_ms", base) for row in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _pick(rows: Rows, library: str, method: str, k: int | None, chunk: int | None) -> dict[str, Any] | None:
    for row in rows:
        same = row["k"] == k and (chunk is None or row["chunk"] == chunk)
        if row["library"] == library and fnmatchcase(row["method"], method) and same:
            return row
    return None


def _short(row: dict[str, Any] | None, name: str, base: float | None) -> str:
    if row is None:
        return ""
    time = row[name][0]
    notes = [] if base in (None, time) else [f"{base / time:.2g}x"]
    notes += [] if row["exact"] and row["error"] < SMALL else [f"{row['error']:.1g} off"]
    return f"{time:.3g} ({', '.join(notes)})" if notes else f"{time:.3g}"


def _ms(name: str) -> Any:
    def show(row: dict[str, Any]) -> str:
        found = row[name]
        return "" if found is None else f"{found[0]:.3g} ({found[1]:.3g} to {found[2]:.3g})"

    return show


def _number(name: str, style: str) -> Any:
    return lambda row: "" if row[name] is None else format(row[name], style)


def _megabytes(name: str) -> Any:
    return lambda row: "" if row[name] is None else f"{row[name] / 1e6:.1f}"


_ERROR = {"error": _number("error", ".1e"), "cosine": _number("cosine", ".4f")}
_FIRST = {"first call here, ms": _number("first_ms", ".0f")}
_SCAN = {"ms": _ms("whole_ms"), "of copy bandwidth": _number("copy_fraction", ".0%"), **_ERROR, **_FIRST}
_TIMES = {
    "forward, ms": _ms("forward_ms"),
    "backward, ms": _ms("backward_ms"),
    "whole, ms": _ms("whole_ms"),
    **_ERROR,
    "of product rate": _number("product_fraction", ".0%"),
    **_FIRST,
}
_MEMORY = {"saved, MB": _megabytes("saved_bytes"), "peak, MB": _megabytes("peak_bytes")}
