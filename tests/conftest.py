"""Backends as fixtures: what is installed runs, what `--backends` names must run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("JAX_ENABLE_X64", "1")  # float64 parity; hbp itself never touches JAX's configuration

os.environ.setdefault("HBP_TUNED", "shipped")  # whatever was measured on this machine

import numpy as np
import pytest

import hbp
from hbp.core.registry import load

NAMES = ("numpy", "cupy", "torch", "jax")
ON_GPU = ("cupy", "torch-cuda", "jax-gpu")
collect_ignore = ["mutants.py"]  # a tool with packages of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default="", help="backends that must run, comma-separated (missing: exit code 4)")


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.getoption("markexpr"):  # there what is tested is what users run
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of programs that run once, for a moment
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one for all processes of a session
        compiled = TemporaryDirectory(prefix="hbp-jax-", ignore_cleanup_errors=True)
        config.add_cleanup(compiled.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for name in _required(config):
        try:
            load(name)
        except (ValueError, ImportError, RuntimeError) as error:
            raise pytest.UsageError(f"--backends requires {name}: {error}") from error


def pytest_itemcollected(item: pytest.Item) -> None:
    if " at 0x" in item.nodeid:  # pytest-xdist wants the same ones in all its workers
        raise pytest.UsageError(f"{item.nodeid} has another name in another process; give its parameters ids")


def _required(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--backends").split(",") if name]


@dataclass(frozen=True)
class Library:
    """One array library for a test: its front end, and the way to and from NumPy."""

    name: str
    front_end: Any
    array: Callable[[Any], Any]
    """A NumPy array as the library's, dtype kept."""
    numpy: Callable[[Any], np.ndarray]

    def tree(self, value: Any) -> Any:
        """Tuples (named ones too) of NumPy arrays as tuples of the library's."""
        if isinstance(value, tuple):
            items = [self.tree(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return None if value is None else self.array(value)


def _library(name: str, required: bool) -> Library:
    try:
        front_end = load(name)
    except (ImportError, RuntimeError) as error:
        if required:
            raise
        pytest.skip(str(error))
    if name == "torch":
        import torch

        return Library(name, front_end, lambda x: torch.from_numpy(np.array(x)), lambda x: x.detach().cpu().numpy())
    if name == "cupy":
        import cupy

        return Library(name, front_end, cupy.asarray, cupy.asnumpy)
    if name == "jax":
        import jax.numpy as jnp

        return Library(name, front_end, jnp.asarray, np.asarray)
    return Library(name, front_end, np.array, np.asarray)


def _on_gpu(name: str) -> Library:
    """PyTorch or JAX with arrays on a CUDA device."""
    library = _library(name.split("-")[0], required=False)
    if name == "torch-cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} finds no CUDA device")
        return replace(library, array=lambda x: torch.from_numpy(np.array(x)).cuda())
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip(f"jax {jax.__version__} finds no CUDA device")
    return library


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = any(mark.args[0] == "library" for mark in metafunc.definition.iter_markers("parametrize"))
    if "library" in metafunc.fixturenames and not chosen:
        if "gpu" in metafunc.config.getoption("markexpr"):
            names = [pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU]
        else:
            names = _required(metafunc.config) or NAMES
        metafunc.parametrize("library", names, indirect=True)


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Library:
    """Each installed backend in turn; with `--backends`, only those named, and all of them."""
    if request.param in ON_GPU[1:]:
        return _on_gpu(request.param)
    required = _required(request.config)
    if required and request.param not in required:
        pytest.skip(f"a test of {request.param}, and --backends names {', '.join(required)}")
    return _library(request.param, bool(required))


@pytest.fixture
def once(request: pytest.FixtureRequest) -> None:
    """For what no array library takes part in: it is not run again beside one."""
    if "," in request.config.getoption("--backends"):
        pytest.skip("no array library takes part: the session of NumPy alone runs this")


@pytest.fixture(autouse=True)
def _unpinned() -> Iterator[None]:
    yield
    hbp.use(None)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that loads anywhere and owns nothing here."""
    library: Any = ModuleType("cupy")
    front_end: Any = ModuleType("hbp.backends.cupy")
    library.ndarray = type("ndarray", (), {})
    front_end.backend = SimpleNamespace(name="cupy", propagate=None)
    monkeypatch.setitem(sys.modules, "cupy", library)
    monkeypatch.setitem(sys.modules, "hbp.backends.cupy", front_end)
    return "cupy"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder of data, where nothing else is to be had."""
    datasets = pytest.importorskip("datasets")
    for part in ("datasets", "modules"):
        monkeypatch.setattr(datasets.config, f"HF_{part.upper()}_CACHE", tmp_path / "cache" / part)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "data"


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[Any]]:
    pools: list[Any] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def ranks(_pools: list[Any]) -> Iterator[Any]:
    """Four ranks of `torch.distributed`, the same processes for the whole session while no test breaks them."""
    pytest.importorskip("torch")
    from ranks import Pool, RanksError

    if not _pools:
        _pools.append(Pool(4))
    pool, failed = _pools[0], []

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return pool(*args, **kwargs)
        except RanksError:
            failed.append(True)
            raise

    run.pool = pool  # type: ignore[attr-defined]
    yield run
    if failed:  # ranks may wait for one another: the next test gets others
        _pools.pop().close()
