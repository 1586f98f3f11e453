"""The CUDA suffix scan: compiled by nvcc, run without a device as plain C++, and on a device where there is one."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hbp
from hbp import Dense, Diagonal, Identity, Scalar

SOURCE = Path(hbp.__file__).parent / "backends" / "cupy" / "kernels" / "scan.cu"
LENGTHS = (0, 1, 2, 3, 127, 128, 129, 1000)
UNITS = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
GUARD = 64
SHIM = """
#define __global__
#define __device__
#include <immintrin.h>
#include <cmath>
struct Index { unsigned x; };
static Index blockIdx, blockDim, threadIdx;
struct float16 { unsigned short bits; };
#ifdef __F16C__
inline float widen(float16 x) { return _cvtsh_ss(x.bits); }
inline void narrow(float wide, float16 &x) { x.bits = _cvtss_sh(wide, 0); }
#else
inline float widen(float16) { return NAN; }
inline void narrow(float, float16 &) {}
#endif
#include SOURCE
template <auto> struct Grid;
template <typename... P, void (*kernel)(P...)> struct Grid<kernel> {
    static void run(unsigned grid, unsigned block, P... p) {
        blockDim.x = block;
        for (unsigned b = grid; b-- > 0;)  // in an order that no thread may rely on
            for (unsigned t = block; t-- > 0;) { blockIdx.x = b; threadIdx.x = t; kernel(p...); }
    }
};
#define RUN(NAME) extern "C" void *run_##NAME() { return (void *)&Grid<NAME>::run; }
RUN(scan_float16) RUN(scan_float32) RUN(scan_float64)
RUN(summaries_float16) RUN(summaries_float32) RUN(summaries_float64)
"""


class Host:
    """A stand-in for the parts of CuPy that the kernels use, over NumPy and a C++ compiler."""

    broadcast_to = staticmethod(np.broadcast_to)
    ascontiguousarray = staticmethod(np.ascontiguousarray)

    def __init__(self, library: ctypes.CDLL, processors: int) -> None:
        device = SimpleNamespace(id=0, compute_capability="90", attributes={"MultiProcessorCount": processors})
        self.cuda = SimpleNamespace(Device=lambda: device)
        self.library = library
        self.launches: list[str] = []
        self.padded: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Poison, with as much of it on both sides as `check_guards` needs."""
        size = int(np.prod(shape))
        whole = np.full(size + 2 * GUARD, np.nan, dtype)
        self.padded.append(whole)
        return whole[GUARD : GUARD + size].reshape(shape)

    def check_guards(self) -> None:
        for whole in self.padded:
            assert np.isnan(whole[:GUARD]).all()
            assert np.isnan(whole[-GUARD:]).all()

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:  # noqa: N802
        assert code == SOURCE.read_text()
        return SimpleNamespace(get_function=self.function)

    def function(self, name: str) -> Any:
        find = getattr(self.library, f"run_{name}")
        find.restype = ctypes.c_void_p
        return lambda grid, block, arguments: self.launch(name, find(), (*grid, *block), arguments)

    def launch(self, name: str, address: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.launches.append(name)
        given = [ctypes.c_uint(size) for size in grid]
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                given.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                given.append({int: ctypes.c_longlong, float: ctypes.c_double}[type(argument)](argument))
        ctypes.CFUNCTYPE(None, *map(type, given))(address)(*given)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as C++ on this machine."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs g++ on an x86-64 machine")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ("-std=c++17", "-O1", "-mf16c", "-mfma", "-shared", "-fPIC", f'-DSOURCE="{SOURCE}"')
    subprocess.run([compiler, *flags, "shim.cpp", "-o", "kernels.so"], cwd=folder, check=True, timeout=120)
    return ctypes.CDLL(str(folder / "kernels.so"))


