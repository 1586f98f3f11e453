"""Every kernel of a library once, small, in one pass and cut in time: what the sanitizer watches."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import hbp
from benchmarks.measure import Library, library
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback

SHORT, LONG = 40, 3000
"""Of which a device cuts the second in time; an interpreter one a tenth as long."""


def main(name: str) -> None:
    """Run them; the values are the tests' concern, and only their being finite this one's."""
    lib, rng = library(name), np.random.default_rng(0)
    if name == "cupy":
        lib.front_end.backend.xp.cuda.set_allocator(None)  # within a pool of memory no access is out of bounds
    found = [_scan(lib, rng, length) for length in (SHORT, LONG if lib.on_gpu else LONG // 10)]
    if name == "torch":
        found += [_rounds(lib, rng, cell) for cell in ("gru", "lstm")]
    lib.wait(found)
    assert all(np.isfinite(lib.numpy(g)).all() for g in found)
    print(f"exercised {len(found)} calls")


def _scan(lib: Library, rng: np.random.Generator, length: int) -> Any:
    from importlib import import_module

    scan = import_module(f"hbp.backends.{lib.name}.kernels").suffix_scan
    values, c = rng.random((length, 3, 5), np.float32), rng.random((length + 1, 3, 5), np.float32)
    how = {"interpret": True} if lib.name == "jax" and not lib.on_gpu else {}
    return scan(hbp.Diagonal(lib.array(values)), lib.array(c), **how)


def _rounds(lib: Library, rng: np.random.Generator, cell: str) -> Any:
    from hbp.backends.torch import kernels

    def drawn(*shape: int) -> Any:
        return lib.array(rng.uniform(-0.3, 0.3, shape).astype(np.float32))

    (T, B, H), gates = (70, 3, 5), 3 if cell == "gru" else 4
    weights = drawn(gates * H, 2), drawn(gates * H, H), drawn(gates * H)
    x, h0, h = drawn(T, B, 2), drawn(B, H), drawn(T, B, H)
    own = lib.front_end.backend
    if cell == "gru":
        chain = GRUPullback(GRUParameters(*weights), x, h0, h, own).chain
        return kernels.gru_rounds(chain, drawn(T + 1, B, H), 2)
    chain = LSTMPullback(LSTMParameters(*weights), x, (h0, drawn(B, H)), (h, None), own).chain
    return kernels.lstm_rounds(chain, drawn(T + 1, B, 2, H), 2)


if __name__ == "__main__":
    main(sys.argv[1])
