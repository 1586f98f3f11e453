"""How a transform's reverse rule solves the adjoint equation, and tells of its increments where somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends.jax.array import JaxBackend
from hbp.backends.jax.chains import BACKEND, Solve
from hbp.core.adjoint import highway
from hbp.core.backend import Array
from hbp.core.chain import LayerChain
from hbp.core.increments import Report

_WATCHERS: ContextVar[Callable[[Report], None] | None] = ContextVar("watchers", default=None)


@contextmanager
def watching(watch: Callable[[Report], None]) -> Iterator[None]:
    """Let the transforms traced meanwhile hand a report on each backward pass to ``watch``."""
    token = _WATCHERS.set(watch)
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def watched() -> tuple[JaxBackend, Callable[[Report], None] | None]:
    """The backend and the ``watch`` with which a transform that is traced now shall solve."""
    watch = _WATCHERS.get()
    if watch is None:
        return BACKEND, None

    def deliver(report: Report) -> None:
        def arrived(increments: Array, sizes: Array) -> None:
            watch(replace(report, increments=tuple(map(float, increments)), sizes=tuple(map(float, sizes))))

        jax.debug.callback(arrived, jnp.stack(report.increments), jnp.stack(report.sizes))

    return _Traced(), deliver


def solver(k: int) -> Solve:
    """Highway-BP with k iterations."""
    backend, watch = watched()

    def solve(chain: LayerChain, cotangent: Array, sources: Array) -> Array:
        return highway(chain, cotangent, k, sources=sources, watch=watch, backend=backend)

    return solve


class _Traced(JaxBackend):
    """Norms stay arrays, so that increments can be taken inside a compiled program."""

    def norm(self, x: Array) -> Any:
        return jnp.linalg.norm(x.reshape(-1))
