"""The strong directions of weights in recurrences: constants, found in the backward pass or given from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from hbp.backends.jax.array import mesh_axes
from hbp.backends.jax.chains import BACKEND, Layer, Maps, Run, Tree, in_turn, of_each, varying
from hbp.backends.jax.checks import check_function, check_maps_vary, check_static
from hbp.core.backend import Array, check_shape
from hbp.core.operator import Diagonal, LinearOperator
from hbp.core.registry import resolve
from hbp.directions import Directions, Rank, check_directions, check_known, check_rank, directions
from hbp.lowrank import LowRank

Weight: TypeAlias = Callable[[Tree], Array]
"""``weight(params)``, (N, H): the matrix W of whatever reads h as W h."""


def given(rank: Rank) -> Directions | None:
    """Directions given from outside, as constants; None where they are to be found."""
    return lax.stop_gradient(rank) if isinstance(rank, Directions) else None


def source(rank: Rank, weight: Weight | None, params: Tree, h: Array) -> Array | Directions | None:
    """Where the directions of a cell of one's own come from: its weight, or given ones; None where it takes none.

    Raises:
        TypeError, ValueError: no rank, a rank without a weight, or a weight or directions of other states than ``h``.
    """
    check_static("rank", rank)
    check_rank(rank)
    size, strong = h.shape[-1] if h.ndim else 0, given(rank)
    cure = f"the matrix (N, {size}) of what h enters by, as lambda params: params['hidden'].T where that is h @ hidden"
    if weight is None and strong is None and rank != 0:
        raise ValueError(f"rank={rank!r} is given without weight; give a function params -> {cure}")
    if strong is not None:
        resolve(BACKEND, strong.left, strong.right)
        check_shape("the directions' right factor", strong.right, (len(strong.right), size))
    own = None if weight is None else _weight(weight, params, size, cure)
    if own is not None:
        check_directions(own, rank, BACKEND)
    found = strong or (None if own is None or rank == 0 else lax.stop_gradient(own))
    check_maps_vary(set().union(*map(mesh_axes, jax.tree.leaves(found))), mesh_axes(h))
    return found


def _weight(weight: Weight, params: Tree, size: int, cure: str) -> Array:
    check_function("weight", weight, f"params -> {cure}")
    own = weight(params)
    shape = tuple(getattr(own, "shape", ()))
    if len(shape) != 2 or shape[1] != size:
        raise ValueError(f"weight(params) is a {type(own).__name__} of shape {shape}; return {cure}")
    return own


def known(rank: Rank, found: Array | Directions) -> None:
    """Raise TypeError where ``rank`` is "auto" and the weight is traced."""
    if not isinstance(found, Directions):
        check_known(found, rank, BACKEND)


def run(rank: Rank) -> Run:
    """How the steps of a cell with directions are run: one by one, if these can be found afterwards."""

    def steps(layer: Layer, given: tuple[Tree, ...], rows: Tree, h: Array) -> tuple[Array, Array]:
        known(rank, given[-1])
        return in_turn(layer, given, rows, h)

    return steps


def maps(cell: Callable[..., tuple[Array, Array]], rank: Rank) -> Maps:
    """The residual maps of the steps of ``cell(params, h, x, captured)``: its gates, and beside them the directions.

    The cell's parameters, what it captured, and where the directions come from are what all steps share.
    """

    def parts(given: tuple[Tree, ...], x: Tree, h: Array, _: Array) -> tuple[Array, Array]:
        params, captured, right = given
        return _along(lambda h: cell(params, h, x, captured), h, right)

    def all_of(given: tuple[Tree, ...], xs: Tree, h: Array, after: Array) -> LinearOperator:
        params, captured, found = given
        taken = found if isinstance(found, Directions) else directions(found, rank, backend=BACKEND)
        right = taken.taken[1].astype(h.dtype)
        gates, left = of_each(parts)((params, captured, right), xs, h, after)
        return Diagonal(gates) + LowRank(left, right[None])

    return all_of


def _along(cell: Callable[[Array], tuple[Array, Array]], h: Array, right: Array) -> tuple[Array, Array]:
    """A step's gate, and its block's Jacobian times some directions, (r, H): (..., H, r).

    The block is what h does by way of gate and update; all cells have a pullback of its pullback.
    """
    (gate, _), pull = jax.vjp(cell, h)
    push = jax.vjp(lambda g: pull((g * h, g))[0], varying(jnp.zeros_like(h), h, gate))[1]
    columns = jax.vmap(lambda row: push(varying(jnp.broadcast_to(row, h.shape), h, gate))[0], out_axes=-1)
    return gate, columns(right)
