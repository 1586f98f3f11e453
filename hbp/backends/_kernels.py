"""Compiled kernels: optional replacements of plain definitions, imported when first used.

A folder of kernels holds functions with the names and signatures of plain definitions. A backend asks for one with
`Backend.kernel`; where it gets None, the plain definition runs. The environment variable ``HBP_KERNELS`` decides:
"auto" (the default) runs the kernels that were measured faster on real devices, "all" also those that have passed
their tests in an interpreter only, "off" none.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

VARIABLE = "HBP_KERNELS"
LEVELS = ("auto", "all", "off")
LOG = logging.getLogger("hbp")


@dataclass(frozen=True)
class Kernels:
    """The kernels of one folder, and the package that compiles them."""

    folder: str
    """The module's name below `hbp.backends`."""
    compiler: str
    """The package that must be installed."""
    what: str
    """What is compiled, for people."""
    measured: bool
    """Whether "auto" runs them."""

    def load(self) -> ModuleType | None:
        """The module, or None where the plain definitions run; which of them is logged once, at level INFO.

        Raises:
            ValueError: ``HBP_KERNELS`` is none of its values.
        """
        return self._loaded(level())

    def state(self) -> str:
        """Which path runs and why, for people; nothing is imported to find out."""
        return self._reason_against(level()) or self._title

    def _reason_against(self, chosen: str) -> str:
        if chosen == "off":
            return f"plain ({VARIABLE}=off)"
        if find_spec(self.compiler) is None:
            return f"plain ({self.compiler} is not installed)"
        return "" if self.measured or chosen == "all" else f"plain (unmeasured; {VARIABLE}=all runs {self._title})"

    @property
    def _title(self) -> str:
        return f"{self.compiler}: {self.what}"

    @cache  # noqa: B019 - a few values, for the life of the process
    def _loaded(self, chosen: str) -> ModuleType | None:
        against = self._reason_against(chosen)
        LOG.info("kernels of hbp.backends.%s: %s", self.folder, against or self._title)
        if against:
            return None
        try:
            return import_module(f"hbp.backends.{self.folder}")
        except ImportError as error:  # Numba refuses a NumPy newer than it knows
            warnings.warn(f"{self._title} cannot be loaded, the plain definitions run: {error}", stacklevel=5)
            return None


CPU = Kernels("_numba", "numba", "suffix scan, exact GRU and LSTM adjoints", measured=True)
CUDA_TORCH = Kernels("torch.kernels", "triton", "suffix scan, GRU and LSTM rounds", measured=False)
CUDA_CUPY = Kernels("cupy.kernels", "cupy", "suffix scan", measured=False)
CUDA_JAX = Kernels("jax.kernels", "jax", "suffix scan", measured=False)


def level() -> str:
    """The value of ``HBP_KERNELS``.

    Raises:
        ValueError: it is none of "auto", "all", "off".
    """
    chosen = os.environ.get(VARIABLE) or "auto"
    if chosen not in LEVELS:
        raise ValueError(f"{VARIABLE}={chosen!r}; give one of {', '.join(LEVELS)}, or unset it")
    return chosen
