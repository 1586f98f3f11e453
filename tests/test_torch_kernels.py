"""The Triton kernels against loops in NumPy and the core's definitions: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hbp
from hbp import Diagonal, Identity, LinearOperator, LowRank, Pair, Scalar, Solver, Zero
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback
from hbp.core.scan import sequential
from hbp.directions import Directions

torch = pytest.importorskip("torch", reason="the kernels take torch's tensors")
GPU = torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
    triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
    from hbp.backends.torch import kernels
    from hbp.backends.torch.array import TorchBackend
    from hbp.backends.torch.kernels import gru, iteration, low_rank_scan, lowrank, lstm, scan, suffix_scan
    from hbp.backends.torch.kernels.iteration import Arrays, Measure

    tl = triton.language
    SUM = tl.sum if GPU else triton.jit(tl.sum.fn)  # torch may have imported Triton before, to compile

LENGTHS = (0, 1, 2, 3, 127, 128, 129, 1000)
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROUNDED = {"float32": 3e-7, "bfloat16": 2**-8, "float16": 2**-11, "float64": 1e-14}
"""Half a unit in the last place; Triton's interpreter truncates to bfloat16, which errs by up to twice that."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and not GPU:
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    if request.param == "cpu" and GPU:
        pytest.skip("the kernels are compiled for the CUDA device here, not interpreted")
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(tl, "sum", SUM)
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that numbers never written are seen."""

    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocated(*args: Any, **kwargs: Any) -> Any:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def in_chunks(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """Time in one piece, or in chunks of few and short tiles."""
    monkeypatch.setattr(scan, "processors", lambda device: 3 if cut else 0)
    if cut:
        monkeypatch.setattr(scan, "GUESSED", scan.Blocks(tile=16))
        monkeypatch.setattr(scan, "SHORTEST", 2)


@pytest.fixture(params=["whole", "cut"])
def time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, request.param == "cut")


@pytest.fixture(params=["whole", "cut", "directions"])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Of the directions beside the gates; None along the gates alone, with time whole and cut."""
    in_chunks(monkeypatch, request.param == "cut")
    return 3 if request.param == "directions" else None


def exact(x: Any) -> np.ndarray:
    return np.asarray(x.double().cpu().numpy())


