"""The pages of numbers, from whatever lies in the folders of results: JSON, and the Markdown and pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = {"benchmarks": ROOT / "benchmarks" / "results", "experiments": ROOT / "experiments" / "results"}
PAGE = "README.md"
"""A folder's own page, of all that lies in it."""
TITLES = {
    "cpu/crossover": "Whole training steps of recurrent layers",
    "cpu/scan": "The diagonal scan",
    "cpu/rank": "Strong directions: backward passes at H = 1024",
    "cpu-intel/crossover": "Whole training steps of recurrent layers, on an Intel",
    "cpu-intel/scan": "The diagonal scan, on an Intel",
    "cpu-intel/rank": "Strong directions: backward passes at H = 1024, on an Intel",
    "cpu/rnn": "Backward passes of recurrent layers",
    "cpu-intel/stack": "Stacks of residual layers",
    "cpu-intel/memory": "Memory",
    "cpu/cosines": "Cosines against k, early and late in training",
    "cpu/depth": "Layers on two and four ranks",
}
"""Other pages are called as their files are, or name themselves."""


def pages() -> dict[str, str]:
    """Markdown by the page's path below ``numbers/``: a folder's own page, or one for the results that share a stem."""
    made: dict[str, str] = {}
    for kind, folder in FOLDERS.items():
        for home in homes(folder):
            place = home.relative_to(folder).as_posix()
            if (home / PAGE).exists():
                made[f"{kind}/{place}/index.md"] = (home / PAGE).read_text()
                continue
            for stem in stems(home):
                title = TITLES.get(f"{place}/{stem}", f"{stem}, {place}".capitalize())
                made[f"{kind}/{place}/{stem}.md"] = page(home, stem, title)
    return made


def homes(folder: Path) -> list[Path]:
    """The folders that hold results; what lies below one with a page of its own belongs to that page."""
    found: list[Path] = []
    for home in sorted({path.parent for path in [*folder.rglob("*.json"), *folder.rglob("*.md")]}):
        if not any((above / PAGE).exists() for above in found if above in home.parents):
            found.append(home)
    return found


def pictures() -> dict[str, Path]:
    """The results' pictures by their paths below ``numbers/``."""
    return {
        f"{kind}/{path.relative_to(folder).as_posix()}": path
        for kind, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*.png"))
    }


def stems(home: Path) -> list[str]:
    """The pages of a folder: one for each Markdown, and one for JSON that has none, numbered ones together."""
    written = {path.stem for path in home.glob("*.md")}
    bare = {path.stem.split("-")[0] for path in home.glob("*.json") if path.stem not in written}
    return sorted(written | bare)


def page(home: Path, stem: str, title: str) -> str:
    """One page: what was written beside the JSON, else tables of the JSON's rows; then the pictures."""
    written = home / f"{stem}.md"
    if written.exists():
        text = written.read_text()
        body = text if text.startswith("# ") else f"# {title}\n\n{text}"
    else:
        files = sorted(home.glob(f"{stem}*.json"))
        body = "\n\n".join([f"# {title}", *(tables(path.stem, json.loads(path.read_text())) for path in files)])
    shown = [picture for picture in sorted(home.glob(f"{stem}*.png")) if f"({picture.name})" not in body]
    return "\n\n".join([body, *(f"![{title}: {picture.stem}]({picture.name})" for picture in shown)])


def rows_of(path: str, names: list[str]) -> str:
    """Rows of the first table of a page of results, by what stands in their first columns.

    Raises:
        LookupError: there is no such row.
    """
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("|")]
    found = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(lines)}
    if missing := [name for name in names if name not in found]:
        raise LookupError(f"{path} has no rows {missing}, which a page shows")
    return "\n".join([*lines[:2], *(found[name] for name in names)])


def case_of(path: str, case: str) -> str:
    """The table below a heading of a page of results; LookupError where there is none."""
    _, found, after = (ROOT / path).read_text().partition(f"### {case}\n\n")
    if not found:
        raise LookupError(f"{path} has no case {case}, which a page shows")
    return after.split("\n\n")[0]


def tables(name: str, found: Any) -> str:
    """A result as Markdown: its numbers and settings as one table, each list of rows as another."""
    if isinstance(found, list):
        return f"## {name}\n\n{table(found)}"
    rows = {key: value for key, value in found.items() if is_rows(value)}
    single = [{"": key, "value": value} for key, value in flat({k: v for k, v in found.items() if k not in rows})]
    parts = [f"## {name}", *(table(value) for value in rows.values())]
    return "\n\n".join([*parts, *([folded("Settings and machine", table(single))] if single else [])])


def folded(title: str, text: str) -> str:
    """A part of a page that opens on a click."""
    return "\n".join([f'??? note "{title}"', "", *(f"    {line}" for line in text.splitlines())])


def is_rows(value: Any) -> bool:
    """Whether this is a list of rows."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts by their dotted names."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, nested ones flattened."""
    leaves = [dict(flat(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in leaves for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in leaves)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
