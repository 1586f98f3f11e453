"""The kernels for CPUs against loops in float64, PyTorch's autograd and the plain definitions."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Library

import hbp
from hbp import Diagonal, Identity, LinearOperator, Scalar, Solver, cli
from hbp.backends import _kernels
from hbp.backends.numpy import backend
from hbp.cells import GRUParameters, LSTMParameters, gru, lstm
from hbp.core.operator import Pair
from hbp.core.registry import resolve
from hbp.core.scan import sequential

pytest.importorskip("numba", reason="the kernels are compiled by Numba")
import numba

from hbp.backends import _numba, _tuning
from hbp.backends._numba import adjoints, compile, functions, lowrank, meeting, products, scan, subnormals, way_back
from hbp.backends._numba.compile import Threads
from hbp.backends._numba.forwards import gru_forward, lstm_forward
from hbp.backends._tuned import Timing, Timings
from hbp.backends._tuning import pinned

LENGTHS = (1, 2, 3, 17, 127, 128, 129, 1000)
SHAPES = ((), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2))
TILES = ((4095,), (4096,), (1, 4097), (7, 4097), (2, 8193))  # about as large as a tile
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
every_operator = pytest.mark.parametrize("kind", ["diagonal", "shared", "scalars", "number", "identity"])
ADJOINTS = {"gru": adjoints.gru_adjoint, "lstm": adjoints.lstm_adjoint}
both_cells = pytest.mark.parametrize("cell", ADJOINTS)


@pytest.fixture(autouse=True)
def _kernels_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that numbers never written are seen."""
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args: np.full_like(empty(*args), np.nan))
    if (torch := sys.modules.get("torch")) is not None:
        fresh = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: fresh(*args).fill_(float("nan")))
    monkeypatch.delenv(_kernels.VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def _subnormal_numbers_are_numbers() -> Iterator[None]:
    """In this thread, whatever another test's training has set."""
    torch = sys.modules.get("torch")
    were = np.float32(1e-38) * np.float32(0.1) == 0
    if torch is not None and were:
        torch.set_flush_denormal(False)
    yield
    if torch is not None:
        torch.set_flush_denormal(bool(were))


@pytest.fixture(params=["one", "pool", "torch"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Threads:
    """The calling thread, or seven for whatever little work, of either kind."""
    if request.param == "one":
        return Threads(1, lambda kernel, ranges: pytest.fail("one thread needs no others"))
    monkeypatch.setattr(compile, "SMALL", 1)
    monkeypatch.setattr(scan, "LARGE", 1)
    monkeypatch.setattr(scan, "LONG", 1)
    own = pytest.importorskip("hbp.backends.torch.threads") if request.param == "torch" else None
    return Threads(7, own._in_region if own and own._openmp() else compile._in_pool)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    names: list[str] = []
    for name, kernel in [(name, getattr(_numba, name)) for name in _numba.__all__]:
        called = lambda *args, own=(name, kernel), **how: names.append(own[0]) or own[1](*args, **how)  # noqa: E731
        monkeypatch.setattr(_numba, name, called)
    return names


@pytest.fixture(params=["numpy", "torch"])
def convert(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    """From a NumPy array to the library's, on the same memory where PyTorch can."""
    if request.param == "numpy":
        return lambda a: a
    torch = pytest.importorskip("torch")
    return lambda a: torch.from_numpy(a if a.flags.writeable and min(a.strides, default=0) >= 0 else a.copy())


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal shapes and None where None is expected; values to a part of the largest."""
    for ours, other in zip(found, expected, strict=True):
        assert getattr(ours, "shape", None) == getattr(other, "shape", None)
        if other is not None:
            np.testing.assert_allclose(np.asarray(ours), other, rtol=0, atol=tolerance * np.abs(other).max(initial=0))


def loop(values: Any, c: Any) -> np.ndarray:
    g = np.array(c, dtype=np.float64)
    for i in reversed(range(len(c) - 1)):
        g[i] += np.asarray(values[i], dtype=np.float64) * g[i + 1]
    return g


def operator_of(kind: str, rng: np.random.Generator, length: int, shape: Any, dtype: str) -> tuple[LinearOperator, Any]:
    """Residual maps as a kernel gets them, and what each state is multiplied by."""
    if kind in ("identity", "number"):
        return (Identity(), np.ones(length)) if kind == "identity" else (Scalar(-0.7), np.full(length, -0.7))
    own = {"scalars": (), "shared": (1,) * (len(shape) - 1) + shape[-1:]}.get(kind, shape)
    values = rng.uniform(-1, 1, (length, *own)).astype(dtype)
    return (Scalar if kind == "scalars" else Diagonal)(values), values


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES + TILES, ids=str)
@every_operator
def test_scans_are_the_loop(kind, shape, dtype, threads, rng):
    for length in (3,) if shape in TILES else LENGTHS:
        operator, values = operator_of(kind, rng, length, shape, dtype)
        c = rng.normal(size=(length + 1, *shape)).astype(dtype)
        expected, before = loop(values, c), c.copy()
        found = scan.suffix_scan(operator, c, threads)
        assert found.dtype == dtype
        close([found, c], [expected, before], TOLERANCE[dtype])
        if operator.arrays:
            scan.suffix_scan_(values, c, threads)
            close([c], [expected], TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (2, 0), (0, 2, 3), (2, 3, 0)], ids=str)
def test_no_maps_and_no_channels(shape, threads, rng):
    for length in (0, 3):
        (operator, values), c = (
            operator_of("diagonal", rng, length, shape, "float64"),
            rng.normal(size=(length + 1, *shape)),
        )
        found = scan.suffix_scan(operator, c, threads), hbp.propagate(Diagonal(values), c)
        close(found, [loop(values, c)] * 2, 1e-12)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "gates": lambda a: np.concatenate([np.full_like(a, np.nan), a], -1)[..., a.shape[-1] :],
    "strided": lambda a: np.repeat(np.repeat(a, 2, 0), 3, -1)[::2][..., ::3],
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "one row": lambda a: np.broadcast_to(a[:1], a.shape),
    "one column": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scans_take_any_layout(shape, layout, convert, threads, rng):
    change = LAYOUTS[layout]
    values, c = rng.uniform(-1, 1, (9, *shape)), rng.normal(size=(10, *shape))
    for v, s in ((change(values), c), (values, change(c)), (change(values), change(c))):
        expected, before, g = loop(v, s), (v.copy(), s.copy()), s.copy(order="C")
        close([scan.suffix_scan(Diagonal(convert(v)), convert(s), threads), v, s], [expected, *before], 1e-12)
        scan.suffix_scan_(convert(v), convert(g), threads)
        close([g], [expected], 1e-12)


@both_dtypes
@every_operator
def test_propagate_is_the_kernel(kind, dtype, convert, used, monkeypatch, rng):
    operator, _ = operator_of(kind, rng, 20, (3, 4), dtype)
    given = type(operator)(*map(convert, operator.arrays)) if operator.arrays else operator
    c = convert(rng.normal(size=(21, 3, 4)).astype(dtype))
    found = hbp.propagate(given, c)
    assert (type(found), found.dtype) == (type(c), c.dtype)
    np.testing.assert_array_equal(found, scan.suffix_scan(operator.bind(20, np.asarray(c[0]), backend), np.asarray(c)))
    monkeypatch.setenv(_kernels.VARIABLE, "off")
    close([found], [np.asarray(hbp.propagate(given, c))], TOLERANCE[dtype])
    assert used == ["suffix_scan"]


PATHS = {
    "zero": lambda new, *_: hbp.Zero(),
    "identity": lambda new, *_: Identity(),
    "number": lambda new, *_: Scalar(-0.7),
    "scalars": lambda new, length, *_: Scalar(new(length)),
    "diagonal": lambda new, *shape: Diagonal(new(*shape)),
    "pair": lambda new, *shape: Pair(*(new(*shape[:-1], 2, n) for n in (shape[-1] // 2, 1))),
}


@both_dtypes
@pytest.mark.parametrize("path", PATHS)
def test_scans_with_directions_are_the_loop(path, dtype, convert, used, threads, rng):
    """Factors of each sequence or shared, of each step or shared, of several ranks, in both directions."""
    sizes = ((1, (1,), 2, 1), (3, (), 6, 2), (20, (3,), 34, 17), (7, (2, 5), 8, 8), (2, (4,), 4, 0))
    for (length, batch, d, rank), own, each in product(sizes, (True, False), (True, False)):
        new = lambda *shape: (rng.normal(size=shape) / 3).astype(dtype)  # noqa: E731
        leading = (length if each else 1, *(batch if own else ()))
        maps = PATHS[path](new, length, *batch, d) + hbp.LowRank(new(*leading, d, rank), new(*leading, rank, d))
        c = new(length + 1, *batch, *((2, d // 2) if path == "pair" else (d,)))
        for given in (maps, maps.T):
            ours, wide = given.mapped(convert), given.mapped(lambda array: array.astype(float))
            before = [np.asarray(array).copy() for array in (c, *ours.arrays)]
            found = hbp.propagate(ours, convert(c))
            assert (type(found), used.pop()) == (type(convert(c)), "low_rank_scan")
            expected = sequential(wide.bind(length, c[0].astype(float), backend), c.astype(float), backend)
            close([found, c, *ours.arrays], [expected, *before], 10 * TOLERANCE[dtype])
            bound = ours.bind(length, convert(c)[-1], resolve(None, convert(c)))
            np.testing.assert_array_equal(lowrank.low_rank_scan(bound, convert(c), threads), found)


def test_scans_with_directions_of_nothing(threads, rng):
    for length, batch, d in ((0, 3, 4), (3, 0, 4), (3, 2, 0)):
        maps = Diagonal(np.ones((length, batch, d))) + hbp.LowRank(np.ones((1, d, 0)), np.ones((1, 0, d)))
        c = rng.normal(size=(length + 1, batch, d))
        close([hbp.propagate(maps, c)], [np.cumsum(c[::-1], 0)[::-1]], 1e-12)


def problem(cell: str, rng: Any, size: Any, dtype: str, biases: Any = (True, True), dc: bool = True) -> Any:
    T, B, H = size
    gates, kind, forward = (3, GRUParameters, gru) if cell == "gru" else (4, LSTMParameters, lstm)
    new = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    params = kind(new(gates * H, 2), new(gates * H, H), *(new(gates * H) if bias else None for bias in biases))
    x, dh = new(T, B, 2), new(T, B, H)
    initial, d = (new(B, H), dh) if cell == "gru" else ((new(B, H), new(B, H)), (dh, new(T, B, H) if dc else None))
    return forward(params, x, initial)[1], d


def gates_of(pullback: Any) -> Any:
    """What a forward keeps."""
    forward, initial = (gru, pullback.h0) if hasattr(pullback, "h0") else (lstm, pullback.initial)
    return forward(pullback.params, pullback.x, initial, keep="gates")[1].gates


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    return Library("numpy", None, change, np.asarray).tree(tree)


def leaves(tree: Any) -> list[Any]:
    return [leaf for item in tree for leaf in leaves(item)] if isinstance(tree, tuple) else [tree]


def plain(pullback: Any, cotangents: Any, iterations: int | None = None, **options: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_kernels.VARIABLE, "off")
        return leaves(replace(pullback, gates=None)(cotangents, iterations, **options))


@both_cells
@both_dtypes
def test_saturated_gates_are_shut(cell, dtype):
    """Not up to rounding alone: what a gate loses at each step adds up."""
    count, kind, forward = (3, GRUParameters, gru) if cell == "gru" else (4, LSTMParameters, lstm)
    bias = np.array([-100, 100, 0] if cell == "gru" else [-100, 100, 100, 100], dtype)
    params = kind(np.zeros((count, 1), dtype), np.zeros((count, 1), dtype), bias)
    one = np.ones((1, 1), dtype)
    states, pullback = forward(params, np.zeros((5000, 1, 1), dtype), one if cell == "gru" else (one, one))
    last = states if cell == "gru" else states[1]
    assert last[-1].item() == 1
    d = np.zeros_like(last)
    d[-1] = 1
    found = pullback(d if cell == "gru" else (np.zeros_like(d), d))[2]
    assert (found if cell == "gru" else found[1]).item() == 1


@pytest.mark.parametrize("kernels", ["auto", "off"])
@both_cells
def test_gradients_may_be_written_into(cell, kernels, convert, monkeypatch, rng):
    """Clipping in place scales each of them once."""
    monkeypatch.setenv(_kernels.VARIABLE, kernels)
    pullback, d = problem(cell, rng, (5, 3, 4), "float64")
    own = [mapped(convert, value) for name, value in vars(pullback).items() if name not in ("backend", "gates")]
    found = leaves(type(pullback)(*own, resolve(None, own[1]))(mapped(convert, d)))
    expected = [np.asarray(g) / 2 for g in found]
    for g in found:
        g /= 2
    close(found, expected, 0)


@both_cells
def test_cells_run_under_autocast(cell, rng):
    torch = pytest.importorskip("torch")
    pullback, d = problem(cell, rng, (5, 3, 4), "float32")
    own = [
        mapped(torch.from_numpy, v) for name, v in vars(pullback).items() if name in ("params", "x", "h0", "initial")
    ]
    forward, ours, expected = gru if cell == "gru" else lstm, mapped(torch.from_numpy, d), plain(pullback, d)
    with torch.autocast("cpu", torch.bfloat16):
        found = leaves(forward(*own)[1](ours))
    close([g.float() for g in found], expected, 4e-2)


@pytest.mark.parametrize("width", [32, 64])
@both_dtypes
def test_products_in_tiles(dtype, width, monkeypatch, rng):
    """Every height and width of a tile and what is left beside it, on rows of a larger array, from the second on.

    Of both widths of a vector: LLVM makes of them what the processor has.
    """
    monkeypatch.setattr(_tuning, "vector_bytes", lambda: width)
    tiles = runpy.run_path(str(Path(_numba.__file__).with_name("tiles.py")))
    add_product, add_panels = tiles["add_product"], tiles["add_panels"]
    whole = numba.njit(lambda rows, weight, sums, start, stop: add_product(rows, weight, sums, start, stop))
    in_panels = numba.njit(lambda rows, weight, sums, start, stop: add_panels(rows, weight, sums, start, stop))
    for batch, length, columns in product(range(9), (0, 1, 5), (0, 1, 7, 8, 16, 17, 31, 33, 64, 72, 129)):
        rows = rng.standard_normal((batch, length + 2)).astype(dtype)[:, 1 : length + 1]
        weight, sums = (rng.standard_normal((n, columns)).astype(dtype) for n in (length, batch))
        expected = np.vstack([sums[:1], sums[1:] + rows[1:] @ weight])
        for add, given in ((whole, weight), (in_panels, products.panels(weight, columns, max(columns, 1))[0])):
            found = np.concatenate([sums, np.full_like(sums, 7)], 1)  # beside the sums nothing is written
            add(rows, given, found[:, :columns], min(1, batch), batch)
            np.testing.assert_allclose(found[:, :columns], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert (found[:, columns:] == 7).all()


@both_cells
@both_dtypes
@pytest.mark.parametrize("way", ["loop", "calls"])
def test_forwards_are_the_plain_cells(cell, dtype, way, used, monkeypatch, rng):
    forward = gru if cell == "gru" else lstm
    for size, biases in zip(
        product((1, 9), (1, 3, 8), (1, 7, 33)), cycle(product((True, False), repeat=2)), strict=False
    ):
        pullback, _ = problem(cell, rng, size, dtype, biases)
        params = type(pullback.params)(*(w if w is None else w / 4 for w in pullback.params))  # amplify less
        given = params, pullback.x, pullback.h0 if cell == "gru" else pullback.initial
        with monkeypatch.context() as patch:
            patch.setenv(_kernels.VARIABLE, "off")
            expected = leaves(forward(*given)[0])
        for keep in ("states", "gates"):
            with pinned({f"{cell} forward": way}):
                states, kept = forward(*given, keep=keep)
            close(leaves(states), expected, TOLERANCE[dtype])
            assert (kept.gates is None) == (keep == "states")
    assert used.count(f"{cell}_forward") == 3 * 18


@both_cells
@both_dtypes
@pytest.mark.parametrize("step", ["loop", "calls", "spans"])
def test_adjoints_are_the_plain_pullback(cell, step, dtype, threads, monkeypatch, rng):
    if step == "spans":
        monkeypatch.setattr(way_back, "SPAN", 1)  # of 8 steps, the first shorter
    way = "calls" if step == "calls" else "loop"
    options = cycle(product(product((True, False), repeat=2), (True, False), (True, False)))
    for size, (biases, dc, c) in zip(product((1, 2, 30), (1, 2, 4, 7, 9), (1, 5, 8)), options, strict=False):
        pullback, cotangents = problem(cell, rng, size, dtype, biases, dc)
        expected = plain(pullback, cotangents)
        if cell == "lstm" and not c:  # the states c have to be computed again
            pullback = replace(pullback, states=(pullback.states[0], None))
        with_gates = replace(pullback, gates=gates_of(pullback))
        for given in (pullback, with_gates):
            with pinned({"gru backward": way, "lstm backward": way}):
                found = ADJOINTS[cell](given, cotangents, threads=threads)
            close(leaves(found), expected, TOLERANCE[dtype])
        k = size[0] // 2
        found = ADJOINTS[cell](with_gates, cotangents, threads=threads, solver=Solver(k))
        close(leaves(found), plain(pullback, cotangents, k), TOLERANCE[dtype])
        found = ADJOINTS[cell](pullback, cotangents, False, threads)
        close(found[0], expected[:4], TOLERANCE[dtype])
        assert found[1] is None


def by_turns(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """One thread for all."""
    for part in ranges:
        kernel(*part)


def backwards(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """One thread for all, the last first."""
    by_turns(kernel, ranges[::-1])


def without_the_first(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """One thread for all but the first, which something has stopped."""
    by_turns(kernel, ranges[1:])


def late(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """A thread for each, all but the first long behind it."""
    others = [threading.Timer(0.05, kernel, part) for part in ranges[1:]]
    for other in others:
        other.start()
    kernel(*ranges[0])
    for other in others:
        other.join()


SPREADS = ["pool", "torch", by_turns, backwards, without_the_first, late]


@pytest.mark.skipif(not meeting.POSIX, reason="no threads go together here")
@both_cells
@both_dtypes
@pytest.mark.parametrize("spread", SPREADS)
def test_threads_that_share_the_units_are_one_thread(cell, dtype, spread, monkeypatch, rng):
    """Whole vectors and less, more threads than vectors, spans of time; whoever comes, and when."""
    real = spread in ("pool", "torch")
    if real:
        own = pytest.importorskip("hbp.backends.torch.threads") if spread == "torch" else None
        spread = own._in_region if own and own._openmp() else compile._in_pool
    monkeypatch.setattr(products, "_crowded", products._Crowded())
    made: list[np.ndarray] = []
    monkeypatch.setattr(products, "meeting", lambda parts: made.append(meeting.meeting(parts)) or made[-1])
    monkeypatch.setattr(products, "LATE", float("inf"))  # busy or not, units are shared
    monkeypatch.setattr(way_back, "SPAN", 1)
    lanes, end = products.BYTES // np.dtype(dtype).itemsize, time.monotonic() + 60
    sizes = [(1, 1, lanes + 4, 2), (9, 3, 129, 2), (17, 2, 4 * lanes + 6, 3), (9, 0, 33, 7)]
    while sizes:
        length, batch, size, count = sizes[0]
        pullback, cotangents = problem(cell, rng, (length, batch, size), dtype)
        made.clear()
        if cell == "gru":
            forward = partial(gru_forward, pullback.params, pullback.x, pullback.h0, True, backend)
        else:
            forward = partial(lstm_forward, pullback.params, pullback.x, pullback.initial, backend)
        several, found = Threads(count, spread), []
        assert "shared" in products.ways(several, size, batch, np.dtype(dtype).itemsize)
        for way, threads in (("loop", Threads(1, by_turns)), ("shared", several)):
            with pinned({f"{cell} forward": way, f"{cell} backward": way}):
                states = forward(threads=threads)
                found.append([*leaves(states), *leaves(ADJOINTS[cell](pullback, cotangents, threads=threads))])
        close(found[1], found[0], 1e-6 if dtype == "float32" else 1e-14)
        teams = [counters for counters in made if len(counters)]
        together = [counters[0] == len(counters) // meeting.LINE - 1 for counters in teams]
        assert teams
        assert real or not any(together)
        if any(together) or not real:  # else the machine was busy, and one went alone each time
            sizes.pop(0)
        assert time.monotonic() < end, "they never went together"


@pytest.mark.skipif(not meeting.POSIX, reason="no threads go together here")
def test_units_are_not_shared_for_a_while_where_threads_are_kept_from_running(monkeypatch, caplog):
    weight, pause = np.zeros((3, 64)), [0.0]
    monkeypatch.setattr(products, "_crowded", products._Crowded())
    row = Timing("gru forward", "numpy", 1, 64, {"loop": 2.0, "shared": 1e-3})
    threads = Threads(2, lambda kernel, ranges: time.sleep(pause[0]))

    def chosen() -> products.Product:
        return products.Product.of("gru forward", backend, weight, 64, 5, 1, threads)

    with _tuning.given(Timings("", (row,))), caplog.at_level(logging.WARNING, "hbp"):
        chosen().run(lambda *_: None, 5, 1)
        assert chosen().way == "shared"
        pause[0] = 0.06  # 5 steps of more than ten times as long
        chosen().run(lambda *_: None, 5, 1)
        assert chosen().way == "loop"
        monkeypatch.setattr(products._crowded, "until", time.monotonic())
        chosen().run(lambda *_: None, 5, 1)
        assert chosen().way == "loop"
    assert caplog.text.count("wait too long for each other") == 1


@numba.njit(nogil=True)
def _join(counters: np.ndarray, me: int, parts: int) -> tuple[int, int]:
    first, last = meeting.join(counters, me, parts)
    return first, last


@numba.njit(nogil=True)
def _walk(counters: np.ndarray, me: int, traces: np.ndarray) -> int:
    """Leave a trace at every turn, one member in its own time, meet, and count those of others that are not there."""
    missing, x = 0, 1.0
    for turn in range(len(traces)):
        if (turn + me) % 3 == 0:
            for _ in range(300):
                x = 1.0 / (1.0 + x)
        traces[turn, me] += x > 0
        meeting.meet(counters, me, traces.shape[1], turn + 1)
        missing += traces.shape[1] - traces[turn].sum()
    return missing


@pytest.mark.skipif(not meeting.POSIX, reason="no threads go together here")
def test_threads_go_together_where_all_come_and_else_one_goes_alone():
    for parts in (2, 3, 4):
        _join(meeting.meeting(1), 0, parts)  # compiled
        with ThreadPoolExecutor(parts) as pool:
            end = time.monotonic() + 60
            while True:
                counters = meeting.meeting(parts)
                found = list(pool.map(lambda me, on=counters, n=parts: _join(on, me, n), range(parts)))
                if found == [(me, me + 1) for me in range(parts)]:
                    break
                assert sorted(found) == [(0, 0)] * (parts - 1) + [(0, parts)]  # on a busy machine
                assert time.monotonic() < end, "they never went together"
                time.sleep(0.01)
            counters = meeting.meeting(parts)
            some = list(pool.map(lambda me, on=counters, n=parts: _join(on, me, n), range(1, parts)))
            assert sorted(some) == [(0, 0)] * (parts - 2) + [(0, parts)]
            assert _join(counters, 0, parts) == (0, 0)


@pytest.mark.skipif(not meeting.POSIX, reason="no threads go together here")
@pytest.mark.parametrize("members", [2, 3])
def test_nobody_goes_on_from_a_meeting_before_all_have_come(members):
    _walk(meeting.meeting(2), 0, np.zeros((0, 2), np.int64))
    counters, traces = meeting.meeting(members), np.zeros((300, members), np.int64)
    with ThreadPoolExecutor(members) as pool:
        assert list(pool.map(lambda me: _walk(counters, me, traces), range(members))) == [0] * members
    assert (traces == 1).all()


@pytest.mark.parametrize("posix", [True, False])
def test_the_systems_functions_are_called_where_they_are(posix, monkeypatch):
    """A name that is nowhere would end the process when the code is loaded."""
    if posix and not meeting.POSIX:
        pytest.skip("no such system")
    monkeypatch.setattr(meeting, "POSIX", posix)
    fresh = numba.njit(meeting.join.py_func)
    fresh(np.zeros(0, np.int64), 0, 1)
    (text,) = fresh.inspect_llvm().values()
    assert ("sched_yield" in text, "clock_gettime" in text) == (posix, posix)


TINY = np.finfo(np.float32).tiny
"""The smallest normal number."""


def subnormal(x: Any) -> np.ndarray:
    return (np.asarray(x) != 0) & (np.abs(x) < TINY)


@both_cells
@pytest.mark.parametrize("solver", [Solver(), Solver(200), Solver(200, 8)], ids=["exact", "rounds", "stages"])
def test_cotangents_too_small_for_normal_numbers_are_zero(cell, solver, threads, rng):
    """Of the last state alone: they leave float32's normal numbers long before the first one."""
    pullback, cotangents = problem(cell, rng, ({"gru": 172, "lstm": 150}[cell], 2, 8), "float32")
    pullback = replace(pullback, params=type(pullback.params)(*(weight / 8 for weight in pullback.params)))
    cotangents, dh = (cotangents, cotangents) if cell == "gru" else ((cotangents[0], None), cotangents[0])
    dh[:-1] = 0
    expected = plain(pullback, cotangents)
    with pinned({f"{cell} backward": "loop"}):  # of calls, the library's product has the last word
        found = leaves(ADJOINTS[cell](pullback, cotangents, threads=threads, solver=solver))
    close(found[:5], expected[:5], 1e-5)
    for first, other in zip(found[5:], expected[5:], strict=True):  # of the initial states
        assert subnormal(other).any()
        np.testing.assert_allclose(first, other, rtol=0, atol=100 * TINY)
        assert solver.chunk > 1 or not (subnormals.X86 and subnormal(first).any())  # between stages NumPy adds
    assert TINY * np.float32(0.5) != 0  # outside the kernels all is as before


def test_a_thread_that_takes_them_as_zero_itself_goes_on_so(rng):
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such setting")
    scan.suffix_scan(Diagonal(np.ones((3, 2), np.float32)), np.ones((4, 2), np.float32))
    assert TINY * np.float32(0.5) == 0


@pytest.mark.parametrize("kind", ["scan", "in place", "directions"])
def test_scans_take_what_is_too_small_for_normal_numbers_as_zero(kind, threads):
    values, c = np.full((140, 3), 0.5, np.float32), np.zeros((141, 3), np.float32)
    c[-1] = 1
    expected, found = loop(values, c), c.copy()
    if kind == "in place":
        scan.suffix_scan_(values, found, threads)
    elif kind == "scan":
        found = scan.suffix_scan(Diagonal(values), c, threads)
    else:
        none = hbp.LowRank(np.zeros((1, 3, 1), np.float32), np.zeros((1, 1, 3), np.float32))
        found = lowrank.low_rank_scan((Diagonal(values) + none).bind(140, c[0], backend), c, threads)
    assert subnormal(expected).any()
    np.testing.assert_array_equal(found, np.where(subnormal(expected) & subnormals.X86, 0, expected))
    assert TINY * np.float32(0.5) != 0


@both_cells
@both_dtypes
def test_rounds_with_directions_are_the_plain_pullback(cell, dtype, threads, rng):
    """Of every rank, below, at and above a vector's length, with measured increments and without."""
    for size, rank in product([(1, 1, 3), (4, 2, 20), (9, 5, 8)], (0, 1, 3, 8, 17, 20)):
        if rank > size[2]:
            continue
        pullback, cotangents = problem(cell, rng, size, dtype)
        pullback = replace(pullback, gates=gates_of(pullback))
        taken = hbp.directions(pullback.params.weight_hh, rank)
        for k in (0, 1, 3):
            reports: list[Any] = []
            expected = plain(pullback, cotangents, k, rank=taken, watch=reports.append)
            for solver in (Solver(k), Solver(k, watch=reports.append)):
                found = ADJOINTS[cell](pullback, cotangents, threads=threads, solver=solver, directions=taken)
                close(leaves(found), expected, 10 * TOLERANCE[dtype])
            core, ours = reports
            assert ours.exact == core.exact
            for a, b in ((ours.increments, core.increments), (ours.sizes, core.sizes)):
                np.testing.assert_allclose(a, b, rtol=0, atol=10 * TOLERANCE[dtype] * max(core.sizes))


@both_cells
@both_dtypes
@pytest.mark.parametrize("way", ["loop", "calls", "spans"])
def test_rounds_on_stages_are_the_plain_pullback(cell, dtype, way, threads, monkeypatch, rng):
    """Stages of all lengths, the last of fewer steps or not, as long as the sequence and longer."""
    monkeypatch.setattr(scan, "own_threads", lambda: pytest.fail("the scan runs on other threads than those given"))
    if way == "spans":
        monkeypatch.setattr(way_back, "SPAN", 1)
    options = cycle(product(product((True, False), repeat=2), (True, False), (True, False), (True, False)))
    sizes = product(((1, 2), (6, 3), (7, 3), (7, 6), (20, 9), (5, 5), (5, 50)), ((1, 8), (3, 5), (2, 1)))
    for ((length, chunk), size), (biases, dc, kept, c) in zip(sizes, options, strict=False):
        pullback, cotangents = problem(cell, rng, (length, *size), dtype, biases, dc)
        given = replace(pullback, gates=gates_of(pullback) if kept else None)
        if cell == "lstm" and not c:
            given = replace(given, states=(given.states[0], None))
        for k in (0, 1, 50):
            reports: list[Any] = []
            expected = plain(pullback, cotangents, k, chunk=chunk, watch=reports.append)
            for watch in (None, reports.append):
                with pinned({f"{cell} backward": "calls" if way == "calls" else "loop"}):
                    solver = Solver(k, chunk, watch=watch)
                    found = ADJOINTS[cell](given, cotangents, threads=threads, solver=solver)
                close(leaves(found), expected, 10 * TOLERANCE[dtype])
            core, ours = reports
            assert (ours.exact, len(ours.increments)) == (core.exact, len(core.increments))
            for a, b in ((ours.increments, core.increments), (ours.sizes, core.sizes)):
                np.testing.assert_allclose(a, b, rtol=0, atol=10 * TOLERANCE[dtype] * max(core.sizes))
        assert ADJOINTS[cell](given, cotangents, False, threads, Solver(1, chunk))[1] is None


@both_cells
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_a_tolerance_stops_the_compiled_rounds_where_it_stops_the_core(cell, scale, used, rng):
    pullback, cotangents = problem(cell, rng, (12, 3, 6), "float64")
    cotangents = mapped(lambda d: d * scale, cotangents)
    for how, tolerance in product(({}, {"rank": 3}, {"chunk": 3}, {"chunk": 5}), (0.3, 1e-3)):
        reports: list[Any] = []
        options = {**how, "tolerance": tolerance, "watch": reports.append}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hbp.DivergenceWarning)
            close(leaves(pullback(cotangents, **options)), plain(pullback, cotangents, **options), 1e-11)
        assert len(reports[0].increments) == len(reports[1].increments)
        assert reports[0].shares[-1] <= tolerance or reports[0].exact
    assert used.count(f"{cell}_adjoint") == 8


@both_cells
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_tolerance_of_nothing_asks_for_all_rounds_of_compiled_code_too(cell, chunk, used, rng):
    """And is not called missed after them: they are exact, also where cotangents are far below the largest."""
    pullback, cotangents = problem(cell, rng, (60, 2, 8), "float32")
    d = cotangents if cell == "gru" else cotangents[0]
    d[:-1] = 0
    d = d if cell == "gru" else (d, None)
    reports: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", hbp.DivergenceWarning)
        found = leaves(pullback(d, chunk=chunk, tolerance=0.0, watch=reports.append))
    close(found, plain(pullback, d), 1e-4)
    assert reports[0].exact
    assert used[-1] == f"{cell}_adjoint"


@both_cells
@both_dtypes
@pytest.mark.parametrize("chunk", [1, 8])
def test_a_tolerance_below_rounding_ends_the_compiled_rounds_where_nothing_else_changes(cell, dtype, chunk, used, rng):
    """Not rounds later, and with no word of increments that grow: the core's shrink below the solution's rounding."""
    pullback, cotangents = problem(cell, rng, (400, 2, 16), dtype)
    pullback = replace(pullback, params=type(pullback.params)(*(weight / 4 for weight in pullback.params)))
    reports: list[Any] = []
    options = {"chunk": chunk, "tolerance": np.finfo(dtype).eps / 20, "watch": reports.append}
    with warnings.catch_warnings():
        warnings.simplefilter("error", hbp.DivergenceWarning)
        found, expected = leaves(pullback(cotangents, **options)), plain(pullback, cotangents, **options)
    close(found, expected, 10 * TOLERANCE[dtype])  # the tolerance is one of the norm of all
    ours, core = reports
    assert len(ours.increments) <= len(core.increments) < 400 / chunk
    assert ours.shares[-1] <= 16 * np.finfo(dtype).eps < ours.shares[-2]
    assert used[-1] == f"{cell}_adjoint"


@both_cells
def test_a_tolerance_of_compiled_rounds_ends_at_once_without_finite_numbers_or_any(cell, used, rng):
    for (bad, batch), chunk in product(((np.nan, 2), (np.inf, 2), (0.0, 0)), (1, 4)):
        pullback, cotangents = problem(cell, rng, (9, batch, 6), "float64")
        mapped(lambda d, bad=bad: d.fill(bad), cotangents)
        reports = []
        with np.errstate(all="ignore"):
            found = leaves(pullback(cotangents, tolerance=0.1, chunk=chunk, watch=reports.append))
        assert (len(reports[0].increments), reports[0].finite) == (1, batch == 0)
        assert all(np.isfinite(g).all() for g in found) == (batch == 0)
    assert used.count(f"{cell}_adjoint") == 6


def test_increments_that_grow_are_a_warning_of_compiled_rounds_too():
    """Blocks of -1.5 beside a path of nearly nothing: what crosses k of them, against the sum."""
    weight = np.concatenate([np.zeros((4, 2)), -1.5 * np.eye(2)])
    params = GRUParameters(np.zeros((6, 1)), weight, np.repeat([9.0, -9.0, 0.0], 2))
    h, pullback = gru(params, np.zeros((30, 1, 1)), np.zeros((1, 2)))
    with pytest.warns(hbp.DivergenceWarning, match="the increments grow, and 10 rounds have not met"):
        pullback(np.ones_like(h), 10, tolerance=1e-3)


@both_cells
def test_each_loop_asks_for_its_own_times_at_its_own_size(cell, monkeypatch, rng):
    asked = []
    monkeypatch.setattr(_numba.products, "fastest", lambda *what: asked.append(what) or "loop")
    pullback, cotangents = problem(cell, rng, (4, 2, 5), "float64")
    ways = products.ways(compile.own_threads(), 5, 2, 8)
    assert asked.pop() == (f"{cell} forward", "numpy", 2, 5, ways, 4)
    pullback(cotangents)
    assert asked == [(f"{cell} backward", "numpy", 2, 5, ways, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@both_cells
def test_adjoints_take_any_layout(cell, layout, convert, rng):
    pullback, d = problem(cell, rng, (11, 5, 4), "float64")
    own = [value for name, value in vars(pullback).items() if name not in ("backend", "gates")]
    given = [mapped(LAYOUTS[layout], part) for part in (*own, d)]
    before, ours = leaves(mapped(np.copy, tuple(given))), [mapped(convert, part) for part in given]
    for options in ({}, {"iterations": 1, "chunk": 4}):
        expected = plain(type(pullback)(*given[:-1], backend), given[-1], **options)
        found = type(pullback)(*ours[:-1], resolve(None, ours[1]))(ours[-1], **options)
        close([*leaves(found), *leaves(tuple(given))], [*expected, *before], 1e-12)


@pytest.mark.parametrize("shape", ["plain", "packed", "batch_first", "autocast"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@both_cells
def test_layers_are_pytorchs(cell, dtype, shape, used, monkeypatch):
    torch, hb = pytest.importorskip("torch"), pytest.importorskip("hbp.backends.torch")
    oracles = pytest.importorskip("torch_oracles")
    if shape == "autocast" and not oracles.under_autocast(cell.upper()):
        pytest.skip("PyTorch has no such layer for this processor")
    monkeypatch.setattr(compile, "SMALL", 1)
    options = {"num_layers": 2, "bidirectional": True} if shape == "packed" else {"batch_first": shape == "batch_first"}
    x = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x if shape == "batch_first" else x.swapaxes(0, 1)
    lengths = torch.tensor([4, 3, 3, 2, 2, 2, 1, 1, 1])

    def gradients(library: Any, dtype: Any, autocast: bool, **own: Any) -> list[Any]:
        torch.manual_seed(1)
        layer, leaf = oracles.opened(getattr(library, cell.upper())(3, 5, **options, **own)).to(dtype), x.to(dtype)
        leaf = leaf.requires_grad_() if leaf is not x else x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            packed = shape == "packed"
            y, _ = layer(torch.nn.utils.rnn.pack_padded_sequence(leaf, lengths) if packed else leaf)
            y = y.data if packed else y
            loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum()
            found = torch.autograd.grad(loss, [*layer.parameters(), leaf], retain_graph=True)
        return [g.double().numpy() for g in found]

    given = getattr(torch, dtype), shape == "autocast"
    expected, found = gradients(torch.nn, *given), gradients(hb, *given, exact="adjoint")
    assert shape == "autocast" or (f"{cell}_adjoint" in used) == (dtype in TOLERANCE)
    rounded = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}
    tolerance = rounded["bfloat16" if shape == "autocast" else dtype]
    close(found, expected, tolerance)
    for k in range(3):  # no approximate one would have passed; parameters' gradients are exact at k = 3
        rough = gradients(hb, torch.float64, False, iterations=k)
        assert max(abs(a - b).max() / abs(b).max() for a, b in zip(rough, expected, strict=True)) > 3 * tolerance


@pytest.mark.filterwarnings("ignore:.*(is deprecated|trace to be incorrect)")
@pytest.mark.parametrize("how", ["forward mode", "jit.trace", "make_fx", "negative bit", "twice backward"])
def test_what_does_more_than_compute_sees_the_operations(how, rng):
    torch, values, c = pytest.importorskip("torch"), rng.uniform(-1, 1, (5, 3)), rng.normal(size=(6, 3))
    maps, x = Diagonal(torch.from_numpy(values)), torch.from_numpy(c)
    solve = lambda c: hbp.propagate(maps, c)  # noqa: E731
    if how == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            found = torch.autograd.forward_ad.unpack_dual(solve(torch.autograd.forward_ad.make_dual(x, x))).tangent
    else:
        found = {
            "jit.trace": lambda: torch.jit.trace(solve, (torch.ones_like(x),), check_trace=False)(x),
            "make_fx": lambda: torch.fx.experimental.proxy_tensor.make_fx(solve)(torch.ones_like(x))(x),
            "negative bit": lambda: solve(torch.complex(x, -x).conj().imag),
            "twice backward": lambda: torch.autograd.functional.jvp(solve, x, x)[1],
        }[how]()
    close([found], [loop(values, c)], 1e-12)


def test_which_arrays_have_kernels(convert, monkeypatch, capsys):
    half, single, double, integer = (convert(np.ones((3, 2), dtype)) for dtype in ("f2", "f4", "f8", "i4"))
    own = resolve(None, single)
    assert own.kernel("gru_rounds", single) is None
    assert all([own.kernel("suffix_scan", single), own.kernel("suffix_scan", double, double)])
    for arrays in ((single, double), (integer,), (half,)):
        assert own.kernel("suffix_scan", *arrays) is None
    assert backend.kernel("suffix_scan", np.ones(3, np.longdouble)) is None
    monkeypatch.setenv(_kernels.VARIABLE, "off")
    assert own.kernel("suffix_scan", single) is None
    monkeypatch.setenv(_kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="HBP_KERNELS='fast'; give one of auto, all, off"):
        own.kernel("suffix_scan", single)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err.startswith("hbp: HBP_KERNELS='fast'; give one of auto, all, off, or names of torch.")


def test_the_path_is_logged_once_and_a_broken_compiler_is_a_warning(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "hbp")
    for value in ("auto", "off", "all"):
        monkeypatch.setenv(_kernels.VARIABLE, value)
        _kernels.Kernels._loaded.cache_clear()
        if value == "all":
            monkeypatch.setitem(sys.modules, "hbp.backends._numba", None)
            with pytest.warns(UserWarning, match="numba: .* cannot be loaded, the plain definitions run"):
                backend.kernel("suffix_scan", np.ones(1))
        assert [hbp.propagate(Identity(), np.ones((3, 1)))[0].item() for _ in range(3)] == [3, 3, 3]
    _kernels.Kernels._loaded.cache_clear()
    paths = [record.message.split(": ", 1)[1].split(",")[0] for record in caplog.records]
    assert paths == ["numba: suffix scan", "plain (HBP_KERNELS=off)", "numba: suffix scan"]
    assert {name.rstrip("_") for name in _numba.__all__} == set(_kernels.CPU.names)  # none runs unnamed


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", f"import numpy as np, hbp, os, sys\n{code}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_numba_is_imported_by_the_first_kernel(name):
    pytest.importorskip(name)
    loaded, use = "print('numba' in sys.modules)\n", "hbp.propagate(hbp.Identity(), hb.backend.xp.ones((2, 3)))\n"
    assert run(f"{loaded}hb = hbp.use({name!r})\n{loaded}{use}{loaded}").split() == ["False", "False", "True"]


def test_compiled_code_is_kept_until_what_is_compiled_into_it_changes(tmp_path):
    folder = shutil.copytree(Path(hbp.__file__).parent, tmp_path / "hbp", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from hbp.backends._numba.scan import _scan\nprint(len(_scan(np.dtype('f8')).stats.cache_hits))"
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kept"), "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    assert [run(code, **kept).strip() for _ in range(2)] == ["0", "1"]
    assert {file.suffix for file in tmp_path.rglob("*.nb?")} == {".nbi", ".nbc"}
    with (folder / "backends" / "_numba" / "rows.py").open("a") as file:
        file.write("# another\n")
    assert run(code, **kept).strip() == "0"


@both_dtypes
def test_functions_are_right_relatively_to_their_values(dtype):
    logistic, tanh = functions.logistic, functions.tanh

    @numba.njit(fastmath={"contract"}, error_model="numpy")
    def both(x, opened, bent):
        for i in range(len(x)):
            opened[i], bent[i] = logistic(x[i]), tanh(x[i])

    largest, ends, bound = (87, 104, 3e-7) if dtype == "float32" else (708, 745, 5e-16)
    if dtype == "float64" and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        bound *= 2  # the reference is rounded, too
    sizes = np.concatenate([np.geomspace(1e-30, 1, 3000), np.linspace(0.01, largest, 20_000)])
    beyond = np.array([largest + 0.1, 0.99 * ends, ends + 1, 2e3, np.inf, 0.0])
    x = np.concatenate([sizes, -sizes, np.stack([beyond, -beyond], 1).ravel(), [np.nan]]).astype(dtype)
    opened, bent = np.empty_like(x), np.empty_like(x)
    both(x, opened, bent)
    exact, inside = x.astype(np.longdouble), abs(x) <= largest
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(opened[inside], 1 / (1 + np.exp(-exact[inside])), rtol=bound, atol=0)
        np.testing.assert_allclose(bent, np.tanh(exact), rtol=bound, atol=0)
    least = opened[2 * len(sizes) - 1]  # at the end of the normal numbers
    np.testing.assert_array_equal(opened[2 * len(sizes) :], [1, least, 1, least, 1, 0, 1, 0, 1, 0, 0.5, 0.5, np.nan])
    np.testing.assert_array_equal(np.signbit(bent[-3:-1]), [False, True])
    np.testing.assert_array_equal(opened[exact > (17.4 if dtype == "float32" else 37.5)], 1)


SCAN = """
import atexit, signal, threading, time
from hbp.backends._numba import compile
compile.SMALL, compile.numba.config.NUMBA_NUM_THREADS, found = 1, 3, []
scan = lambda: found.append(bool(hbp.propagate(hbp.Identity(), np.ones((4, 9))).sum() == 90))
atexit.register(lambda: print(len(found), all(found)))
for _ in range(20): scan()
time.sleep(0.2)
"""


@pytest.mark.parametrize("last", ["atexit.register(scan)", "threading.Timer(1, scan).start()", "fork"])
def test_kernels_run_while_the_interpreter_ends_and_after_a_fork(last):
    if last == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    code = "child = os.fork()\nos.waitpid(child, 0) if child else signal.alarm(20)\nscan()" if last == "fork" else last
    assert run(SCAN + code) == "21 True\n" * (1 + (last == "fork"))


@both_cells
def test_kernels_run_in_several_threads_at_once(cell, threads, rng):
    problems = [problem(cell, rng, (20, 5, 8), "float64") for _ in range(4)]
    expected = [plain(*given) for given in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda given: leaves(ADJOINTS[cell](*given, threads=threads)), problems)
            for ours, others in zip(found, expected, strict=True):
                close(ours, others, 1e-12)


def test_the_result_may_be_written_into_an_array_given():
    values, c = np.full((5, 2, 3), 0.5), np.arange(36.0).reshape(6, 2, 3)
    third = np.full_like(c, np.nan)
    assert scan.suffix_scan(Diagonal(values), c, out=third) is third
    np.testing.assert_array_equal(third, scan.suffix_scan(Diagonal(values), c))
    assert scan.suffix_scan(Diagonal(values[:0]), c[:1], out=third[:1]).tolist() == c[:1].tolist()
