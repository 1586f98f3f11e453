"""The tables of `benchmarks` at the sizes that matter on a device, with the kernels on and off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

from benchmarks import cases
from benchmarks import memory as probes
from benchmarks import rnn as recurrent
from benchmarks.gpu.correctness import passed
from benchmarks.gpu.machine import libraries, limits_of
from benchmarks.gpu.steps import Part, There
from benchmarks.measure import Library, Method
from hbp.backends._kernels import VARIABLE

Methods = Callable[[dict[str, Any], Library], Iterator[Method]]
ROUNDS = {True: 2, False: 5}
"""By whether it is a rehearsal."""
REHEARSED: dict[str, list[dict[str, Any]]] = {
    "scan": [
        {"T": 40, "B": 2, "D": 5},
        {"T": 40, "B": 2, "D": 5, "dtype": "bfloat16"},
        {"T": 40, "B": 2, "D": 5, "maps": "identity"},
        {"T": 9, "B": 2, "D": 5, "maps": "low rank"},
    ],
    "rnn": [{"cell": cell, "T": 20, "B": 2, "H": 4, "weights": 1.0} for cell in recurrent.BOTH],
    "rank": [{"cell": "gru", "T": 12, "B": 2, "H": 20, "weights": 1.0, "strong": 2}],
    "stack": [{"L": 6, "d": 4, "B": 2}],
    "blocks": [{"L": 4, "d": 8, "heads": 2, "T": 6}],
    "memory": [{"cell": "gru", "T": 20, "B": 2, "H": 4, "weights": 1.0}],
}
LARGEST = 2**28
"""Numbers in all states of a recurrent case; of larger ones a float64 reference does not fit beside its gates."""
LONGEST = 4096
"""Steps up to which a loop over them in Python is timed: each takes about 10 launches, of 5 microseconds or more."""
DIRECTED = 1024
"""Steps up to which a path with directions is timed without a kernel."""
LOOPS = {"loop over steps": 16384, "jax.lax.scan": 16384}
"""Up to how many steps a scan of one or two launches a step is timed: 2^20 of them take ten seconds."""
IN_TURN = (("torch", "cupy"), ("jax",))
"""Libraries of all cases before those which compile for each of them anew."""


def rnn_cases() -> list[dict[str, Any]]:
    """Those that decide first: small batches, of all lengths."""
    found = [
        {"cell": cell, "T": T, "B": B, "H": H, "weights": 1.0}
        for B, T, H, cell in product((1, 4, 16, 64), (1024, 4096, 16384), (512, 64, 1024), recurrent.BOTH)
    ]
    return [case for case in found if case["T"] * case["B"] * case["H"] <= LARGEST]


def scan(there: There) -> Iterator[Part]:
    """The suffix scan, kernels on."""
    from benchmarks import scan as table

    def short(case: dict[str, Any], lib: Library) -> Iterator[Method]:
        return (one for one in table.methods(case, lib) if case["T"] <= LOOPS.get(one.name, case["T"]))

    methods = with_kernels(short, passed(there), lambda method: method.name == "hbp")
    for names in IN_TURN:
        yield from _parts(there, "scan", table.GPU_CASES, methods, names)


def rnn(there: There) -> Iterator[Part]:
    """GRU and LSTM in PyTorch, kernels on and off; JAX's at a few sizes."""
    small = [case for case in rnn_cases() if case["T"] <= 1024 and case["B"] == 1]
    methods = with_kernels(_layers, passed(there), lambda method: method.name == "Highway-BP")
    yield from _parts(there, "rnn", rnn_cases(), methods, ["torch"])
    yield from _parts(there, "rnn", small, _few_layers, ["jax"])


def rank(there: There) -> Iterator[Part]:
    """GRU and LSTM with strong directions in the residual path, in PyTorch, kernels on and off."""
    from benchmarks import rank as table

    both = with_kernels(table.methods, passed(there), lambda method: "Highway-BP" in method.name)

    def short(case: dict[str, Any], lib: Library) -> Iterator[Method]:
        """Without a kernel a path with directions is a loop in Python, some ten launches a step."""
        for method in both(case, lib):
            if case["T"] <= DIRECTED or "rank" not in method.name or "kernels" in method.name:
                yield method

    yield from _parts(there, "rank", table.GPU_CASES, short, ["torch"])


