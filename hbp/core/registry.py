"""Which backend: an explicit argument, else `using`, else `use`, else the arrays' own library.

The only state of the library, and its only dynamic import, live here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hbp.core.backend import Array, Backend

# name -> (module of the library, names of its array types)
LIBRARIES = {
    "numpy": ("numpy", ("ndarray", "generic")),
    "cupy": ("cupy", ("ndarray",)),
    "torch": ("torch", ("Tensor",)),
    "jax": ("jax", ("Array",)),
}

_INHERIT = object()
_pinned: str | None = None
_scoped: ContextVar[Any] = ContextVar("hbp_backend", default=_INHERIT)


@dataclass(frozen=True)
class Availability:
    """What `available` says of one backend; true where it is usable.

    Attributes:
        version: the library's version, or None where it is missing.
        device: the device new arrays would live on, or None where the backend is unusable.
        reason: why it is unusable, or None.
    """

    version: str | None
    device: str | None
    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return f"{self.version}, {self.device}" if self else f"unusable: {self.reason}"


def use(name: str | None) -> ModuleType | None:
    """Pin a backend for the whole process and return its front end; ``use(None)`` unpins.

    Raises:
        ValueError: unknown name. ImportError: its library is missing. RuntimeError: it has no device.

    >>> hb = use("numpy")
    >>> hb.__name__
    'hbp.backends.numpy'
    >>> use(None)
    """
    global _pinned
    front_end = None if name is None else load(name)
    _pinned = name
    return front_end


@contextmanager
def using(name: str | None) -> Iterator[ModuleType | None]:
    """Pin a backend inside a ``with`` block, in this thread or task only; ``using(None)`` lifts the pin there.

    Yields the front end; raises as `use` does.

    >>> with using("numpy") as hb:
    ...     hb.__name__
    'hbp.backends.numpy'
    """
    front_end = None if name is None else load(name)
    token = _scoped.set(name)
    try:
        yield front_end
    finally:
        _scoped.reset(token)


def backend_of(*arrays: Array) -> str:
    """The name of the library that owns all the arrays; nothing is imported to find out.

    Raises:
        TypeError: an argument is no array of a known library, or they belong to several.

    >>> import numpy as np
    >>> backend_of(np.zeros(3))
    'numpy'
    """
    if not arrays:
        raise TypeError("backend_of needs at least one array")
    names = {_owner(array): array for array in arrays}
    if len(names) > 1:
        raise TypeError(f"the arrays belong to several libraries: {sorted(names)}; nothing is converted, give one kind")
    return next(iter(names))


def _owner(array: Array) -> str:
    for name, (module, types) in LIBRARIES.items():
        loaded = sys.modules.get(module)
        if any(isinstance(array, getattr(loaded, kind, ())) for kind in types):
            return name
    raise TypeError(
        f"a {type(array).__name__} is not an array of {', '.join(LIBRARIES)}; nothing is converted, give arrays"
    )


def resolve(backend: Backend | str | None, *arrays: Array) -> Backend:
    """The backend to use for these arrays: the argument, else the scope's, else the process's, else the arrays' own.

    Raises:
        TypeError: the arrays belong to another library than the chosen one, or to several.
        ValueError, ImportError, RuntimeError: as `use`, for a backend given by name.
    """
    owner = backend_of(*arrays)
    if backend is None:
        scoped = _scoped.get()
        backend = (_pinned if scoped is _INHERIT else scoped) or owner
    chosen = load(backend).backend if isinstance(backend, str) else backend
    if not hasattr(chosen, "propagate") or not isinstance(getattr(chosen, "name", None), str):
        raise TypeError(f"backend is a {type(chosen).__name__}; give one of the names {', '.join(LIBRARIES)}")
    if chosen.name != owner:
        raise TypeError(
            f"the backend is {chosen.name!r} and the arrays belong to {owner}; "
            f"give {chosen.name} arrays or choose {owner!r}"
        )
    return chosen


def load(name: str) -> ModuleType:
    """Import a backend's front end; raises as `use` does."""
    if not isinstance(name, str) or name not in LIBRARIES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(LIBRARIES)} ({_installed()})")
    library = LIBRARIES[name][0]
    if not _is_installed(library):
        raise ImportError(
            f"backend {name!r} needs the library {library}, which is not installed ({_installed()}); "
            f"see the extras of hbp: pip install 'hbp[{'cupy-cuda12' if name == 'cupy' else name}]'"
        )
    try:
        return import_module(f"hbp.backends.{name}")
    except (ImportError, RuntimeError):
        raise
    except Exception as error:  # whatever a broken installation raises
        raise RuntimeError(f"backend {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def available() -> dict[str, Availability]:
    """Each backend's version and device, or why it is unusable. Imports every installed library.

    >>> available()["numpy"].device
    'cpu'
    """
    return {name: availability(name) for name in LIBRARIES}


def availability(name: str) -> Availability:
    """One backend's version and device, or why it is unusable. Imports its library, if installed."""
    library = LIBRARIES[name][0]
    try:
        device = load(name).backend.device()
    except (ImportError, RuntimeError) as error:
        return Availability(_version(library), None, str(error))
    return Availability(_version(library), device, None)


def _version(library: str) -> str | None:
    return getattr(sys.modules.get(library), "__version__", None)


def _is_installed(library: str) -> bool:
    if library in sys.modules:
        return sys.modules[library] is not None
    return find_spec(library) is not None


def _installed() -> str:
    names = [name for name, (library, _) in LIBRARIES.items() if _is_installed(library)]
    return f"installed here: {', '.join(names) or 'none'}"
