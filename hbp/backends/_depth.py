"""A suffix scan in two levels: along each rank's own layers, and from rank to rank."""

from __future__ import annotations

from collections.abc import Callable

from hbp.core.backend import Array, Backend
from hbp.core.operator import LinearOperator


def scan_over_ranks(
    scan: Callable[[LinearOperator, Array], Array],
    operator: LinearOperator,
    c: Array,
    entering: Callable[[Array], Array],
    backend: Backend,
) -> Array:
    """The suffix scan over all ranks' layers, of which ``operator`` and ``c`` are this rank's, as its states' share.

    A rank's last state is the next one's first, so what enters there from outside stands in ``c`` of one of the two.

    Args:
        scan: the scan of one rank's layers, as `Backend.propagate`.
        operator: this rank's maps, (n).
        c: what enters at its states, (n + 1, ...).
        entering: what comes to a rank's last state from the ranks behind it, from each rank's first state as its own
            layers make it; this is where ranks exchange something.
        backend: joins arrays.
    """
    own = scan(operator, c)
    return own + scan(operator, backend.concat([backend.zeros_like(c[:-1]), entering(own[0])[None]]))
