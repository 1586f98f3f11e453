"""Memory: the bytes kept for the backward pass, and the peak of one step, each method in a process of its own."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import rnn, stack
from benchmarks.measure import Library, Method, library

CASES = {
    "quick": [{"cell": cell, "T": 1024, "B": 16, "H": 64, "weights": 1.0} for cell in rnn.BOTH],
    "full": [
        *({"cell": cell, "T": 4096, "B": 8, "H": 256, "weights": 1.0} for cell in rnn.BOTH),
        {"L": 64, "d": 128, "B": 32},
    ],
}
GPU_CASES = CASES["full"]


def methods(case: dict[str, Any], lib: Library) -> Iterator[Method]:
    """The library's own layer, exact backprop, and Highway-BP at k = 3 with and without chunks."""
    for method in _table(case).methods(case, lib):
        if method.k in (None, 3) and "fixed point" not in method.name and "Hillis" not in method.name:
            yield method


def _table(case: dict[str, Any]) -> Any:
    return rnn if "cell" in case else stack


def measured(case: dict[str, Any], name: str, index: int) -> tuple[int | None, int | None]:
    """The bytes saved and the peak of a library's method, measured in a fresh process."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_probe, args=(case, name, index, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {name} ended with {process.exitcode}") from None
    finally:
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found  # type: ignore[no-any-return]


def measured_here(method: Method) -> tuple[int | None, int | None]:
    """The same in this process, where the library counts the memory of its device itself."""
    method.run()
    saved = _saved(method)
    return saved, _peak(method)


def _probe(case: dict[str, Any], name: str, index: int, out: Connection) -> None:
    try:
        lib = library(name)
        small = {**case, **_table(case).CHECK}
        list(methods(small, lib))[index].run()  # libraries' own buffers come first
        method = list(methods(case, lib))[index]
        saved = _saved(method)
        method.run()  # compiles what is left
        out.send((saved, _peak(method)))
    except Exception as error:
        out.send(f"{type(error).__name__}: {error}")


def _saved(method: Method) -> int | None:
    """The bytes that live between the passes beside the parameters and the inputs; None where nothing tells."""
    if method.library.name == "torch":
        return _saved_by_torch(method)
    if method.library.name == "jax":
        import jax

        live = jax.live_arrays()
        state = method.forward()
        given = {x.unsafe_buffer_pointer() for x in live}
        leaves = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(state[1])}
        return sum(size for at, size in leaves.items() if at not in given)
    if method.library.name == "numpy":
        import tracemalloc

        tracemalloc.start()
        state = method.forward()
        saved = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del state  # it lived until here
        return saved
    return None


def _saved_by_torch(method: Method) -> int:
    import torch

    sizes: dict[int, int] = {}
    given = {x.untyped_storage().data_ptr() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.forward()
    return sum(sizes.values())


def _peak(method: Method) -> int | None:
    """The growth of the memory in use during one step, at its peak; None where the system does not tell."""
    if method.library.name == "torch" and method.library.on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.run()
        return torch.cuda.max_memory_allocated() - before
    if method.library.on_gpu and method.library.name == "jax":
        import jax

        device = jax.devices()[0]
        before = device.memory_stats()["bytes_in_use"]
        method.run()
        return device.memory_stats()["peak_bytes_in_use"] - before  # this process has had no larger peak
    if method.library.on_gpu:
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present use
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    method.run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