def loop(a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``g[i] = a[i] g[i+1] + c[i]`` in float64."""
    g = np.array(c, dtype=np.float64)
    for i in range(len(c) - 2, -1, -1):
        g[i] += a[i] * g[i + 1]
    return g


def diagonals(operator: LinearOperator, length: int, ndim: int) -> np.ndarray:
    """The maps' factors, lifted for states with ``ndim - 1`` axes."""
    if not operator.arrays:
        return np.full(length, getattr(operator, "value", 1.0))
    values = exact(operator.arrays[0])
    return values.reshape((length, *(1,) * (ndim - values.ndim), *values.shape[1:]))


def check_scan(operator: LinearOperator, c: Any) -> Any:
    """Solve, compare with the loop, and see that nothing else has changed."""
    given = (c, *operator.arrays)
    before = [x.clone() for x in given]
    g = suffix_scan(operator, c)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert (g.shape, g.dtype, g.device, g.is_contiguous()) == (c.shape, c.dtype, c.device, True)
    assert all(g.data_ptr() != x.data_ptr() for x in given if g.numel())
    a = diagonals(operator, len(c) - 1, c.ndim)
    close(g, loop(a, exact(c)), loop(np.abs(a), np.abs(exact(c))), str(c.dtype).removeprefix("torch."))
    return g


def close(g: Any, expected: np.ndarray, magnitude: np.ndarray, name: str) -> None:
    """One rounding of the result, and what sums of terms of this magnitude lose before it."""
    rounded = ROUNDED[name] * (2 if name == "bfloat16" and not GPU else 1)
    summed, error = 1e-14 if name == "float64" else 1e-6, np.abs(exact(g) - expected)
    assert (error <= rounded * np.abs(expected) + summed * magnitude + 1e-7 * (name == "float16")).all()


def operator_of(kind: str, rng: np.random.Generator, shape: tuple[int, ...], array: Callable[[Any], Any]) -> Any:
    """Maps with factors below 1 on ``shape[0]`` states of shape ``shape[1:]``."""
    if kind == "identity":
        return Identity()
    if kind == "number":
        return Scalar(0.9)
    if kind == "scalars":
        return Scalar(array(rng.uniform(-1, 1, shape[0])))
    return Diagonal(array(rng.uniform(-1, 1, (shape[0], *shape[1:][-1:]) if kind == "shared" else shape)))


def to(device: str, dtype: str) -> Callable[[Any], Any]:
    return lambda x: torch.from_numpy(np.asarray(x)).to(device, getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diagonal", "shared", "scalars", "number", "identity"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan(length: int, kind: str, dtype: str, device: str, rng: np.random.Generator) -> None:
    array = to(device, dtype)
    shape = (2, 2) if length < 1000 else (2,)
    check_scan(operator_of(kind, rng, (length, *shape), array), array(rng.normal(size=(length + 1, *shape))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("length", [1, 47, 48, 200])
def test_scan_cut_in_time(
    length: int, dtype: str, device: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "GUESSED", scan.Blocks(tile=64))
    monkeypatch.setattr(scan, "processors", lambda device: 2)
    assert scan.Cut.of(length + 1, 3, 4, 2).chunks == {1: 1, 47: 3, 48: 4, 200: 4}[length]
    array = to(device, dtype)
    c = array(rng.normal(size=(length + 1, 3)))
    check_scan(operator_of("diagonal", rng, (length, 3), array), c)
    check_scan(Scalar(0.99), c)


def layouts(rng: np.random.Generator, array: Callable[[Any], Any]) -> dict[str, tuple[Any, Any]]:
    """Factors and sources as layers hold them, (19, ...) and (20, ...)."""
    L, B, H = 19, 3, 5
    values, c = array(rng.uniform(-1, 1, (L, B, 2 * H))), array(rng.normal(size=(L + 1, B, 2 * H)))
    by_batch = array(rng.normal(size=(B, L + 1, H)))
    return {
        "gate": (values[..., H:], c[..., :H].contiguous()),
        "both gates": (values[..., H:], c[..., :H]),
        "batch first": (values[..., H:], by_batch.transpose(0, 1)),
        "units first": (values[..., H:], array(rng.normal(size=(L + 1, H, B))).transpose(1, 2)),
        "later steps": (array(rng.uniform(-1, 1, (2 * L, B, H)))[::2], c[..., :H]),
        "one batch": (values[:, :1, :H], c[..., :H]),
        "one unit": (values[..., :1], c[..., H:]),
        "expanded": (values[:, :1, :1].expand(L, B, H), c[:, :1, :H].expand(L + 1, B, H)),
        "no axes": (values[:, 0, 0], c[:, 1, 1]),
        "no batch": (values[:, :0], c[:, :0]),
    }


@pytest.mark.usefixtures("time")
@pytest.mark.parametrize("case", layouts(np.random.default_rng(0), torch.from_numpy))
def test_layouts_are_read_where_they_lie(
    case: str, device: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, c = layouts(rng, to(device, "float32"))[case]
    shape = (len(a), *c.shape[1:])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)
        aligned, values, axes = scan._aligned(c, a.expand(shape))
    assert aligned is c
    assert values.data_ptr() == a.data_ptr()
    assert len(axes) <= 2
    check_scan(Diagonal(a), c)


@pytest.mark.parametrize("swapped", [False, True])
def test_other_layouts_are_copied(swapped: bool, device: str, rng: np.random.Generator) -> None:
    array = to(device, "float64")
    c, values = array(rng.normal(size=(6, 2, 3, 4, 2))), array(rng.uniform(-1, 1, (5, 2, 1, 4, 1)))
    check_scan(Diagonal(values), c.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4) if swapped else c)
    assert len(scan._axes(c, c)) == 1


@pytest.mark.parametrize("processors", [0, 1, 132])
def test_every_row_and_channel_is_dealt_once(processors: int) -> None:
    for rows in (1, 2, 17, 1025, 16385):
        for channels in (1, 5, 64, 2048, 100_000):
            cut = scan.Cut.of(rows, channels, 4, processors)
            assert (cut.blocks - 1) * cut.width < channels <= cut.blocks * cut.width
            chunk = cut.tiles * cut.height
            assert (cut.chunks - 1) * chunk < rows <= cut.chunks * chunk
            assert cut.chunks == 1 or processors
            assert cut.height * cut.width <= max(scan.GUESSED.tile, 16 * cut.width)


def gru_chain(rng: np.random.Generator, T: int, B: int, H: int, array: Callable[[Any], Any]) -> Any:
    params = GRUParameters(*(array(2 * rng.normal(size=shape)) for shape in ((3 * H, 2), (3 * H, H), (3 * H,))))
    x, h0, h = (array(rng.uniform(-1, 1, shape)) for shape in ((T, B, 2), (B, H), (T, B, H)))
    return GRUPullback(params, x, h0, h, TorchBackend()).chain


def lstm_chain(rng: np.random.Generator, T: int, B: int, H: int, array: Callable[[Any], Any]) -> Any:
    params = LSTMParameters(*(array(2 * rng.normal(size=shape)) for shape in ((4 * H, 2), (4 * H, H), (4 * H,))))
    x, h0, c0, h = (array(rng.uniform(-1, 1, shape)) for shape in ((T, B, 2), (B, H), (B, H), (T, B, H)))
    return LSTMPullback(params, x, (h0, c0), (h, None), TorchBackend()).chain


CHAINS = {"gru": (gru_chain, ()), "lstm": (lstm_chain, (2,))}
MODULES = {"gru": gru, "lstm": lstm}
each_cell = pytest.mark.parametrize("cell", CHAINS)


def factors_of(rng: np.random.Generator, chain: Any, rank: int, array: Callable[[Any], Any]) -> Directions:
    """As directions of the weight would be, but neither its own nor orthogonal."""
    rows, size = chain.pullbacks.weight.shape
    return Directions(array(rng.normal(size=(rows, rank + 1))), array(rng.normal(size=(rank + 1, size)) / 2), rank)


def split(chain: Any, directions: Directions | None) -> Any:
    """The chain whose residual path the directions are part of."""
    if directions is None:
        return chain
    own, (left, right) = chain.pullbacks, directions.taken
    blocks = type(own)(*(getattr(own, name) for name in vars(own) if name != "weight"), own.weight - left @ right)
    more = (TorchBackend(),) if isinstance(own, lstm.LSTMBlocks) else ()
    return hbp.LinearizedChain(blocks, chain.residual + own.along(left, right, *more))


FORMS = ("first", "middle", "last", "only", "measured first", "measured", "measured last", "settled")


@each_cell
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 7, 18])
def test_pass(T: int, form: str, rank: int | None, cell: str, device: str, rng: np.random.Generator) -> None:
    chain_of, pair = CHAINS[cell]
    array, B, H = to(device, "float64"), 2, 3
    chain = chain_of(rng, T, B, H, array)
    c, pulled, old = (array(rng.normal(size=(T + n, B, *own, H))) for n, own in ((1, pair), (0, ()), (1, pair)))
    blocks, path = chain.pullbacks, chain.residual.arrays[0]
    given = (path, c, blocks.gains) if cell == "gru" else (path[..., 0, :], blocks.exposed, c, blocks.gains)
    given += () if rank is None else (factors_of(rng, chain, rank, array).taken,)
    name = f"{cell}_pass" if rank is None else f"{cell}_low_rank_pass"

    def run(call: Any, programs: int) -> list[Any]:
        measure = Measure.of(c, 0.1, programs) if "measured" in form or form == "settled" else None
        if measure is not None:
            measure.sums.fill_(0 if form == "settled" else float("nan"))
            measure.settled.fill_(form == "settled")
        out = None if form in ("last", "only", "measured last") else torch.full_like(blocks.gains, float("nan"))
        states = old.clone() if measure is not None or out is None else None
        call(*given, Arrays(None if form in ("first", "only", "measured first") else pulled, out, states, measure))
        return [out, states, None if measure is None else measure.sums.sum(0)]

    before = [x.clone() for x in (c, pulled, path, blocks.gains)]
    programs = scan.cut_of(c, T + 1, B * H, None).programs if rank is None else B
    found, expected = (run(getattr(MODULES[cell], which), n) for which, n in ((name, programs), (f"plain_{name}", 4)))
    for ours, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12, equal_nan=form == "settled")
    assert all(torch.equal(x, y) for x, y in zip((c, pulled, path, blocks.gains), before, strict=True))


