"""The fastest block sizes of each kernel at a few sizes: one field after another, each kept at its best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

import hbp
from benchmarks.gpu.correctness import passed
from benchmarks.gpu.machine import libraries
from benchmarks.gpu.steps import Part, There
from benchmarks.measure import Library, agreement, per_call

SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "torch": {"warps": (2, 8), "tile": (1024, 4096), "widest": (32, 128), "waves": (1, 4)},
    "torch low_rank": {"warps": (4, 8), "stages": (1, 3), "bytes": (1 << 16,)},
    "cupy": {"threads": (64, 256), "many": (256, 1024, 2048), "few": (64, 256), "shortest": (16, 64)},
    "jax": {"lanes": (64, 256), "rows": (8, 32), "many": (2**15, 2**17)},
}
"""Beside the guesses. Larger tiles of Triton's take up to 16 s to compile: their numbers fit in no registers."""
REHEARSED = {"torch": {"warps": (8,)}, "torch low_rank": {"bytes": (64,)}, "cupy": {}, "jax": {"lanes": (64,)}}
SIZES = [
    ("suffix_scan", {"T": 16384, "B": 8, "D": 512, "dtype": "float32"}),
    ("suffix_scan", {"T": 16384, "B": 1, "D": 64, "dtype": "float32"}),
    ("gru_rounds", {"T": 4096, "B": 1, "D": 512, "dtype": "float32"}),
    ("lstm_rounds", {"T": 4096, "B": 1, "D": 512, "dtype": "float32"}),
    ("suffix_scan", {"T": 16384, "B": 8, "D": 512, "dtype": "bfloat16"}),
    ("gru_rounds", {"T": 4096, "B": 16, "D": 512, "dtype": "float32"}),
    ("lstm_rounds", {"T": 4096, "B": 16, "D": 512, "dtype": "float32"}),
    ("suffix_scan", {"T": 1024, "B": 8, "D": 512, "dtype": "float32"}),
    ("gru_low_rank_rounds", {"T": 1024, "B": 1, "D": 512, "dtype": "float32"}),
    ("lstm_low_rank_rounds", {"T": 1024, "B": 1, "D": 512, "dtype": "float32"}),
    ("low_rank_scan", {"T": 1024, "B": 8, "D": 512, "dtype": "float32"}),
]
RANK = 16
"""Directions, or as many as there are channels."""
TINY = {"T": 40, "B": 2, "D": 5, "dtype": "float32"}
ALIKE = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far results of two block sizes may lie apart."""


@dataclass(frozen=True)
class Found:
    """The outcome of one search."""

    kernel: str
    dtype: str
    states: int
    channels: int
    settings: dict[str, int]
    """What differs from the guess."""
    ms: float
    guessed_ms: float
    tried: list[dict[str, Any]]


def parts(there: There) -> Iterator[Part]:
    """A search for each kernel that passed its tests, at each size."""
    kernels, usable = passed(there), {lib.name: lib for lib in libraries(there)}
    sizes = [(name, TINY | {"T": 6 if "low_rank" in name else 40}) for name in dict(SIZES)] if there.rehearse else SIZES
    spaces = REHEARSED if there.rehearse else SPACES
    for name, size in sizes:
        for lib in ("torch", "jax", "cupy"):
            label = f"{lib}.{name} {' '.join(f'{key}={value}' for key, value in size.items())}"
            if f"{lib}.{name}" in kernels and lib in usable and (lib, size["dtype"]) != ("cupy", "bfloat16"):
                space = spaces[f"{lib} low_rank" if "low_rank" in name else lib]
                yield Part(label, partial(_search, usable[lib], name, size, space))


def _search(lib: Library, name: str, size: dict[str, Any], space: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    kernels = import_module(f"hbp.backends.{lib.name}.kernels")
    guess, tried = kernels.Held() if "low_rank" in name else kernels.Blocks(), []
    run = call_of(lib, kernels, name, size)
    expected = lib.vector([run(guess)])

    def milliseconds(sizes: Any) -> float:
        call = partial(run, sizes)
        try:
            error = agreement(lib.vector([call()]), expected).error
            if not error <= ALIKE[size["dtype"]]:
                raise ArithmeticError(f"{error:.1e} apart from the guess")
            ms = 1e3 * per_call(lib, call)
        except Exception as refused:  # too many registers, say: one setting less
            tried.append({**_differing(sizes, guess), "failed": f"{type(refused).__name__}: {refused}"[:200]})
            return float("inf")
        tried.append({**_differing(sizes, guess), "ms": ms})
        return ms

    best, ms = guess, milliseconds(guess)
    if not tried[0].get("ms"):
        raise RuntimeError(tried[0]["failed"])
    guessed = ms
    for field, values in space.items():
        for value in values:
            other = replace(best, **{field: value})
            if other != best and (found := milliseconds(other)) < 0.97 * ms:  # less is noise
                best, ms = other, found
    states = size["T"] + name.endswith("scan")
    return asdict(
        Found(
            f"{lib.name}.{name}",
            size["dtype"],
            states,
            size["B"] * size["D"],
            _differing(best, guess),
            ms,
            guessed,
            tried,
        )
    )


def _differing(sizes: Any, guess: Any) -> dict[str, int]:
    return {name: value for name, value in asdict(sizes).items() if value != getattr(guess, name)}


def call_of(lib: Library, kernels: Any, name: str, size: dict[str, Any]) -> Callable[[Any], Any]:
    """A call of a kernel on random arrays of this size, given its block sizes; None: those it would take."""
    if name.endswith("rounds"):
        return _rounds(lib, kernels, name, size)
    return _scan(lib, kernels, size) if name == "suffix_scan" else _low_rank_scan(lib, kernels, size)


def _scan(lib: Library, kernels: Any, size: dict[str, Any]) -> Callable[[Any], Any]:
    rng, shape = np.random.default_rng(0), (size["T"], size["B"], size["D"])
    arrays = rng.random(shape, np.float32), rng.standard_normal((size["T"] + 1, *shape[1:]), np.float32)
    values, c = (lib.cast(lib.array(x), size["dtype"]) for x in arrays)
    if lib.name != "jax":
        return lambda sizes: kernels.suffix_scan(hbp.Diagonal(values), c, sizes)
    import jax

    how = {"interpret": not lib.on_gpu}
    compiled = jax.jit(
        lambda values, c, sizes: kernels.suffix_scan(hbp.Diagonal(values), c, sizes, **how), static_argnums=2
    )
    return lambda sizes: compiled(values, c, sizes)


def _low_rank_scan(lib: Library, kernels: Any, size: dict[str, Any]) -> Callable[[Any], Any]:
    """On the way back, where directions of each step follow those that all share."""
    rng, (T, B, D), rank = np.random.default_rng(0), (size["T"], size["B"], size["D"]), min(RANK, size["D"])
    shapes = (T, B, D), (T, B, D, rank), (1, rank, D)
    values, left, right = (lib.array(rng.random(shape, np.float32) / np.float32(np.sqrt(D))) for shape in shapes)
    c = lib.array(rng.standard_normal((T + 1, B, D), np.float32))
    maps = (hbp.Diagonal(values) + hbp.LowRank(left, right)).T.bind(T, c[-1], lib.front_end.backend)
    return lambda sizes: kernels.low_rank_scan(maps, c, sizes)


def _rounds(lib: Library, kernels: Any, name: str, size: dict[str, Any]) -> Callable[[Any], Any]:
    """One round and the last pass, over a chain as a layer makes it."""
    from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback

    rng, (T, B, H), gru = np.random.default_rng(0), (size["T"], size["B"], size["D"]), name.startswith("gru")

    def drawn(*shape: int) -> Any:
        return lib.array(rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(np.sqrt(H)))

    gates, own = 3 if gru else 4, lib.front_end.backend
    weights = drawn(gates * H, 2), drawn(gates * H, H), drawn(gates * H)
    x, state, h = drawn(T, B, 2), drawn(B, H), drawn(T, B, H)
    if gru:
        chain, c = GRUPullback(GRUParameters(*weights), x, state, h, own).chain, drawn(T + 1, B, H)
    else:
        chain = LSTMPullback(LSTMParameters(*weights), x, (state, state), (h, None), own).chain
        c = drawn(T + 1, B, 2, H)
    strong = (hbp.directions(weights[1], min(RANK, H)),) if "low_rank" in name else ()
    return lambda sizes: getattr(kernels, name)(chain, c, hbp.Solver(1), *strong, sizes)
