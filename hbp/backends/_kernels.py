"""Compiled kernels: optional replacements of plain definitions, imported when first used.

A folder of kernels holds functions with the names and signatures of plain definitions. A backend asks for one with
`Backend.kernel`; where it gets None, the plain definition runs. The environment variable ``HBP_KERNELS`` decides:
"auto" (the default) runs the kernels where they were measured faster on real devices (`hbp.backends._measured`), "all"
also those that have passed their tests in an interpreter only, "off" none, and names, as
"torch.suffix_scan,jax.suffix_scan", of a GPU's kernels those alone.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hbp.backends import _measured
from hbp.backends._measured import Place

VARIABLE = "HBP_KERNELS"
LEVELS = ("auto", "all", "off")
LOG = logging.getLogger("hbp")


@dataclass(frozen=True)
class Kernels:
    """The kernels of one folder, and the package that compiles them."""

    library: str
    """Whose kernels they are: the first part of their names."""
    folder: str
    """The module's name below `hbp.backends`."""
    compiler: str
    """The package that must be installed."""
    names: tuple[str, ...]
    """What is compiled, as `HBP_KERNELS` and the table of measurements name it."""
    everywhere: bool = False
    """Whether "auto" runs them at any size; else where the table says so."""

    def find(self, name: str, place: Callable[[], Place]) -> Callable[..., Any] | None:
        """The kernel of this name, or None where the plain definition runs.

        Args:
            name: the function's; there need not be one.
            place: where it would run; asked only if the table decides.

        Raises:
            ValueError: ``HBP_KERNELS`` is none of its values.
        """
        chosen = level()
        found = getattr(self.load(), name, None)
        if found is None or self.everywhere or chosen == "all":
            return found
        if chosen != "auto":
            return found if f"{self.library}.{name}" in chosen.split(",") else None
        row = _measured.nearest(f"{self.library}.{name}", place())
        return found if row is not None and row.faster else None

    def load(self) -> ModuleType | None:
        """The module, or None where the plain definitions run; which of them is logged once, at level INFO.

        Raises:
            ValueError: ``HBP_KERNELS`` is none of its values.
        """
        return self._loaded(level())

    def state(self) -> str:
        """Which path runs and why, for people; nothing is imported to find out."""
        return self._reason_against(level()) or self._title(level())

    def _reason_against(self, chosen: str) -> str:
        if chosen == "off":
            return f"plain ({VARIABLE}=off)"
        if find_spec(self.compiler) is None:
            return f"plain ({self.compiler} is not installed)"
        if self._running(chosen):
            return ""
        why = f"unmeasured; {VARIABLE}=all runs {self._title('all')}" if chosen == "auto" else f"{VARIABLE}={chosen}"
        return f"plain ({why})"

    def _running(self, chosen: str) -> list[str]:
        """The kernels that run at all."""
        if self.everywhere:
            return list(self.names)
        faster = {row.kernel for row in _measured.TABLE if row.faster}
        listed = faster if chosen == "auto" else set(chosen.split(","))
        return [name for name in self.names if chosen == "all" or f"{self.library}.{name}" in listed]

    def _title(self, chosen: str) -> str:
        where = "" if self.everywhere or chosen != "auto" else " (where measured faster)"
        return f"{self.compiler}: {', '.join(name.replace('_', ' ') for name in self._running(chosen))}{where}"

    @cache  # noqa: B019 - a few values, for the life of the process
    def _loaded(self, chosen: str) -> ModuleType | None:
        against = self._reason_against(chosen)
        LOG.info("kernels of hbp.backends.%s: %s", self.folder, against or self._title(chosen))
        if against:
            return None
        try:
            return import_module(f"hbp.backends.{self.folder}")
        except ImportError as error:  # Numba refuses a NumPy newer than it knows
            title = self._title(chosen)
            warnings.warn(f"{title} cannot be loaded, the plain definitions run: {error}", stacklevel=6)
            return None


CELLS = ("gru_forward", "gru_adjoint", "lstm_forward", "lstm_adjoint")
CPU = Kernels("numba", "_numba", "numba", ("suffix_scan", "low_rank_scan", *CELLS), everywhere=True)
ROUNDS = ("gru_rounds", "lstm_rounds", "gru_low_rank_rounds", "lstm_low_rank_rounds")
CUDA_TORCH = Kernels("torch", "torch.kernels", "triton", ("suffix_scan", "low_rank_scan", *ROUNDS))
CUDA_CUPY = Kernels("cupy", "cupy.kernels", "cupy", ("suffix_scan",))
CUDA_JAX = Kernels("jax", "jax.kernels", "jax", ("suffix_scan",))
NAMES = tuple(f"{kernels.library}.{name}" for kernels in (CUDA_TORCH, CUDA_CUPY, CUDA_JAX) for name in kernels.names)


def level() -> str:
    """The value of ``HBP_KERNELS``.

    Raises:
        ValueError: it is none of "auto", "all", "off", nor names of kernels.
    """
    chosen = os.environ.get(VARIABLE) or "auto"
    if chosen not in LEVELS and not set(chosen.split(",")) <= set(NAMES):
        raise ValueError(
            f"{VARIABLE}={chosen!r}; give one of {', '.join(LEVELS)}, or names of {', '.join(NAMES)}, or unset it"
        )
    return chosen
