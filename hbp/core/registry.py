"""Which backend: an explicit argument, else `using`, else `use`, else the arrays' own library.

The only state of the library, and its only dynamic import, live here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
    names = {_owner(array) for array in {type(array): array for array in arrays}.values()}
    if len(names) > 1:
        raise TypeError(f"the arrays belong to several libraries: {sorted(names)}; nothing is converted, give one kind")
    return next(iter(names))


def _owner(array: Array) -> str:
    kind = type(array).__name__
    if kind in ("matrix", "MaskedArray"):
        raise TypeError(f"a {kind} has an arithmetic of its own; give a plain array, as numpy.asarray(x)")
    for name, (module, types) in LIBRARIES.items():
        if any(isinstance(array, getattr(sys.modules.get(module), kind, ())) for kind in types):
            return name
    raise TypeError(f"a {kind} is not an array of {', '.join(LIBRARIES)}; nothing is converted, give arrays")


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
    name = chosen.name
    if name != owner:
        raise TypeError(
            f"the backend is {name!r} and the arrays belong to {owner}; give {name} arrays or choose {owner!r}"
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


def _is_installed(library: str) -> bool:
    return (sys.modules[library] if library in sys.modules else find_spec(library)) is not None


def _installed() -> str:
    names = [name for name, (library, _) in LIBRARIES.items() if _is_installed(library)]
    return f"installed here: {', '.join(names) or 'none'}"