def on_host(monkeypatch: pytest.MonkeyPatch, compiled: ctypes.CDLL, processors: int) -> tuple[Any, Host]:
    """The kernels' module over a stand-in device with so many processors."""
    host = Host(compiled, processors)
    spec = importlib.util.spec_from_file_location("kernels_on_host", SOURCE.with_name("scan.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", host)
        patch.setitem(sys.modules, "kernels_on_host", module)
        spec.loader.exec_module(module)
    return module, host


ONE, SPLIT, NESTED = 0, 1, 64
"""Numbers of processors: no split in time, one, and splits of splits."""


def loop(a: np.ndarray | float, c: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    a = np.broadcast_to(np.asarray(a, float), (len(c) - 1, *c.shape[1:]))
    g = np.array(c, float)
    for i in reversed(range(len(a))):
        g[i] += a[i] * g[i + 1]
    return g


def operators(rng: np.random.Generator, n: int, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[Any, Any]]:
    """Operators and their values, of every kind and of every layout that broadcasts."""
    full = rng.uniform(0.5, 1.05, (n, *shape)).astype(dtype)
    row = rng.uniform(0.5, 1.05, (n, *(1 for _ in shape[:-1]), *shape[-1:])).astype(dtype)
    column = full[(..., *(slice(None, 1) for _ in shape[-1:]))]
    scalars = rng.uniform(-1.05, 1.05, n).astype(dtype)
    wide = rng.uniform(0.5, 1.05, (n, *shape[:-1], 3 * (shape or (1,))[-1])).astype(dtype)
    sliced = wide[..., 1::3] if shape else wide[:, 1]
    turned = np.ascontiguousarray(full.T).T
    lifted = scalars.reshape((n,) + (1,) * len(shape))
    return {
        "identity": (Identity(), 1.0),
        "number": (Scalar(0.998), 0.998),
        "scalars": (Scalar(scalars), lifted),
        **{
            name: (Diagonal(values), values)
            for name, values in {"full": full, "row": row, "column": column, "sliced": sliced, "turned": turned}.items()
        },
    }


def close(found: Any, a: Any, c: np.ndarray, dtype: str) -> None:
    assert found.dtype == c.dtype
    assert found.shape == c.shape
    expected = loop(a, c)
    scale = np.abs(loop(np.abs(a), np.abs(c)))
    relative, subnormal = (1.1 * UNITS[dtype], 2.0**-24) if dtype == "float16" else (4 * (len(c) + 2) * UNITS[dtype], 0)
    np.testing.assert_array_less(np.abs(np.asarray(found, float) - expected), relative * scale + subnormal)


CASES = list(product(LENGTHS, [(), (3,), (2, 5), (3, 2, 2)]))


@pytest.mark.parametrize("processors", [ONE, SPLIT, NESTED], ids=["one pass", "split", "nested"])
@pytest.mark.parametrize("dtype", UNITS)
def test_the_source_computes_the_loop(dtype, processors, compiled, monkeypatch, rng):
    module, host = on_host(monkeypatch, compiled, processors)
    for n, shape in CASES:
        c = rng.uniform(0, 1, (n + 1, *shape)).astype(dtype) * np.asarray(0.1, dtype)
        for layout in (c, np.ascontiguousarray(c.T).T, c[::-1]):
            for operator, values in operators(rng, n, shape, dtype).values():
                for array in (layout, *operator.arrays):
                    array.flags.writeable = False
                close(module.suffix_scan(operator, layout), values, layout, dtype)
    host.check_guards()
    assert (f"summaries_{dtype}" in host.launches) == (processors != ONE)


def test_splits_of_splits_are_reached(compiled, monkeypatch, rng):
    module, host = on_host(monkeypatch, compiled, NESTED)
    c, a = rng.uniform(-1, 1, (20001, 1)), rng.uniform(0.5, 1.05, (20000, 1))
    close(module.suffix_scan(Diagonal(a), c), a, c, "float64")
    assert host.launches.count("summaries_float64") > 1
    host.check_guards()


def test_many_channels_are_not_split(compiled, monkeypatch, rng):
    module, host = on_host(monkeypatch, compiled, SPLIT)
    c, a = rng.uniform(-1, 1, (300, 200)), rng.uniform(0.5, 1.05, (299, 200))
    close(module.suffix_scan(Diagonal(a), c), a, c, "float64")
    assert host.launches == ["scan_float64"]
    assert module.suffix_scan(Identity(), c[:, :0]).shape == (300, 0)
    assert len(host.launches) == 1


def test_more_than_two_axes_of_strides(compiled, monkeypatch, rng):
    module, _ = on_host(monkeypatch, compiled, ONE)
    c = rng.uniform(-1, 1, (6, 4, 3, 5)).transpose(0, 3, 2, 1)
    a = rng.uniform(0.5, 1, (5, 1, 3, 1))
    close(module.suffix_scan(Diagonal(a), c), a, c, "float64")


def test_what_is_refused_is_named(compiled, monkeypatch):
    module, _ = on_host(monkeypatch, compiled, ONE)
    with pytest.raises(TypeError, match="float16, float32, float64, not int64"):
        module.suffix_scan(Identity(), np.arange(3))
    with pytest.raises(TypeError, match=r"Diagonal, Scalar .* Identity, not Dense"):
        module.suffix_scan(Dense(np.ones((2, 3, 3))), np.ones((3, 3)))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_source_compiles(architecture, tmp_path):
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/bin:/usr/local/cuda/bin")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    flags = ("-std=c++17", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v")
    command = [compiler, *flags, str(SOURCE), "-o", str(tmp_path / "scan.cubin")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == 6, found.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", UNITS)
def test_on_a_device(dtype, rng):
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip(f"cupy {cupy.__version__} finds no CUDA device")
    from hbp.backends.cupy.kernels import suffix_scan

    for n, shape in [*CASES, (20000, (1,)), (1000, (64, 257)), (40, (300, 200))]:
        c = (rng.uniform(0, 1, (n + 1, *shape)) * 0.1).astype(dtype)
        for turned, (operator, values) in product([False, True], operators(rng, n, shape, dtype).values()):
            if isinstance(operator, Diagonal):  # cupy.asarray keeps no strides: what is left of them comes from here
                mine = Diagonal(cupy.asarray(np.ascontiguousarray(values.T)).T)
            else:
                mine = type(operator)(*map(cupy.asarray, operator.arrays)) if operator.arrays else operator
            given = cupy.asarray(np.ascontiguousarray(c.T)).T if turned else cupy.asarray(c)
            poison = cupy.full(c.shape, cupy.nan, dtype)
            del poison  # the pool hands out the same memory again
            close(cupy.asnumpy(suffix_scan(mine, given)), values, c, dtype)
