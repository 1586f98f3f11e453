"""``python -m benchmarks``: measure, write the JSON, and make the table and the plots from it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import crossover, memory, report, rnn, scan, stack
from benchmarks.environment import environment
from benchmarks.measure import Library, Method, Row, agreement, first_calls, library, time_all
from hbp.availability import available
from hbp.backends._kernels import level
from hbp.core.registry import LIBRARIES

TABLES = {"scan": scan, "rnn": rnn, "stack": stack, "memory": memory, "crossover": crossover}
ROUNDS = {"quick": 5, "full": 7}
TOLERANCE = 1e-4
"""The largest relative error with which a float32 method passes the test before it is timed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where a method failed its test, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        level()
        given = [name for part in options.backends or () for name in part.split(",")]
        names = list(dict.fromkeys(given)) or [name for name, state in available().items() if state]
        libraries = [library(name) for name in names]
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console, failed = Console(stderr=True), False
    where = environment(libraries)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for table in dict.fromkeys(options.tables):
        with Progress(*columns, console=console, transient=True) as progress:
            rows = _run(table, options.preset, libraries, where["limits"], progress)
        document = {"table": table, "preset": options.preset, "rounds": ROUNDS[options.preset], "environment": where}
        path = options.out / f"{table}.json"
        path.write_text(json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        for row in rows:
            if row.failed:
                failed = True
                console.print(f"[red]{table} {row.case} {row.library} {row.method}: {row.failed}", soft_wrap=True)
        if not rows:
            console.print(f"{table} has no methods for {', '.join(names)}", soft_wrap=True)
        for made in report.write(path):
            console.print(f"wrote {made}", soft_wrap=True)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare the frameworks: every method passes a test before it is timed; times are medians of "
        "interleaved rounds. Writes TABLE.json, and from it TABLE.md and TABLE*.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="|".join(TABLES))
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"array libraries, of {', '.join(LIBRARIES)}; all usable ones if not given",
    )
    parser.add_argument("--preset", choices=list(ROUNDS), default="quick", help="sizes, and the number of rounds")
    parser.add_argument("--out", type=Path, default=Path("hbp-benchmarks"), metavar="FOLDER", help="made if missing")
    return parser


def _run(
    table: str, preset: str, libraries: list[Library], limits: dict[str, dict[str, float]], progress: Progress
) -> list[Row]:
    module = TABLES[table]
    on_gpu = [lib for lib in libraries if lib.on_gpu]
    cases = module.CASES[preset]
    if preset == "full" and on_gpu:
        cases, libraries = module.GPU_CASES, on_gpu
    over_cases = progress.add_task(table, total=len(cases))
    rows = []
    for case in cases:
        task = progress.add_task(" ".join(f"{name}={value}" for name, value in case.items()), total=None)
        advance = partial(progress.advance, task)
        if table == "memory":
            rows += _remember(case, libraries, advance)
        else:
            rows += _time(table, case, libraries, limits, ROUNDS[preset], advance)
        progress.remove_task(task)
        progress.advance(over_cases)
    return rows


def _time(
    table: str,
    case: dict[str, Any],
    libraries: list[Library],
    limits: dict[str, dict[str, float]],
    rounds: int,
    advance: Callable[[], None],
) -> list[Row]:
    """A case's rows: test, error of the gradient, times, fractions of the machine's limits."""
    module = TABLES[table]
    pairs = [(Row.of(table, case, method), method) for lib in libraries for method in module.methods(case, lib)]
    _test_all(table, case, pairs)
    alive = [(row, method) for row, method in pairs if row.failed is None]
    if not alive:
        return [row for row, _ in pairs]
    on_gpu = next((lib for lib in libraries if lib.on_gpu), None)
    exact = module.reference(case, lib=on_gpu)
    for row, found in first_calls(alive):
        agreed = agreement(found, exact)
        row.error, row.cosine = agreed.error, agreed.cosine
        if row.exact and row.error > 10 * TOLERANCE:
            row.failed = f"relative error {row.error:.1e} at full size"
        advance()
    alive = [(row, method) for row, method in alive if row.failed is None]
    time_all(alive, rounds, advance)
    for row, method in alive:
        same = [lib.name for lib in libraries if lib.on_gpu == method.library.on_gpu]
        limit = {name: max(limits[other][name] for other in same) for name in limits[row.library]}
        if table == "scan":
            row.copy_fraction = _share(module.moved_bytes(case), row.whole_ms, limit["copy_bytes_per_s"])
        else:
            row.product_fraction = _share(module.product_flops(case, method), row.backward_ms, limit["flops_per_s"])
    return [row for row, _ in pairs]


def _test_all(table: str, case: dict[str, Any], pairs: list[tuple[Row, Method]]) -> None:
    """Each method at a small size against its own definition in float64; once for all cases of its kind."""
    module = TABLES[table]
    small = {**case, **module.CHECK}
    new: dict[str, Iterator[Method]] = {}
    for row, method in pairs:
        key = (json.dumps(small), row.library, row.method, row.k, row.chunk)
        if row.library not in new:
            new[row.library] = module.methods(small, method.library)
        check = next(new[row.library])
        if not method.yardstick:
            _TESTS[key] = _TESTS.get(key) or _error_or_reason(check, module.reference(small, check))
            row.check, row.failed = _TESTS[key]


_TESTS: dict[tuple[Any, ...], tuple[float | None, str | None]] = {}


def _error_or_reason(method: Method, expected: Any) -> tuple[float | None, str | None]:
    try:
        error = agreement(method.result(method.run()[2]), expected).error
    except Exception as caught:
        return None, f"{type(caught).__name__}: {caught}"
    return error, None if error <= TOLERANCE else f"relative error {error:.1e} in its test, above {TOLERANCE:.0e}"


def _share(amount: int, times: list[float] | None, rate: float) -> float | None:
    return None if times is None else amount / rate / (times[0] / 1e3)


def _remember(case: dict[str, Any], libraries: list[Library], advance: Callable[[], None]) -> list[Row]:
    """A case's rows of memory."""
    rows = []
    for lib in libraries:
        for index, method in enumerate(memory.methods(case, lib)):
            row = Row.of("memory", case, method)
            try:
                row.saved_bytes, row.peak_bytes = memory.measured(case, lib.name, index)
            except RuntimeError as error:
                row.failed = str(error)
            rows.append(row)
            advance()
    return rows


if __name__ == "__main__":
    sys.exit(main())
