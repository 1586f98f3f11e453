"""The oracles that are offered to those who add to hbp: what is right passes, what is wrong is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from oracles import KINDS, fits, residual_case

import hbp
from hbp.backends.numpy import NumpyBackend, backend
from hbp.core.operator import LinearOperator
from hbp.testing import check_backend, check_chain, check_operator, jacobian, matrices

SHAPE = (2, 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if fits(kind, SHAPE)])
def test_own_kinds_pass(kind, rng):
    operator, wanted = residual_case(kind, rng, 4, SHAPE)
    if operator.length in (None, 1):  # of any length
        with pytest.raises(ValueError, match=f"has {operator.length} maps; give a stack of 3 to 8"):
            check_operator(operator, np.zeros(SHAPE))
        return
    check_operator(operator, np.zeros(SHAPE))
    np.testing.assert_allclose(matrices(operator, 4, np.zeros(SHAPE)), wanted, atol=1e-14)


@dataclass(frozen=True, eq=False)
class Turn(LinearOperator):
    """A kind of one's own: states (2,) as complex numbers, times (a, b) = a + i b."""

    values: Any

    @property
    def T(self) -> Any:  # noqa: N802
        return Turn(self.values * np.array([1.0, -1.0]))

    def mv(self, v: Any) -> Any:
        (a, b), (x, y) = np.moveaxis(self.values, -1, 0), np.moveaxis(v, -1, 0)
        return np.stack([a * x - b * y, b * x + a * y], -1)

    def scaled(self, factor: Any) -> Any:
        return Turn(self.values * (factor[:, None] if hasattr(factor, "shape") else factor))

    def __matmul__(self, other: Any) -> Any:
        return Turn(self.mv(other.values))

    def _target(self, like: Any) -> Any:
        return tuple(like.shape), (-1,)


def turn(**methods: Any) -> Any:
    return type("Wrong", (Turn,), methods)(np.random.default_rng(0).uniform(size=(4, 2)))


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ({}, None),
        ({"mv": lambda self, v: Turn.mv(self, v) + 1e-6}, "mv is not linear"),
        ({"T": property(lambda self: self)}, ".T is not the transpose"),
        ({"__getitem__": lambda self, i: Turn(self.values[::-1][i])}, "a slice has other maps"),
        ({"scaled": lambda self, factor: self}, "scaled(0.5) is not half"),
        ({"__matmul__": lambda self, other: Turn(self.T.mv(other.values))}, "@ is not the product"),
    ],
    ids=lambda value: "".join(value or ()),
)
def test_what_is_wrong_with_an_operator_is_told(methods, told):
    if told is None:
        check_operator(turn(), np.zeros(2))
        return
    with pytest.raises(AssertionError) as caught:
        check_operator(turn(**methods), np.zeros(2))
    assert told in str(caught.value)


@pytest.mark.parametrize("fault", [None, "pullback", "residual"])
def test_a_chain_is_held_to_the_sum_over_its_paths(fault, rng):
    weights, x = 0.3 * rng.normal(size=(5, 3, 3)), rng.normal(size=3)
    states, jacobians = [x], []
    for w in weights:
        jacobians.append(jacobian(lambda x, w=w: 0.9 * x + np.tanh(w @ x), states[-1]))
        states.append(0.9 * states[-1] + np.tanh(w @ states[-1]))

    def pullback(w: Any, x: Any) -> Any:
        factor = 1.01 if fault == "pullback" else 1.0
        return lambda g: factor * w.T @ (g * (1 - np.tanh(w @ x) ** 2))

    pullbacks = [pullback(w, x) for w, x in zip(weights, states, strict=False)]
    chain = hbp.LinearizedChain(pullbacks, hbp.Scalar(0.91 if fault == "residual" else 0.9))
    if fault is None:
        check_chain(chain, np.stack(jacobians), x)
        return
    with pytest.raises(AssertionError, match="iterate k=1 with chunk=1 is not the sum over its paths: off by"):
        check_chain(chain, np.stack(jacobians), x)
    with pytest.raises(ValueError, match="has 9 layers, whose paths are too many"):
        check_chain(hbp.LinearizedChain([lambda g: g] * 9), np.zeros((9, 3, 3)), x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)  # JAX would compile for half a minute
def test_the_backends_pass(library, dtype):
    check_backend(library.front_end.backend, library.array, dtype)


class Differing(NumpyBackend):
    """NumPy with automatic differentiation of one function, and a fault."""

    fault = ""

    def vjp(self, fn: Any, x: Any) -> Any:
        return fn(x), lambda g: (2 * x + (self.fault != "vjp")) * g

    def propagate(self, operator: Any, c: Any) -> Any:
        if self.fault == "in place" and len(c) > 1 and not isinstance(operator, hbp.Zero):
            c[0] += 1
            return super().propagate(operator, c)
        found = super().propagate(operator, c)
        return found.astype("f8") if self.fault == "dtype" else found * 1.001 if self.fault == "scan" else found

    def scan(self, step: Any, carry: Any, rows: Any, reverse: bool = False) -> Any:
        return super().scan(step, carry, rows, reverse and self.fault != "reverse")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("", None),
        ("vjp", "vjp's pullback: off by"),
        ("scan", "propagate, 0 maps of kind Identity: off by"),
        ("dtype", "propagate, 0 maps of kind Identity: found ('float64'"),
        ("in place", "propagate, 1 maps of kind Identity: off by"),
        ("reverse", "scan, reverse=True: off by"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_backend_is_told(fault, told):
    own = Differing()
    own.fault = fault
    if told is None:
        check_backend(own, np.array)
        return
    with pytest.raises(AssertionError) as caught:
        check_backend(own, np.array)
    assert told in str(caught.value)
    check_backend(backend, np.array)
