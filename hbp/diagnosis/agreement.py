"""How well two gradients agree: the one definition of an approximate gradient's error and cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hbp.core.backend import check_shape


@dataclass(frozen=True)
class Agreement:
    """How far a gradient a is from the exact one b; those of several parts add up to that of the whole.

    Attributes:
        difference, exact, found, product: |a - b|^2, |b|^2, |a|^2 and a.b.

    >>> import numpy as np
    >>> from hbp.backends.numpy import backend
    >>> parts = [Agreement.of(np.array(a), np.array(b), backend) for a, b in (([3.0], [4.0]), ([4.0], [4.0]))]
    >>> whole = parts[0] + parts[1]
    >>> round(whole.error, 4), round(whole.cosine, 4)
    (0.1768, 0.9899)
    """

    difference: float = 0.0
    exact: float = 0.0
    found: float = 0.0
    product: float = 0.0

    @classmethod
    def of(cls, found: Any, exact: Any, backend: Any) -> Agreement:
        """Of two gradients: arrays of this backend, or lists and tuples of such; ValueError where shapes differ."""
        if isinstance(found, list | tuple):
            return sum((cls.of(a, b, backend) for a, b in zip(found, exact, strict=True)), cls())
        check_shape("the gradient found", found, exact.shape)
        a, b = backend.widened(found), backend.widened(exact)
        difference, size, own = backend.norm(a - b), backend.norm(b), backend.norm(a)
        product = own * size
        if 0 < product < math.inf:  # of unit vectors, lest small or large entries leave the dtype's range
            product *= float(((a / own) * (b / size)).sum())
        return cls(difference * difference, size * size, own * own, product)

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.difference + other.difference,
            self.exact + other.exact,
            self.found + other.found,
            self.product + other.product,
        )

    @property
    def error(self) -> float:
        """|a - b| / |b|; 0 where both are zero."""
        return math.sqrt(self.difference / self.exact) if self.exact else math.inf if self.difference else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between them; 1 where both are zero."""
        if self.exact and self.found:
            return self.product / math.sqrt(self.exact * self.found)
        return 1.0 if self.exact == self.found else 0.0