def solve(cell: str, chain: Any, c: Any, solver: Solver, directions: Directions | None, **sizes: Any) -> Any:
    if directions is None:
        return getattr(MODULES[cell], f"{cell}_rounds")(chain, c, solver, **sizes)
    return getattr(MODULES[cell], f"{cell}_low_rank_rounds")(chain, c, solver, directions, **sizes)


@each_cell
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 3, 9])
def test_rounds(k: int, dtype: str, rank: int | None, cell: str, device: str, rng: np.random.Generator) -> None:
    chain_of, pair = CHAINS[cell]
    T, B, H = 9, 2, 3
    chain = chain_of(rng, T, B, H, to(device, dtype))
    c = to(device, dtype)(rng.normal(size=(T + 1, B, *pair, H)))
    directions = None if rank is None else factors_of(rng, chain, rank, to(device, dtype))
    g = solve(cell, chain, c, Solver(k), directions)
    assert (g.shape, g.dtype, g.is_contiguous()) == (c.shape, c.dtype, True)
    if (k, dtype) == (T, "float64"):
        assert torch.equal(solve(cell, chain, c, Solver(k + 3), directions), g)
    # The gates' products, what they pull back and the result are rounded in every round.
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    wide = split(widened(chain), directions and Directions(directions.left.double(), directions.right.double(), rank))
    expected, *others = (hbp.highway(wide, c[-1].double(), j, sources=c[:-1].double()) for j in (k, abs(k - 1), k + 1))
    scale = 1 if rank is None else 2  # the rest of the weight is a difference
    assert torch.linalg.norm(g.double() - expected) <= scale * tolerance * torch.linalg.norm(expected)
    for other in others if k < T else ():  # neither iterate beside it would have passed
        assert torch.linalg.norm(other - expected) > 3 * tolerance * torch.linalg.norm(expected)


