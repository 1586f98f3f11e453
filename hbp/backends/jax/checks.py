"""What the transforms check at trace time, before any work, and how they call a user's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp

from hbp.backends.jax.watching import watched
from hbp.core.backend import Array
from hbp.core.solver import Solver


def static_solver(solver: Solver | None, iterations: Any, chunk: Any, tolerance: Any) -> Solver:
    """The solver that a transform's keywords ask for: ``solver``, or at least ``iterations``.

    Raises:
        TypeError, ValueError: iterations are not given, traced, a `Schedule` that was not called, or another keyword is
            not what its name says.
    """
    for name, value in {"iterations": iterations, "chunk": chunk, "tolerance": tolerance}.items():
        check_static(name, value)
    if iterations is not ... and solver is not None:
        raise TypeError(f"solver={solver} is given beside iterations={iterations}; give one or the other")
    if iterations is ... and solver is None:
        raise TypeError("give iterations=k, or None for exact backprop, or solver=")
    chosen = None if iterations is ... else iterations
    return watched(Solver.of(solver, iterations=chosen, chunk=chunk, tolerance=tolerance).fixed())


def check_static(name: str, value: Any) -> None:
    """Check that a number is known when a program is compiled (TypeError)."""
    if isinstance(value, jax.core.Tracer):
        kind = "float" if name == "tolerance" else "int"
        raise TypeError(f"{name} is traced; give a Python {kind}, as a static argument of jit, one per compilation")


def check_function(what: str, function: Any, signature: str) -> None:
    """Check that something can be called (TypeError)."""
    if not callable(function):
        raise TypeError(f"{what} is a {type(function).__name__}; give a function, {signature}")


def check_stacked(what: str, tree: Any, rows: str = "layers") -> int:
    """The length of the leading axis that all arrays of a tree share.

    Raises:
        TypeError: a leaf is no array.
        ValueError: there are no arrays, or they share none.
    """
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "shape") and not isinstance(leaf, Number):
            raise TypeError(
                f"{what}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; give arrays, those of all {rows} "
                "stacked on axis 0"
            )
        shape = jnp.shape(leaf)
        if not shape:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} has no axis; stack the arrays of all {rows} on axis 0"
            )
        lengths[f"{what}{jax.tree_util.keystr(path)}"] = shape[0]
    if not lengths:
        raise ValueError(f"{what} holds no arrays; stack those of all {rows} on axis 0")
    if len(set(lengths.values())) > 1:
        first = {length: name for name, length in reversed(lengths.items())}
        examples = {name: length for length, name in reversed(first.items())}
        raise ValueError(
            f"the arrays of {what} have different lengths on axis 0, the axis of the {rows}: {examples}; stack each "
            f"array of all {rows}, jax.tree.map(lambda *arrays: jnp.stack(arrays), *{rows})"
        )
    return next(iter(lengths.values()))


def check_state(what: str, x: Array) -> None:
    """Check that a state is a real floating point array."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"{what} is {jnp.result_type(x)}; give real floating point")


def check_like(what: str, found: Any, state: Any) -> None:
    """Check that a layer keeps the tree, the shapes and the dtypes of its state; both are abstract."""
    if jax.tree.structure(found) != jax.tree.structure(state):
        raise TypeError(f"{what} returns {jax.tree.structure(found)}; its state is {jax.tree.structure(state)}")
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        if new.shape != jnp.shape(old) or new.dtype != jnp.result_type(old):
            raise ValueError(
                f"{what} returns {new.dtype} of shape {new.shape}; its state is {jnp.result_type(old)} of shape "
                f"{jnp.shape(old)}, and must keep both"
            )


def check_maps_vary(maps: set[Any], states: set[Any]) -> None:
    """Check that residual maps vary over no mesh axes over which the states do not (ValueError)."""
    if maps - states:
        raise ValueError(
            f"the residual maps vary over the mesh axes {sorted(maps - states)} and the states do not; give maps that "
            "are the same on all devices that share a state"
        )


KEYED = {"random_bits", "random_split", "random_fold_in", "random_gamma"}
UNKEYED = {"rng_bit_generator", "rng_uniform"}


def check_draws(program: Any) -> None:
    """Check that a program (a jaxpr) draws the same random numbers under `jax.vmap` as in a loop.

    The backward computes all layers at once. Of JAX's generators only threefry gives every key its own numbers there;
    the others draw one batch for all keys.

    Raises:
        ValueError: it draws by another generator.
    """
    for equation in _equations(program):
        name = equation.primitive.name
        by = str(equation.invars[0].aval.dtype) if name in KEYED else name
        if name in UNKEYED or (name in KEYED and by != "key<fry>"):
            raise ValueError(
                f"the layers draw random numbers ({name} of {by}) that come out otherwise when the backward computes "
                "all layers at once; give threefry keys, jax.random.key(seed, impl='threefry2x32'), or draw the "
                "numbers outside of the layers, stacked for all of them"
            )


def _equations(program: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the programs within it included."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def closed(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Array]]:
    """A function with the arrays it closes over as a last argument, a list, and those arrays.

    `jax.closure_convert` leaves arrays that need no gradients inside (masks, keys), where a custom derivative loses
    track of them.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    tree = jax.tree.structure(shapes)

    def opened(*arguments: Any) -> Any:
        *given, captured = arguments
        return jax.tree.unflatten(tree, jax.core.eval_jaxpr(jaxpr.jaxpr, captured, *jax.tree.leaves(tuple(given))))

    return opened, list(jaxpr.consts)
