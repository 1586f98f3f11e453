"""A case of a table: each method is tested, then its gradient's error is found, then all are timed in turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from benchmarks import memory
from benchmarks.measure import Library, Method, Row, agreement, first_calls, time_all

TABLES = ("scan", "rnn", "stack", "blocks", "memory", "crossover", "rank", "precision")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""The largest relative error with which a method passes the test before it is timed, by its dtype."""
PRODUCTS = 1e-2
"""The same where its products alone are in a lower precision."""
Limits = dict[str, dict[str, float]]


def module_of(table: str) -> Any:
    """The module of this name beside this one."""
    return import_module(f"benchmarks.{table}")


def rows_of(
    table: str,
    case: dict[str, Any],
    libraries: Sequence[Library],
    limits: Limits,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    methods: Callable[[dict[str, Any], Library], Iterator[Method]] | None = None,
) -> list[Row]:
    """The rows of a case, of all the table's methods or of those given."""
    methods = methods or module_of(table).methods
    if table == "memory":
        return remembered(case, libraries, advance, methods)
    return timed(table, case, libraries, limits, rounds, advance, methods)


def timed(
    table: str,
    case: dict[str, Any],
    libraries: Sequence[Library],
    limits: Limits,
    rounds: int,
    advance: Callable[[], None],
    methods: Callable[[dict[str, Any], Library], Iterator[Method]],
) -> list[Row]:
    """A case's rows: test, error of the gradient, times, fractions of the machine's limits."""
    module = module_of(table)
    pairs = [(Row.of(table, case, method), method) for lib in libraries for method in methods(case, lib)]
    _test_all(table, case, pairs, methods)
    alive = [(row, method) for row, method in pairs if row.failed is None]
    if not alive:
        return [row for row, _ in pairs]
    on_gpu = next((lib for lib in libraries if lib.on_gpu and lib.name != "jax"), None)  # JAX's float64 is a setting
    exact = module.reference(case, lib=on_gpu)
    for row, method, found in first_calls(alive):
        agreed = agreement(found, exact)
        row.error, row.cosine = agreed.error, agreed.cosine
        if row.exact and not row.error <= 10 * _tolerance(case, method):
            row.failed = f"relative error {row.error:.1e} at full size"
        advance()
    alive = [(row, method) for row, method in alive if row.failed is None]
    time_all(alive, rounds, advance)
    for row, method in alive:
        same = [lib.name for lib in libraries if lib.on_gpu == method.library.on_gpu]
        limit = {name: max(limits[other][name] for other in same) for name in limits[row.library]}
        if table == "scan":
            row.copy_fraction = _share(module.moved_bytes(case), row.whole_ms, limit["copy_bytes_per_s"])
        elif method.products is None:  # the limit is that of the arrays' dtype
            row.product_fraction = _share(module.product_flops(case, method), row.backward_ms, limit["flops_per_s"])
    return [row for row, _ in pairs]


def _tolerance(case: dict[str, Any], method: Method) -> float:
    return PRODUCTS if method.products else TOLERANCE[case.get("dtype", "float32")]


def _test_all(table: str, case: dict[str, Any], pairs: list[tuple[Row, Method]], methods: Any) -> None:
    """Each method at a small size against its own definition in float64; once for all cases of its kind."""
    module = module_of(table)
    small = {**case, **module.CHECK}
    new: dict[str, dict[Any, Method]] = {}
    for row, method in pairs:
        key = (json.dumps(small), row.library, row.method, row.k, row.chunk)
        if row.library not in new:  # by name: a size may have methods that another has not
            new[row.library] = {_key(one): one for one in methods(small, method.library)}
        if not method.yardstick:
            check = new[row.library][_key(method)]
            allowed = _tolerance(case, method)
            _TESTS[key] = _TESTS.get(key) or _error_or_reason(check, module.reference(small, check), allowed)
            row.check, row.failed = _TESTS[key]


_TESTS: dict[tuple[Any, ...], tuple[float | None, str | None]] = {}


def _error_or_reason(method: Method, expected: Any, tolerance: float) -> tuple[float | None, str | None]:
    try:
        error = agreement(method.result(method.run()[2]), expected).error
    except Exception as caught:
        return None, f"{type(caught).__name__}: {caught}"
    return error, None if error <= tolerance else f"relative error {error:.1e} in its test, above {tolerance:.0e}"


def _share(amount: int, times: list[float] | None, rate: float) -> float | None:
    return None if times is None else amount / rate / (times[0] / 1e3)


def remembered(
    case: dict[str, Any], libraries: Sequence[Library], advance: Callable[[], None], methods: Any
) -> list[Row]:
    """A case's rows of memory."""
    rows = []
    for lib in libraries:
        wanted = {_key(method) for method in methods(case, lib)}
        for index, method in enumerate(memory.methods(case, lib)):
            if _key(method) not in wanted:
                continue
            row, here = Row.of("memory", case, method), lib.on_gpu and lib.name == "torch"
            try:
                found = memory.measured_here(method) if here else memory.measured(case, lib.name, index)
                row.saved_bytes, row.peak_bytes = found
            except RuntimeError as error:
                row.failed = f"{type(error).__name__}: {error}" if here else str(error)
            rows.append(row)
            advance()
    return rows


def _key(method: Method) -> tuple[Any, ...]:
    return method.name, method.k, method.chunk
