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
from hbp import Diagonal, Identity, LinearOperator, Scalar
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback

torch = pytest.importorskip("torch", reason="the kernels take torch's tensors")
GPU = torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
    triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
    from hbp.backends.torch.array import TorchBackend
    from hbp.backends.torch.kernels import gru_rounds, lstm_rounds, rounds, scan, suffix_scan

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


@pytest.fixture(params=["whole", "cut"])
def time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in one piece, and in chunks of few and short tiles."""
    monkeypatch.setattr(scan, "processors", lambda device: 3 if request.param == "cut" else 0)
    if request.param == "cut":
        monkeypatch.setattr(scan, "GUESSED", scan.Blocks(tile=16))
        monkeypatch.setattr(scan, "SHORTEST", 2)


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


CELLS = {"gru": (gru_chain, gru_rounds, ()), "lstm": (lstm_chain, lstm_rounds, (2,))}


@pytest.mark.usefixtures("time")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", ["first", "middle", "last", "only"])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 18])
def test_pass(T: int, form: str, cell: str, device: str, rng: np.random.Generator) -> None:
    chain_of, _, pair = CELLS[cell]
    array, B, H = to(device, "float64"), 2, 3
    chain = chain_of(rng, T, B, H, array)
    c = array(rng.normal(size=(T + 1, B, *pair, H)))
    pulled = array(rng.normal(size=(T, B, H))) if form in ("middle", "last") else None
    blocks, path = chain.pullbacks, chain.residual.arrays[0]
    leading = (path,) if cell == "gru" else (path[..., 0, :], blocks.exposed)
    gains = blocks.gains if form in ("first", "middle") else None
    given = (*leading, c, pulled, gains)
    before = [None if x is None else x.clone() for x in given]
    out, expected = (torch.empty((c if gains is None else gains).shape, dtype=c.dtype, device=device) for _ in "ab")
    getattr(rounds, f"{cell}_pass")(*given, out)
    getattr(rounds, f"plain_{cell}_pass")(*given, expected)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert all(x is None or torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.usefixtures("time")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 3, 9])
def test_rounds(k: int, dtype: str, cell: str, device: str, rng: np.random.Generator) -> None:
    chain_of, solve, pair = CELLS[cell]
    T, B, H = 9, 2, 3
    chain = chain_of(rng, T, B, H, to(device, dtype))
    c = to(device, dtype)(rng.normal(size=(T + 1, B, *pair, H)))
    g = solve(chain, c, k)
    assert (g.shape, g.dtype, g.is_contiguous()) == (c.shape, c.dtype, True)
    if (k, dtype) == (T, "float64"):
        assert torch.equal(solve(chain, c, k + 3), g)
    # The gates' products, what they pull back and the result are rounded in every round.
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    expected, *others = (
        hbp.highway(widened(chain), c[-1].double(), j, sources=c[:-1].double()) for j in (k, abs(k - 1), k + 1)
    )
    assert torch.linalg.norm(g.double() - expected) <= tolerance * torch.linalg.norm(expected)
    for other in others if k < T else ():  # neither iterate beside it would have passed
        assert torch.linalg.norm(other - expected) > 3 * tolerance * torch.linalg.norm(expected)
    if dtype in ("float64", "float32"):
        torch.testing.assert_close(g, hbp.highway(chain, c[-1], k, sources=c[:-1]), rtol=tolerance, atol=tolerance)


def widened(chain: Any) -> Any:
    arrays = {name: x.double() for name, x in vars(chain.pullbacks).items()}
    residual = type(chain.residual)(*(x.double() for x in chain.residual.arrays))
    return hbp.LinearizedChain(type(chain.pullbacks)(**arrays), residual)


@pytest.mark.parametrize("cell", CELLS)
def test_rounds_read_strided_sources(cell: str, device: str, rng: np.random.Generator) -> None:
    chain_of, solve, pair = CELLS[cell]
    chain = chain_of(rng, 7, 2, 3, to(device, "float64"))
    c = to(device, "float64")(rng.normal(size=(2, 8, *pair, 3))).transpose(0, 1)
    torch.testing.assert_close(solve(chain, c, 2), hbp.highway(chain, c[-1], 2, sources=c[:-1]))


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
        lstm_rounds(chain, array(np.ones((4, 2, 2, 2))), 1)
    with pytest.raises(ValueError, match=r"expected \(4, 2, 2\)"):
        gru_rounds(chain, array(np.ones((3, 2, 2))), 1)
    with pytest.raises(ValueError, match="iterations"):
        gru_rounds(chain, array(np.ones((4, 2, 2))), -1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_cells_and_solvers_ask_for_the_kernels(
    cell: str, device: str, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    """The pullbacks of the cells and `propagate` with the kernels are those without."""
    gates, steps, batch, size = 3 if cell == "gru" else 4, 9, 2, 4
    shapes = ((gates * size, 3), (gates * size, size), (gates * size,), (gates * size,))
    params = [torch.from_numpy(rng.normal(size=shape)).to(device) for shape in shapes]
    x, d = (torch.from_numpy(rng.normal(size=(steps, batch, n))).to(device) for n in (3, size))
    state, asked = d[0] / 2, []

    def pulled(k: int) -> list[Any]:
        if cell == "gru":
            found = hbp.cells.gru(GRUParameters(*params), x, state)[1](d, iterations=k)
            return [*found[0], *found[1:]]
        found = hbp.cells.lstm(LSTMParameters(*params), x, (state, state))[1]((d, d), iterations=k)
        return [*found[0], found[1], *found[2]]

    def kernel(self: Any, name: str, *arrays: Any) -> Any:
        asked.append(name)
        return {"suffix_scan": suffix_scan, "gru_rounds": gru_rounds, "lstm_rounds": lstm_rounds}.get(name)

    monkeypatch.setattr(TorchBackend, "kernel", lambda *_: None)
    expected = [*pulled(0), *pulled(3), hbp.propagate(Diagonal(x[1:]), x)]
    monkeypatch.setattr(TorchBackend, "kernel", kernel)
    found = [*pulled(0), *pulled(3), hbp.propagate(Diagonal(x[1:]), x)]
    assert {f"{cell}_rounds", "suffix_scan"} <= set(asked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


COMPILE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hbp import Identity
from hbp.backends.torch.kernels import rounds, scan, suffix_scan

SCALARS = {"rows", "channels", "tiles", "inner", "hidden"}

def compiled(kernel, dtype, architecture, **flags):
    acc, cut = scan.wide(getattr(torch, dtype)), scan.Cut.of(4097, 2048, 4, 132)
    short = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
    constants = {**cut.constants(acc), **flags}
    options = {name: constants.pop(name) for name in ("enable_fp_fusion", "num_warps")}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS or "_" in name:
            signature[name] = "i32"
        else:
            signature[name] = "*" + short[str(acc)[6:] if name in ("carries", "products") else dtype]
    target = GPUTarget("cuda", architecture, 32)
    code = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options).asm["ptx"]
    assert ".entry " + kernel.__name__ in code and "st.global" in code, code[:500]
    assert f".target sm_{architecture}" in code, code[:500]

for dtype in ("float32", "bfloat16", "float16", "float64"):
    compiled(scan.scan_kernel, dtype, 90, SUMMARY=False)
for kernel in (rounds.gru_kernel, rounds.lstm_kernel):
    for pulled, last in ((False, False), (True, True)):
        compiled(kernel, "float32", 90, PULLED=pulled, LAST=last, SUMMARY=False)
    compiled(kernel, "bfloat16", 80, PULLED=True, LAST=False, SUMMARY=False)
    compiled(kernel, "float64", 90, PULLED=True, LAST=False, SUMMARY=True)
compiled(scan.scan_kernel, "bfloat16", 80, SUMMARY=True)
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
