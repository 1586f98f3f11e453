"""As many threads as are asked for, in all libraries that a comparison may run in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

VARIABLES = ("OMP_NUM_THREADS", "NPROC")
"""What hbp's own kernels read at each call, and what XLA reads when JAX starts."""


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """So many CPU threads inside a ``with`` block, and as many as before after it.

    Told are the BLAS and OpenMP libraries that are loaded, PyTorch if it is, the compiled kernels (at most
    NUMBA_NUM_THREADS), and XLA, unless JAX has made its first array before: it keeps its threads.
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    variables = {name: os.environ.get(name) for name in VARIABLES}
    with threadpool_limits(threads):
        try:
            os.environ.update(dict.fromkeys(VARIABLES, str(threads)))
            if torch:
                torch.set_num_threads(threads)  # its MKL, linked into it, counts apart from OpenMP
            yield
        finally:
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            if torch:
                torch.set_num_threads(before)