def widened(chain: Any) -> Any:
    arrays = {name: x.double() for name, x in vars(chain.pullbacks).items()}
    return hbp.LinearizedChain(type(chain.pullbacks)(**arrays), chain.residual.mapped(lambda x: x.double()))


@each_cell
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_a_tolerance_stops_the_rounds_where_it_stops_the_core(
    scale: float, rank: int | None, cell: str, device: str, rng: np.random.Generator
) -> None:
    """What the host hears is what the core measures, and no pass changes anything behind the last round."""
    chain_of, pair = CHAINS[cell]
    chain, array = chain_of(rng, 12, 2, 3, to(device, "float64")), to(device, "float64")
    c = array(scale * rng.normal(size=(13, 2, *pair, 3)))
    directions = None if rank is None else factors_of(rng, chain, 2, array)
    for options in ({"tolerance": 0.3}, {"tolerance": 0.0, "iterations": 4}, {"iterations": 2}, {"tolerance": 1.0}):
        reports: list[Any] = []
        solver = Solver(**options, watch=reports.append)
        expected = hbp.highway(split(chain, directions), c[-1], sources=c[:-1], solver=solver)
        torch.testing.assert_close(solve(cell, chain, c, solver, directions), expected, rtol=1e-10, atol=1e-10 * scale)
        core, ours = reports
        assert (len(ours.increments), ours.exact) == (len(core.increments), core.exact)
        np.testing.assert_allclose(ours.increments, core.increments, rtol=1e-9, atol=1e-12 * scale)
        np.testing.assert_allclose(ours.sizes, core.sizes, rtol=1e-9)


def test_half_precision_meets_any_tolerance(device: str, rng: np.random.Generator) -> None:
    """What a round changes is measured before it is rounded, and nothing is changed again and again by rounding."""
    chain, reports = gru_chain(rng, 20, 2, 3, to(device, "bfloat16")), []
    c = to(device, "bfloat16")(rng.normal(size=(21, 2, 3)))
    g = solve("gru", chain, c, Solver(tolerance=0.0, watch=reports.append), None)
    assert (g.dtype, reports[0].increments[-1]) == (torch.bfloat16, 0)


