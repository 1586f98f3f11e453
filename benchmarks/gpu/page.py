"""The page of a folder of results, and its plots, from the JSON alone: gpu.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu import defaults
from benchmarks.gpu.device import NONE
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import STEPS, Step

NAME = "gpu.md"
TABLES = ("scan", "rnn", "rank", "stack", "blocks", "memory", "graphs")
"""Steps whose parts return rows."""


def write(folder: Path, steps: Sequence[Step] = STEPS) -> list[Path]:
    """Write the page, and the plots where matplotlib is installed; returns the files."""
    records = {step.name: Record.read(path) for step in steps if (path := folder / f"{step.name}.json").exists()}
    pictures: list[Path] = []
    if find_spec("matplotlib") is not None:
        from benchmarks.gpu import pictures as drawing

        pictures = drawing.draw(folder, {name: record.results() for name, record in records.items()})
    parts = [*_head(records), *_steps(records), *_pictures(pictures), *_limits(records), *_correctness(records)]
    parts += [*_search(records), *_rows(records), *_training(records), *_defaults(folder, records)]
    page = folder / NAME
    page.write_text("\n\n".join(parts) + "\n")
    return [page, *pictures]


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _head(records: dict[str, Record]) -> Iterator[str]:
    origin = next(iter(records.values())).origin if records else {"device": NONE, "commit": None, "source": ""}
    there = records["machine"].results().get("environment", {}) if "machine" in records else {}
    yield f"# {'Rehearsal without a device' if origin['device'] == NONE else origin['device']}"
    if origin["device"] == NONE:
        yield "Kernels ran in interpreters, at tiny sizes, on a CPU: no figure on this page says anything about a GPU."
    yield f"Commit {origin['commit'] or 'unknown'}, source {origin['source']}, {there.get('date', '')}."
    if there:
        versions = ", ".join(f"{name} {version}" for name, version in there["versions"].items())
        yield f"{there.get('driver') or ''} {there['processor']}, {there['cores']} cores. {versions}.".strip()
        yield (
            f"Of the {there['minutes']:.0f} minutes of the first call there was room for the whole limits of "
            f"{', '.join(there['fitting']) or 'none'}; other steps had what these left."
        )
        for what in ("missing", "unusable"):
            given = there[what]
            said = [f"{name}: {why}" for name, why in given.items()] if isinstance(given, dict) else given
            if said:
                yield f"{what.capitalize()}: {'; '.join(said)}."


def _steps(records: dict[str, Record]) -> Iterator[str]:
    yield "## What ran"
    lines = []
    for name, record in records.items():
        counts = [len(record.results()), len(record.reasons("failed")), len(record.reasons("skipped"))]
        lines.append([name, *counts, f"{record.seconds:.0f}", record.ended or "at work"])
    yield _table(("step", "done", "failed", "on a device only", "seconds", "ended"), lines)
    for kind, title in (("failed", "Failed"), ("skipped", "On a device only")):
        told = [
            f"* {name}, {part}: {why.splitlines()[0]}"
            for name, record in records.items()
            for part, why in record.reasons(kind).items()
        ]
        if told:
            yield f"{title}:"
            yield "\n".join(told)


def _pictures(pictures: Sequence[Path]) -> Iterator[str]:
    if find_spec("matplotlib") is None:
        yield "No plots: matplotlib is not installed; `python -m benchmarks report FOLDER` draws them from the JSON."
    for path in pictures:
        yield f"![{path.stem}]({path.name})"


def _limits(records: dict[str, Record]) -> Iterator[str]:
    found = records["machine"].results() if "machine" in records else {}
    lines = [
        [
            part.removeprefix("limits of ").removeprefix("products of "),
            name.replace("_per_s", "").replace("_", " "),
            f"{value:.3g}",
        ]
        for part, values in found.items()
        if part != "environment"
        for name, value in values.items()
    ]
    if lines:
        yield "## Limits"
        yield _table(("library", "what", "per second"), lines)


def _correctness(records: dict[str, Record]) -> Iterator[str]:
    if "correctness" in records:
        yield "## Correctness"
        lines = []
        for part, found in records["correctness"].parts.items():
            result = found.get("result", {})
            counts = result if isinstance(result, dict) else {"said": result}
            said = ", ".join(f"{name} {value}" for name, value in counts.items() if not isinstance(value, list))
            lines.append([part, found.get("failed", "").splitlines()[0][:80] if "failed" in found else "", said])
        yield _table(("what", "failed", "found"), [line for line in lines if any(line[1:])])


def _search(records: dict[str, Record]) -> Iterator[str]:
    found = records["search"].results() if "search" in records else {}
    if found:
        yield "## Block sizes"
        lines = []
        for name, one in found.items():
            chosen = ", ".join(f"{key} {value}" for key, value in one["settings"].items()) or "as guessed"
            lines.append([name, chosen, f"{one['ms']:.3g}", f"{one['guessed_ms']:.3g}", len(one["tried"])])
        yield _table(("kernel and size", "fastest", "ms", "ms as guessed", "tried"), lines)


def _rows(records: dict[str, Record]) -> Iterator[str]:
    for name in TABLES:
        if name not in records:
            continue
        rows = tables.of_parts(records[name].results())
        if rows:
            yield f"## {name}"
            if short := tables.in_short(name, rows):
                yield short.strip()
            yield "".join(tables.by_case(name, rows)).strip()
        for rows in records[name].results().values():
            failed = [row for row in rows if row["failed"] is not None]
            if failed:
                yield "\n".join(
                    f"* {tables.title(r['case'])}, {r['library']}, {tables.method_of(r)}: {r['failed']}" for r in failed
                )


def _training(records: dict[str, Record]) -> Iterator[str]:
    found = records["training"].results() if "training" in records else {}
    if found:
        yield "## Training"
        yield "A character GRU on the standard library's sources; the loss is that on held-out text, in nats."
        lines = []
        for name, run in found.items():
            seconds, steps, loss = run["curve"][-1]
            lines.append([name, steps, f"{seconds:.1f}", f"{run['ms_per_step']:.3g}", f"{loss:.4f}"])
        yield _table(("backward pass", "steps", "seconds", "ms per step", "loss at the end"), lines)


def _defaults(folder: Path, records: dict[str, Record]) -> Iterator[str]:
    rows = defaults.measured(folder) if defaults.family(folder) != NONE else ()
    if rows:
        yield "## Defaults that follow"
        yield "For `hbp/backends/_measured.py`:"
        yield f"```python\n{defaults.source(rows)}```"
