"""Where the results come from, and what this machine can do at best."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from shutil import which
from time import monotonic
from typing import Any

import numpy as np

from benchmarks.environment import best, environment, limits
from benchmarks.gpu.device import NONE
from benchmarks.gpu.rehearsal import interpret
from benchmarks.gpu.steps import STEPS, Part, There
from benchmarks.measure import Library, library
from hbp.availability import available

OPTIONAL = {"pytest": "correctness", "matplotlib": "plots", "accelerated_scan": "a row of the scan"}
"""What this command would like beside the array libraries, and for what."""
PRODUCTS = ("float32", "tf32", "bfloat16")


def parts(there: There) -> Iterator[Part]:
    """The environment, then each library's limits."""
    names = [name for name, state in available().items() if state and name != "numpy"]
    yield Part("environment", lambda: _environment(names, there))
    for name in names:
        yield Part(f"limits of {name}", lambda name=name: limits(library(name)))
    yield Part("products of torch", partial(_products, 8192 if not there.rehearse else 256))


def libraries(there: There) -> list[Library]:
    """The libraries that are usable here; on a device, those that use it."""
    if there.rehearse:
        interpret()
    found = [library(name) for name, state in available().items() if state and name != "numpy"]
    return found if there.rehearse else [lib for lib in found if lib.on_gpu]


def limits_of(there: There, lib: Library) -> dict[str, float]:
    """What the step before found, or measured now."""
    return there.results("machine").get(f"limits of {lib.name}") or limits(lib)


def _environment(names: list[str], there: There) -> dict[str, Any]:
    found = environment([library(name) for name in names], with_limits=False)
    missing = [f"{name} ({what})" for name, what in OPTIONAL.items() if find_spec(name) is None]
    missing += [] if which("compute-sanitizer") else ["compute-sanitizer (races and memory errors)"]
    unusable = {name: state.reason for name, state in available().items() if not state}
    left = there.end - monotonic()
    ends = accumulate(step.limit(there.rehearse) for step in STEPS)
    fitting = [step.name for step, end in zip(STEPS, ends, strict=True) if end <= left]
    return {**found, **_cuda(), "missing": missing, "unusable": unusable, "minutes": left / 60, "fitting": fitting}


def _cuda() -> dict[str, Any]:
    """What the libraries call their CUDA, and the family of the device as the table of measurements has it."""
    if find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {"family": NONE}
    major, minor = torch.cuda.get_device_capability()
    return {"family": f"sm_{major}{minor}", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _products(size: int) -> dict[str, float]:
    """Floating-point operations per second of a square matrix product, by the unit that does them."""
    import torch

    lib, found = library("torch"), {}
    x = lib.array(np.random.default_rng(0).standard_normal((size, size), dtype=np.float32))
    for name in PRODUCTS:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        y = x.bfloat16() if name == "bfloat16" else x
        found[f"{name}_flops_per_s"] = 2 * size**3 / best(lib, lambda a: a @ a, y)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