def test_what_is_not_finite_is_told_and_ends_the_rounds(device: str, rng: np.random.Generator) -> None:
    chain, reports = gru_chain(rng, 9, 2, 3, to(device, "float32")), []
    c = to(device, "float32")(rng.normal(size=(10, 2, 3)))
    c[4, 1, 1] = float("nan")
    solve("gru", chain, c, Solver(3, tolerance=0.5, watch=reports.append), None)
    assert (len(reports[0].increments), reports[0].finite) == (1, False)


@pytest.mark.parametrize("met", [True, False])
def test_sums_of_many_programs_settle(met: bool, device: str, rng: np.random.Generator) -> None:
    measure = Measure.of(to(device, "float64")(np.array([2.0, -4.0])), 0.5, 3000)
    assert measure.scale.tolist() == [0.25, 0.5]
    sums = to(device, "float64")(rng.uniform(1, 2, (3000, 2)))
    sums[:, 0] *= 0.2 if met else 0.4
    measure.sums.copy_(sums)
    for turn in range(2):  # the second time it is told no more, where all is settled
        rows = [torch.full((3,), -1.0, dtype=torch.float64, device=device) for _ in range(2)]
        for call, row in ((iteration.plain_settle, rows[0]), (iteration.settle, rows[1])):
            measure.settled.fill_(met and turn)
            call(measure, row)
            assert bool(measure.settled) == met
        torch.testing.assert_close(rows[0], rows[1])
        if not (turn and met):
            assert rows[0].tolist() == pytest.approx([*(sums.sum(0).sqrt() * 4).tolist(), float(met)])


@each_cell
def test_rounds_read_strided_sources(cell: str, rank: int | None, device: str, rng: np.random.Generator) -> None:
    chain_of, pair = CHAINS[cell]
    chain = chain_of(rng, 7, 2, 3, to(device, "float64"))
    directions = None if rank is None else factors_of(rng, chain, 1, to(device, "float64"))
    c = to(device, "float64")(rng.normal(size=(2, 8, *pair, 3))).transpose(0, 1)
    expected = hbp.highway(split(chain, directions), c[-1], 2, sources=c[:-1])
    torch.testing.assert_close(solve(cell, chain, c, Solver(2), directions), expected)


