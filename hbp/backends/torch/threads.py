"""PyTorch's own threads for the compiled kernels.

After each operation of PyTorch its OpenMP threads go on spinning for a while, in the way of any other pool's; so the
kernels run as one parallel region of the same runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba
import torch

from hbp.backends._numba.compile import Threads, own_threads

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def torch_threads() -> Threads:
    """As many threads as `torch.get_num_threads` says: OpenMP's where PyTorch brings its library, else those of a pool,
    at most NUMBA_NUM_THREADS.
    """
    count = torch.get_num_threads()
    if _openmp() is None:
        return Threads(min(count, int(numba.config.NUMBA_NUM_THREADS)), own_threads().spread)
    return Threads(count, _in_region)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library beside PyTorch, which is loaded already."""
    found = sorted(Path(torch.__file__).parent.glob("lib/lib[gi]omp*.so*"))
    library = ctypes.CDLL(str(found[0])) if found else None
    return library if hasattr(library, "GOMP_parallel") else None


def _in_region(kernel: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    left, errors = iter(ranges), []

    def work(_: int | None) -> None:
        try:
            for part in left:  # however many threads there are
                kernel(*part)
        except BaseException as error:
            errors.append(error)

    library = _openmp()
    assert library is not None
    library.GOMP_parallel(_REGION(work), None, len(ranges), 0)
    if errors:
        raise errors[0]
