"""Every kernel of a library once, small, in one pass and cut in time: what the sanitizer watches."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np

from benchmarks.gpu.search import call_of
from benchmarks.measure import library
from hbp.backends._kernels import ROUNDS

SHORT, LONG = 40, 3000
"""Of which a device cuts the second in time; an interpreter one a tenth as long."""


def main(name: str) -> None:
    """Run them; the values are the tests' concern, and only their being finite this one's."""
    lib = library(name)
    if name == "cupy":
        lib.front_end.backend.xp.cuda.set_allocator(None)  # within a pool of memory no access is out of bounds
    kernels = import_module(f"hbp.backends.{name}.kernels")
    calls = [("suffix_scan", length) for length in (SHORT, LONG if lib.on_gpu else LONG // 10)]
    if name == "torch":
        calls += [(kernel, 9 if "low_rank" in kernel else 70) for kernel in (*ROUNDS, "low_rank_scan")]
    found = [
        call_of(lib, kernels, kernel, {"T": length, "B": 3, "D": 5, "dtype": "float32"})(None)
        for kernel, length in calls
    ]
    lib.wait(found)
    assert all(np.isfinite(lib.numpy(g)).all() for g in found)
    print(f"exercised {len(found)} calls")


if __name__ == "__main__":
    main(sys.argv[1])