def stack(there: There) -> Iterator[Part]:
    """Small residual layers."""
    from benchmarks import stack as table

    def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
        return (m for m in table.methods(case, lib) if m.k in (None, 1, 3, 10) and "fixed" not in m.name)

    for names in IN_TURN:
        yield from _parts(there, "stack", table.GPU_CASES, methods, names)


def blocks(there: There) -> Iterator[Part]:
    """Transformer blocks."""
    from benchmarks import blocks as table

    for names in IN_TURN:
        yield from _parts(there, "blocks", table.GPU_CASES, table.methods, names)


def memory(there: There) -> Iterator[Part]:
    """Bytes kept, and the peak; CuPy tells neither."""
    for name in ("torch", "jax"):
        yield from _parts(there, "memory", probes.GPU_CASES, probes.methods, [name])


def _layers(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """What is compared with cuDNN; a loop in Python over many steps takes too long to time."""
    for method in recurrent.methods(case, lib):
        slow = method.name == "exact adjoint" and case["T"] > LONGEST
        if "fixed point" not in method.name and not method.yardstick and not slow:
            yield method


def _few_layers(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """Fewer, where each has to be compiled."""
    return (method for method in _layers(case, lib) if method.k in (None, 3))


def with_kernels(methods: Methods, names: Sequence[str], chosen: Callable[[Method], bool]) -> Methods:
    """All methods with the kernels off, and those chosen with these kernels on, of the library's own."""

    def both(case: dict[str, Any], lib: Library) -> Iterator[Method]:
        own = [name for name in names if name.startswith(lib.name + ".")]
        for method in methods(case, lib):
            if method.name != "hbp" or not own:  # without kernels the scan is Hillis-Steele's, a row beside it
                yield under("off", method)
        for method in methods(case, lib) if own else ():
            if chosen(method):
                yield replace(under(",".join(own), method), name=f"{method.name} (kernels)")

    return both


def under(value: str, method: Method) -> Method:
    """The method as it runs with this value of ``HBP_KERNELS``."""

    def setting(run: Callable[..., Any] | None) -> Callable[..., Any] | None:
        def call(*args: Any) -> Any:
            before = os.environ.get(VARIABLE)
            os.environ[VARIABLE] = value
            try:
                return run(*args)  # type: ignore[misc]
            finally:
                os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})

        return run and call

    return replace(method, forward=setting(method.forward), backward=setting(method.backward))  # type: ignore[arg-type]


def _few(methods: Methods) -> Methods:
    """Of each kind one: in a rehearsal each is there to be seen working."""
    return lambda case, lib: (
        m for m in methods(case, lib) if (m.k, m.chunk or 1) in ((None, 1), (1 if "strong" in case else 3, 1))
    )


def _parts(
    there: There, table: str, sizes: list[dict[str, Any]], methods: Methods, names: Sequence[str]
) -> Iterator[Part]:
    found = [lib for lib in libraries(there) if lib.name in names]
    methods = _few(methods) if there.rehearse else methods
    for case in (REHEARSED[table] if there.rehearse else sizes) if found else ():
        title = " ".join(f"{name}={value}" for name, value in case.items() if name != "weights")
        own = ", ".join(lib.name for lib in found)
        yield Part(f"{own}: {title}", partial(_rows, there, table, case, found, methods))


def _rows(
    there: There, table: str, case: dict[str, Any], found: list[Library], methods: Methods
) -> list[dict[str, Any]]:
    limits = {lib.name: limits_of(there, lib) for lib in found} if table != "memory" else {}
    long = table == "rnn" and case["T"] > LONGEST
    rows = cases.rows_of(table, case, found, limits, 3 if long else ROUNDS[there.rehearse], methods=methods)
    _free()
    return [asdict(row) for row in rows]


def _free() -> None:
    """The device's memory, between cases."""
    import gc
    import sys

    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
