"""Kernels without a device: Triton's and Pallas' interpreters behind the backends that would ask for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from benchmarks import rank, rnn


@cache
def interpret() -> None:
    """Let arrays on the CPU have the GPU's kernels; TRITON_INTERPRET was set when this process began."""
    rnn.CHECK["T"] = rank.CHECK["T"] = (
        24  # a program of an interpreted kernel takes as long as a thousand of a compiled one
    )
    if find_spec("torch") and find_spec("triton"):
        _torch()
    if find_spec("jax"):
        _jax()


def _torch() -> None:
    from hbp.backends._kernels import CUDA_TORCH
    from hbp.backends.torch.array import TorchBackend, place
    from hbp.backends.torch.recurrent.adjoint import RecurrentBackend

    plain, in_place = TorchBackend.kernel, RecurrentBackend.kernel

    def kernel(self: Any, name: str, *arrays: Any) -> Callable[..., Any] | None:
        # asked first: it knows which tensors no kernel may see
        seen = plain(self, "suffix_scan", *arrays) is not None or not any(x.requires_grad for x in arrays)
        found = CUDA_TORCH.find(name, partial(place, arrays[0])) if seen else None
        return found or plain(self, name, *arrays)

    def on_a_device(self: Any, name: str, *arrays: Any) -> Callable[..., Any] | None:
        """A CPU's way to pull a GRU back is none of a device's."""
        return in_place(self, name, *arrays) if CUDA_TORCH.load() is None else kernel(self, name, *arrays)

    TorchBackend.kernel = kernel  # type: ignore[method-assign]
    RecurrentBackend.kernel = on_a_device  # type: ignore[method-assign]


def _jax() -> None:
    from hbp.backends._kernels import CUDA_JAX
    from hbp.backends.jax.array import JaxBackend

    def kernel(self: Any, name: str, *arrays: Any) -> Callable[..., Any] | None:
        module = CUDA_JAX.load()
        found = module and CUDA_JAX.find(name, lambda: module.place(arrays[0]))
        return found and partial(found, interpret=True)

    JaxBackend.kernel = kernel  # type: ignore[method-assign]
