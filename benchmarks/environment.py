"""Where a result comes from: the machine, what it can do at best, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library
from hbp.backends._kernels import VARIABLE
from hbp.backends._tuning import processor

PACKAGES = ("numpy", "numba", "torch", "triton", "jax", "jaxlib", "cupy-cuda12x", "cupy-cuda13x")
PEERS = ("mambapy", "accelerated-scan", "pararnn-torch")


def environment(libraries: list[Library], with_limits: bool = True) -> dict[str, Any]:
    """The date, the commit, the machine with its limits, the libraries' versions, devices and kernels."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "driver": _driver(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"hbp": hbp.__version__}
        | {name: found for name in (*PACKAGES, *PEERS) if (found := _version(name))},
        "devices": {lib.name: lib.front_end.backend.device() for lib in libraries},
        "kernels": {lib.name: lib.front_end.backend.kernel_state() for lib in libraries},
        "variables": {
            name: os.environ[name] for name in sorted(os.environ) if name.endswith("_NUM_THREADS") or name == VARIABLE
        },
        "limits": {lib.name: limits(lib) for lib in libraries if with_limits},
    }


def limits(lib: Library) -> dict[str, float]:
    """The library's copy bandwidth, bytes read and written, and its float32 matrix-product rate, on its device."""
    size, width = (1 << 28, 8192) if lib.on_gpu else (1 << 24, 2048)
    x, square = (lib.array(np.ones(shape, np.float32)) for shape in (size, (width, width)))
    product = lib.front_end.jit(lambda a: a @ a)
    return {
        "copy_bytes_per_s": 8 * size / best(lib, _copy_of(lib, x), x),
        "flops_per_s": 2 * width**3 / best(lib, product, square),
    }


def _copy_of(lib: Library, x: Any) -> Callable[[Any], Any]:
    """A copy, into memory that was written before where the library can name it."""
    if lib.name == "jax":
        return lib.front_end.jit(lambda a: -a)
    target = x.clone() if lib.name == "torch" else x.copy()

    def copy(a: Any) -> Any:
        target[...] = a
        return target

    return copy


def best(lib: Library, function: Callable[[Any], Any], x: Any) -> float:
    """Seconds of the best of some calls: a limit is what can be reached."""
    found = []
    for _ in range(9):
        start = perf_counter()
        lib.wait(function(x))
        found.append(perf_counter() - start)
    return min(found[1:])


def commit() -> str | None:
    """The commit, with a plus where the tree has other changes; None outside a clone."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "") or None
    except OSError:
        return None


def _driver() -> str | None:
    """The CUDA device, its driver and memory, as nvidia-smi says."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