@each_cell
@pytest.mark.parametrize("rank", [0, 1, 4, 5, 8])
def test_directions_some_at_a_time(rank: int, cell: str, device: str, rng: np.random.Generator) -> None:
    """Where not all fit in a program's registers, and where there are none."""
    chain_of, pair = CHAINS[cell]
    chain = chain_of(rng, 3, 1, 9, to(device, "float64"))
    directions = factors_of(rng, chain, rank, to(device, "float64"))
    c = to(device, "float64")(rng.normal(size=(4, 1, *pair, 9)))
    sizes = lowrank.Held(bytes=1600, stages=1)
    assert sizes.constants(9, rank, 4, c.dtype)["PARTS"] == max(-(-rank // 2), 1)
    expected = hbp.highway(split(chain, directions), c[-1], 1, sources=c[:-1])
    torch.testing.assert_close(solve(cell, chain, c, Solver(1), directions, sizes=sizes), expected)


PATHS: dict[str, Callable[..., LinearOperator]] = {
    "zero": lambda new, *_: Zero(),
    "identity": lambda new, *_: Identity(),
    "number": lambda new, *_: Scalar(-0.7),
    "scalars": lambda new, length, *_: Scalar(new(length)),
    "diagonal": lambda new, *shape: Diagonal(new(*shape)),
    "shared": lambda new, length, *shape: Diagonal(new(length, shape[-1])),
    "pair": lambda new, *shape: Pair(*(new(*shape[:-1], 2, n) for n in (shape[-1] // 2, 1))),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 1 << 18], ids=["some", "all"])
def test_scan_with_directions(
    size: int, dtype: str, path: str, device: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of each sequence or shared, of each step or shared, of several ranks, in both directions."""
    monkeypatch.setattr(lowrank, "GUESSED", lowrank.Held(size))
    array, backend = to(device, dtype), TorchBackend()
    for length, batch, d, rank, own, each in (
        (1, (1,), 2, 1, True, True),
        (3, (), 6, 2, False, True),
        (4, (2, 3), 4, 3, True, False),
        (2, (2,), 4, 0, False, False),
    ):
        new = lambda *shape: array(rng.normal(size=shape) / 3)  # noqa: E731
        leading = (length if each else 1, *(batch if own else ()))
        maps = PATHS[path](new, length, *batch, d) + LowRank(new(*leading, d, rank), new(*leading, rank, d))
        c = new(length + 1, *batch, *((2, d // 2) if path == "pair" else (d,)))
        for given in (maps, maps.T):
            bound, before = given.bind(length, c[-1], backend), [x.clone() for x in (c, *given.arrays)]
            g = low_rank_scan(bound, c)
            assert (g.shape, g.dtype, g.is_contiguous()) == (c.shape, c.dtype, True)
            assert all(torch.equal(x, y) for x, y in zip((c, *given.arrays), before, strict=True))
            expected = sequential(bound.mapped(lambda x: x.double()), c.double(), backend)
            close(g, exact(expected), 1 + np.abs(exact(expected)), dtype)


def test_bad_input_is_named(device: str, rng: np.random.Generator) -> None:
    array = to(device, "float32")
    c, chain = array(np.ones((4, 2))), gru_chain(rng, 3, 2, 2, array)
    with pytest.raises(TypeError, match=r"torch\.int64; the Triton kernels take one of torch\.float32"):
        suffix_scan(Identity(), c.long())
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.float64"):
        suffix_scan(Diagonal(c[:3].double()), c)
    with pytest.raises(TypeError, match="operator is a Zero; give a bound Diagonal, Scalar or Identity"):
        suffix_scan(hbp.Zero(), c)
    for values in (c, c[:3, :, None], array(np.ones((3, 3)))):
        with pytest.raises(ValueError, match=r"broadcasts to \(3, 2\)"):
            suffix_scan(Diagonal(values), c)
    with pytest.raises(ValueError, match="one entry per state"):
        suffix_scan(Identity(), c[:0])
    with pytest.raises(TypeError, match="GRUBlocks and the residual Diagonal; these rounds take LSTMBlocks and Pair"):
        lstm.lstm_rounds(chain, array(np.ones((4, 2, 2, 2))), Solver(1))
    with pytest.raises(ValueError, match=r"expected \(4, 2, 2\)"):
        gru.gru_rounds(chain, array(np.ones((3, 2, 2))), Solver(1))
    with pytest.raises(TypeError, match="operator is a Identity; give a bound LowRank"):
        low_rank_scan(Identity(), c)
    with pytest.raises(TypeError, match="the path is a Other; give a Diagonal"):
        low_rank_scan(LowRank(c[:3, :, None], c[:3, None], type("Other", (LinearOperator,), {})()), c)
    own = Directions(array(np.ones((6, 1))), array(np.ones((1, 2))), 1)
    for wrong in (Directions(own.left[1:], own.right, 1), Directions(own.left, own.right[:, 1:], 1)):
        with pytest.raises(ValueError, match=r"the directions' (left|right) factor has shape"):
            gru.gru_low_rank_rounds(chain, array(np.ones((4, 2, 2))), Solver(1), wrong)
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.float64"):
        gru.gru_low_rank_rounds(
            chain, array(np.ones((4, 2, 2))), Solver(1), Directions(own.left.double(), own.right, 1)
        )


@each_cell
def test_cells_and_solvers_ask_for_the_kernels(
    cell: str, device: str, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    """The pullbacks of the cells and `propagate` with the kernels are those without."""
    gates, steps, batch, size = 3 if cell == "gru" else 4, 9, 2, 4
    shapes = ((gates * size, 3), (gates * size, size), (gates * size,), (gates * size,))
    params = [torch.from_numpy(rng.normal(size=shape)).to(device) for shape in shapes]
    x, d = (torch.from_numpy(rng.normal(size=(steps, batch, n))).to(device) for n in (3, size))
    state, asked = d[0] / 2, []
    maps = Diagonal(x[1:]) + LowRank(x[1:, :, :, None], x[1:, :, None])

    def pulled(**options: Any) -> list[Any]:
        if cell == "gru":
            found = hbp.cells.gru(GRUParameters(*params), x, state)[1](d, **options)
            return [*found[0], *found[1:]]
        found = hbp.cells.lstm(LSTMParameters(*params), x, (state, state))[1]((d, d), **options)
        return [*found[0], found[1], *found[2]]

    def all_of_it() -> list[Any]:
        solvers = {"iterations": 0}, {"iterations": 3}, {"iterations": 2, "rank": 2}, {"tolerance": 0.1, "rank": 1}
        gradients = [g for solver in solvers for g in pulled(**solver)]
        return [*gradients, hbp.propagate(Diagonal(x[1:]), x), hbp.propagate(maps, x)]

    def kernel(self: Any, name: str, *arrays: Any) -> Any:
        asked.append(name)
        return getattr(kernels, name, None)

    monkeypatch.setattr(TorchBackend, "kernel", lambda *_: None)
    expected = all_of_it()
    monkeypatch.setattr(TorchBackend, "kernel", kernel)
    found = all_of_it()
    assert {f"{cell}_rounds", f"{cell}_low_rank_rounds", "suffix_scan", "low_rank_scan"} <= set(asked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


COMPILE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hbp import Identity
from hbp.backends.torch.kernels import gru, iteration, lowrank, lstm, scan, suffix_scan

SCALARS = {"rows", "channels", "tiles", "inner", "hidden", "steps", "size", "rank", "programs"}
WIDE = {"carries", "products", "states", "scale", "sums", "row"}

def compiled(kernel, dtype, architecture, constants, **flags):
    acc = scan.wide(getattr(torch, dtype))
    short = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
    constants = {**constants, **scan.precision(acc), **flags}
    options = {name: constants.pop(name) for name in ("enable_fp_fusion", "num_warps") if name in constants}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS or "_" in name:
            signature[name] = "i32"
        else:
            signature[name] = "*" + ("i32" if name == "settled" else short[str(acc)[6:] if name in WIDE else dtype])
    target = GPUTarget("cuda", architecture, 32)
    code = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options).asm["ptx"]
    assert ".entry " + kernel.__name__ in code and "st.global" in code, code[:500]
    assert f".target sm_{architecture}" in code, code[:500]

def cut(dtype):
    return scan.Cut.of(4097, 2048, 4, 132).constants(getattr(torch, dtype))

def held(dtype, rank=16, factors=4):
    return lowrank.Held().constants(512, rank, factors, getattr(torch, dtype))

for dtype in ("float32", "bfloat16", "float16", "float64"):
    compiled(scan.scan_kernel, dtype, 90, cut(dtype), SUMMARY=False)
first, last, watched = {"PULLED": False, "OUT": True, "STATES": False, "MEASURED": False}, \
    {"PULLED": True, "OUT": False, "STATES": True, "MEASURED": False}, \
    {"PULLED": True, "OUT": True, "STATES": True, "MEASURED": True}
for kernel in (gru.gru_kernel, lstm.lstm_kernel):
    for flags in (first, last, watched):
        compiled(kernel, "float32", 90, cut("float32"), SUMMARY=False, **flags)
    compiled(kernel, "bfloat16", 80, cut("bfloat16"), SUMMARY=False, **watched)
    compiled(kernel, "float64", 90, cut("float64"), SUMMARY=True, **watched)
for kernel, factors in ((gru.gru_low_rank_kernel, 4), (lstm.lstm_low_rank_kernel, 5)):
    for flags in (first, last, watched):
        compiled(kernel, "float32", 90, held("float32", 16, factors), **flags)
    compiled(kernel, "bfloat16", 80, held("bfloat16", 300, factors), **watched)
    compiled(kernel, "float32", 90, held("float32", 0, factors), **watched)
for paired in (False, True):
    own = {"PAIRS": paired, "HEIGHT": 1 + paired, "RIGHT_HELD": False}
    compiled(lowrank.low_rank_scan_kernel, "float32", 90, held("float32"), LEFT_HELD=True, **own)
    compiled(lowrank.low_rank_scan_kernel, "float16", 80, held("float16", 300), LEFT_HELD=False, **own)
compiled(iteration.settle_kernel, "float32", 90, {"BLOCK": iteration.BLOCK})
compiled(scan.scan_kernel, "bfloat16", 80, cut("bfloat16"), SUMMARY=True)
try:
    suffix_scan(Identity(), torch.ones(3))
except ValueError as error:
    assert "the tensors are on cpu; the Triton kernels take tensors on one CUDA device" in str(error), error
else:
    raise AssertionError("a tensor on the CPU was accepted")
"""


def test_every_kernel_compiles_without_a_device(tmp_path: Any) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
