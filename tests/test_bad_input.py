"""What is refused: the type of each error, what was given and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import hbp
from hbp import Dense, Diagonal, Identity, LinearizedChain, Pair, Scalar, Schedule, Zero

X = np.ones(3)
CHAIN = LinearizedChain([lambda g: 0.5 * g] * 4)


def half(x: Any) -> Any:
    return 0.5 * x, lambda g: 0.5 * g


def solvers(chain: Any = CHAIN, cotangent: Any = X, **options: Any) -> list[Any]:
    """Every entrance that takes a chain and cotangents, as calls."""
    return [
        lambda: hbp.backprop(chain, cotangent, **options),
        lambda: hbp.highway(chain, cotangent, 1, **options),
        lambda: hbp.highway(chain, cotangent, **options),
        lambda: hbp.highway(chain, cotangent, 1, chunk=2, **options),
        lambda: hbp.highway(chain, cotangent, tolerance=0.1, **options),
        lambda: hbp.iterates(chain, cotangent, **options),
        lambda: hbp.report(chain, cotangent, **options),
    ]


def refused(calls: list[Any], error: type[Exception], message: str) -> None:
    for call in calls:
        with pytest.raises(error, match=message):
            call()


# Arrays


@pytest.mark.parametrize("kind", ["int64", "int8", "bool", "complex128", "complex64"])
def test_arrays_need_real_floating_point_numbers(kind):
    x = np.ones(3, kind)
    refused(solvers(cotangent=x), TypeError, rf"cotangent is {kind}; .*real floating-point.*cast")
    refused(solvers(sources=np.ones((4, 3), kind)), TypeError, rf"sources is {kind}; .*real floating-point.*cast")
    refused([lambda: hbp.propagate(Identity(), x)], TypeError, rf"c is {kind}; .*cast")
    for linearize in (hbp.linearize, hbp.linearize_layers):
        refused([lambda f=linearize: f([half], x)], TypeError, rf"x is {kind}; .*cast")
        refused([lambda f=linearize: f([], x)], TypeError, rf"x is {kind}; .*cast")


@pytest.mark.parametrize("value", [[1.0, 1.0, 1.0], 1.0, "x", None])
def test_what_is_no_array_is_refused(value):
    message = rf"a {type(value).__name__} is not an array of numpy.*give arrays"
    refused(solvers(cotangent=value), TypeError, message)
    if value is not None:
        refused(solvers(sources=value), TypeError, message)
    refused([lambda: hbp.propagate(Identity(), value)], TypeError, message)
    refused([lambda: hbp.linearize([half], value)], TypeError, message)
    refused([lambda: hbp.linearize_layers([half], value)], TypeError, message)


@pytest.mark.parametrize("shape", [(4,), (3, 3), (5, 3), (4, 1), (4, 4), (4, 1, 3), (4, 3, 1), (1, 3), ()])
def test_sources_have_one_entry_per_layer(shape):
    message = rf"sources has shape \({', *'.join(map(str, shape))},?\), expected \(4, 3\)"
    refused(solvers(sources=np.ones(shape)), ValueError, message)


def test_one_dtype_for_all_that_enters():
    refused(solvers(sources=np.ones((4, 3), np.float32)), TypeError, r"one dtype.*float64.*float32.*cast")


@pytest.mark.parametrize("shape", [(2,), (2, 4), ()])
def test_cotangents_the_residual_does_not_act_on(shape):
    for residual in (Diagonal(np.ones((4, 3))), Dense(np.ones((4, 3, 3)))):
        chain = LinearizedChain(CHAIN.pullbacks, residual)
        refused(solvers(chain, np.ones(shape)), ValueError, r"shape \(3,.*does not act on states of shape \(")


def test_propagate_checks_its_input():
    refused([lambda: hbp.propagate(Identity(), np.float64(1.0))], ValueError, r"c has shape \(\).*one entry per state")
    refused([lambda: hbp.propagate(Identity(), np.ones((0, 3)))], ValueError, r"c has shape \(0, 3\).*\(L\+1, ...\)")
    refused([lambda: hbp.propagate(Scalar(X), np.ones((3, 2)))], ValueError, "3 maps and the chain 2 layers")
    refused([lambda: hbp.propagate(Scalar(X), np.ones((4, 2), np.float32))], TypeError, "float64 .* float32; cast")


@pytest.mark.parametrize("operator", [0.5, X, None, "Identity", [Identity()]], ids=lambda x: type(x).__name__)
def test_propagate_takes_an_operator(operator):
    refused([lambda: hbp.propagate(operator, X)], TypeError, rf"{type(operator).__name__}.*operator")


# Chains and their residuals


@pytest.mark.parametrize("chain", [None, CHAIN.pullbacks, [half], X], ids=lambda x: type(x).__name__)
def test_solvers_take_a_chain(chain):
    refused(solvers(chain), TypeError, rf"chain is a {type(chain).__name__}; give a LinearizedChain")


@pytest.mark.parametrize("entry", [None, 0.5, X], ids=lambda x: type(x).__name__)
def test_pullbacks_are_callables(entry):
    refused([lambda: LinearizedChain([half, entry])], TypeError, rf"pullback 1 is a {type(entry).__name__}; .*callable")


@pytest.mark.parametrize("residual", [0.5, X, "identity", None, Identity, [Identity()]], ids=lambda x: type(x).__name__)
def test_residuals_are_operators(residual):
    name = type(residual).__name__
    refused([lambda: LinearizedChain([half], residual)], TypeError, rf"residual is a {name}; give an operator")
    if not callable(residual):
        for linearize in (hbp.linearize, hbp.linearize_layers):
            refused([lambda f=linearize: f([half], X, residual)], TypeError, rf"residual is a {name}; give an operator")


@pytest.mark.parametrize("length", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["Scalar", "Diagonal", "Dense", "Pair"])
def test_one_residual_map_per_layer(kind, length):
    residual = {
        "Scalar": lambda: Scalar(np.ones(length)),
        "Diagonal": lambda: Diagonal(np.ones((length, 2, 3))),
        "Dense": lambda: Dense(np.ones((length, 3, 3))),
        "Pair": lambda: Pair(np.ones((length, 2, 3)), np.ones((length, 2, 3))),
    }[kind]()
    message = rf"residual {kind} has {length} maps and the chain 4 layers; give one map per layer"
    refused([lambda: LinearizedChain(CHAIN.pullbacks, residual)], ValueError, message)
    for linearize in (hbp.linearize, hbp.linearize_layers):
        refused([lambda f=linearize: f([half] * 4, np.ones((2, 3)), residual)], ValueError, message)


@pytest.mark.parametrize(
    "operator", [Scalar(np.array(0.5)), Diagonal(np.array(0.5)), Dense(np.array(0.5)), Pair(*[np.array(0.5)] * 2)]
)
def test_a_stack_of_maps_has_an_axis_of_layers(operator):
    message = rf"the residual {type(operator).__name__} is a 0-d array; give a Python number or one map per layer"
    doors = [lambda: hbp.propagate(operator, np.ones((4, 2, 3)))]
    for linearize in (hbp.linearize, hbp.linearize_layers):
        doors.append(lambda f=linearize: f([half] * 3, np.ones((2, 3)), operator))
    refused(doors, ValueError, message)
    refused([lambda: LinearizedChain(CHAIN.pullbacks, operator)], ValueError, "give one map per layer")


def test_the_maps_of_a_pair_have_one_length():
    refused(
        [
            lambda: hbp.backprop(
                LinearizedChain(CHAIN.pullbacks, Pair(np.ones((4, 2, 3)), np.ones((3, 2, 3)))), np.ones((2, 3))
            )
        ],
        ValueError,
        "residual Pair has 3 maps and the chain 4",
    )


LISTS = np.ones((4, 2, 3)).tolist()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Scalar, ([0.5] * 4,)),
        (Scalar, ("0.5",)),
        (Scalar, (None,)),
        (Scalar, (1j,)),
        (Diagonal, (LISTS,)),
        (Diagonal, (0.5,)),
        (Dense, ([np.eye(3).tolist()] * 4,)),
        (Dense, (None,)),
        (Pair, (LISTS, LISTS)),
        (Pair, (np.ones((4, 2, 3)), LISTS)),
    ],
    ids=lambda x: type(x[-1]).__name__ if isinstance(x, tuple) else x.__name__,
)
def test_operators_take_arrays(kind, values):
    """Refused by the operator or by the solver."""
    name = type(values[-1]).__name__
    call = lambda: hbp.highway(LinearizedChain(CHAIN.pullbacks, kind(*values)), np.ones((2, 3)), 1)  # noqa: E731
    refused([call], TypeError, rf"({kind.__name__}|array).*{name}|{name}.*array")


def test_residuals_of_another_dtype():
    for dtype in (np.float32, np.int64):
        chain = LinearizedChain(CHAIN.pullbacks, Diagonal(np.ones((4, 3), dtype)))
        refused(solvers(chain), TypeError, rf"residual Diagonal is {np.dtype(dtype)} and the states are float64; cast")


@pytest.mark.parametrize("value", [None, 0.5, X, "identity", Identity], ids=lambda x: type(x).__name__)
def test_residual_functions_return_one_map(value):
    message = rf"residual function returned a {type(value).__name__} for layer 0; return one map: Identity"
    refused([lambda: hbp.linearize([half] * 2, X, lambda *_: value)], TypeError, message)
    refused([lambda: hbp.linearize_layers([half] * 2, X, lambda *_: value)], TypeError, message)


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (Diagonal(np.ones(2)), ValueError, "shape|broadcast"),
        (Diagonal(np.ones((4, 3))), ValueError, "shape"),
        (Dense(np.ones((3, 2))), ValueError, "shape|mismatch"),
        (Diagonal(np.ones(3, np.float32)), TypeError, "Diagonal is float32 and the states are float64; cast"),
        (Dense(np.ones((3, 3), np.int64)), TypeError, "Dense is int64 and the states are float64; cast"),
    ],
    ids=str,
)
def test_residual_functions_return_maps_that_fit(operator, error, message):
    refused([lambda: hbp.linearize_layers([half] * 2, X, lambda *_: operator)], error, message)


def test_pairs_do_not_mix():
    maps = [Pair(np.ones((2, 3)), np.ones((2, 3))), Zero()]
    refused(
        [lambda: hbp.linearize_layers([half] * 2, np.ones((2, 3)), lambda i, *_: maps[i])],
        TypeError,
        r"mixes the residual kinds \['Pair', 'Zero'\]",
    )


# Blocks and pullbacks


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x, TypeError, r"^KIND 1 must return \(y, pullback\)"),
        (lambda x: (x,), TypeError, r"^KIND 1 must return \(y, pullback\)"),
        (lambda x: (x, x), TypeError, r"^KIND 1 must return \(y, pullback\), with a callable pullback"),
        (lambda x: (x, half, half), TypeError, r"^KIND 1 must return \(y, pullback\)"),
        (lambda _: None, TypeError, r"^KIND 1 must return \(y, pullback\)"),
        (lambda x: (x[:2], half), ValueError, r"output of KIND 1 has shape \(2,\), expected \(3,\)"),
        (lambda x: (x[None], half), ValueError, r"output of KIND 1 has shape \(1, 3\), expected \(3,\)"),
        (lambda x: (x.sum(), half), ValueError, r"output of KIND 1 has shape \(\), expected \(3,\)"),
        (lambda x: (x.astype(np.float32), half), TypeError, r"output of KIND 1 is float32, .*float64; keep one dtype"),
        (lambda x: (x.tolist(), half), TypeError, r"output of KIND 1 is a list; expected an array of shape \(3,\)"),
    ],
)
def test_blocks_return_a_state_and_a_pullback(result, error, message):
    refused([lambda: hbp.linearize([half, result], X)], error, message.replace("KIND", "block"))
    refused([lambda: hbp.linearize_layers([half, result], X)], error, message.replace("KIND", "layer"))


class Shaped:
    """Something with a shape that is no array."""

    shape = X.shape


class Typed:
    dtype = X.dtype


@pytest.mark.parametrize(
    ("pullback", "error", "message"),
    [
        (lambda _: Shaped(), TypeError, r"is a Shaped; expected an array of shape \(3,\)"),
        (lambda _: Typed(), TypeError, "is a Typed; expected an array"),
        (lambda g: g[:2], ValueError, r"has shape \(2,\), expected \(3,\)"),
        (lambda g: g[None], ValueError, r"has shape \(1, 3\), expected \(3,\)"),
        (lambda g: g.sum(), ValueError, r"has shape \(\), expected \(3,\)"),
        (lambda g: g.astype(np.float32), TypeError, "is float32, its input float64; keep one dtype"),
        (lambda g: (g,), TypeError, r"is a tuple; expected an array of shape \(3,\)"),
        (lambda g: [g], TypeError, "is a list; expected an array"),
        (lambda _: None, TypeError, "is a NoneType; expected an array"),
        (lambda _: 1.0, TypeError, "is a float; expected an array"),
    ],
)
@pytest.mark.parametrize("where", range(4))
def test_pullbacks_return_a_cotangent_of_the_input(where, pullback, error, message):
    pullbacks = [lambda g: 0.5 * g] * 4
    pullbacks[where] = pullback
    chain = LinearizedChain(pullbacks)
    calls = [
        lambda: hbp.backprop(chain, X),
        lambda: hbp.highway(chain, X, 1),
        lambda: hbp.highway(chain, X, tolerance=0.1),
        lambda: hbp.highway(LinearizedChain(pullbacks, Zero()), X, 1, sources=np.ones((4, 3))),
        lambda: list(hbp.iterates(chain, X)),
        lambda: hbp.report(chain, X),
    ]
    refused(calls, error, f"pullback of block {where} returned {message}")
    refused([lambda: hbp.highway(chain, X, 1, chunk=2)], error, rf"pullback of block \d returned {message}")


@pytest.mark.parametrize("where", range(5))
@pytest.mark.parametrize("chunk", [2, 3])
def test_a_bad_pullback_is_named_inside_a_chunk_too(where, chunk):
    pullbacks = [lambda g: 0.5 * g] * 5
    pullbacks[where] = lambda g: g[:2]
    call = lambda: hbp.highway(LinearizedChain(pullbacks), X, 1, chunk=chunk)  # noqa: E731
    refused([call], ValueError, f"pullback of block {where} returned has shape")


def test_errors_of_a_pullback_come_through():
    def failing(_: Any) -> Any:
        raise ZeroDivisionError("mine")

    refused([lambda: hbp.highway(LinearizedChain([failing]), X, 1)], ZeroDivisionError, "mine")


# Counts, tolerances, backends, schedules


@pytest.mark.parametrize("value", [1.0, True, False, "1", [1], np.float64(2), np.bool_(True)], ids=repr)
def test_counts_are_integers(value):
    name = type(value).__name__
    for call in (hbp.highway, hbp.report):
        refused([lambda f=call: f(CHAIN, X, value)], TypeError, rf"iterations=.* is a {name}; give an integer")
    for call in (hbp.highway, hbp.report, hbp.iterates):
        refused([lambda f=call: f(CHAIN, X, chunk=value)], TypeError, rf"chunk=.* is a {name}; give an integer of at")
    refused([lambda: CHAIN.coarsen(value)], TypeError, rf"chunk=.* is a {name}; give an integer")


def test_counts_are_not_too_small():
    for call in (hbp.highway, hbp.report):
        refused([lambda f=call: f(CHAIN, X, -1)], ValueError, "iterations=-1 is too small; .* at least 0")
    for call in (hbp.highway, hbp.report, hbp.iterates):
        for value in (0, -3):
            refused([lambda f=call, v=value: f(CHAIN, X, chunk=v)], ValueError, f"chunk={value} is .* at least 1")
    refused([lambda: hbp.highway(CHAIN, X, None, chunk=0)], ValueError, "chunk=0")
    refused([lambda: hbp.highway(CHAIN, X, None, chunk=None)], TypeError, "chunk=None is a NoneType")
    refused([lambda: CHAIN.coarsen(0)], ValueError, "chunk=0 is too small")


def test_counts_may_be_integers_of_numpy():
    expected = hbp.highway(CHAIN, X, 2, chunk=3)
    np.testing.assert_array_equal(hbp.highway(CHAIN, X, np.int64(2), chunk=np.int32(3)), expected)


@pytest.mark.parametrize("value", [-1e-9, 2.0, float("inf"), float("nan"), "small", True, 1j, [0.1]], ids=repr)
def test_a_tolerance_is_a_fraction(value):
    refused(
        [lambda: hbp.highway(CHAIN, X, tolerance=value)],
        (TypeError, ValueError),
        r"tolerance=.*; give a non-negative number",
    )


@pytest.mark.parametrize("value", [3, 0.5, X, object()], ids=lambda x: type(x).__name__)
def test_a_backend_is_a_name_or_a_backend(value):
    refused([lambda: hbp.backprop(CHAIN, X, backend=value)], TypeError, rf"backend.*{type(value).__name__}")


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ([(0, 1)], TypeError, "phases is a list; give a mapping of steps to iterations"),
        (3, TypeError, "phases is a int; give a mapping"),
        (None, TypeError, "phases is a NoneType; give a mapping"),
        ({}, ValueError, "no phase starts at step 0"),
        ({5: 1}, ValueError, "no phase starts at step 0, the first starts at 5; add 0: k"),
        ({0: -1}, ValueError, "iterations=-1 is too small"),
        ({0: 1, -5: 2}, ValueError, "step=-5 is too small"),
        ({0: 1.0}, TypeError, "iterations=1.0 is a float; give an integer"),
        ({0: True}, TypeError, "iterations=True is a bool; give an integer"),
        ({0: "exact"}, TypeError, "iterations='exact' is a str"),
        ({0.0: 1}, TypeError, "step=0.0 is a float"),
        ({False: 1}, TypeError, "step=False is a bool"),
        ({None: 1}, TypeError, "step=None is a NoneType"),
    ],
)
def test_schedules_map_steps_to_iterations(phases, error, message):
    refused([lambda: Schedule(phases)], error, message)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError), (None, TypeError)])
def test_schedules_are_asked_for_a_step(step, error):
    refused([lambda: Schedule({0: 1})(step)], error, f"step={step}")


def test_a_cotangent_unlike_the_states_is_refused_at_every_k():
    _, chain = hbp.linearize([half] * 2, np.ones((4, 3)))
    for k in (0, 1, None):
        for coarse in (chain, chain.coarsen(2), chain.resplit(hbp.Zero())):
            refused([lambda k=k, c=coarse: hbp.highway(c, np.ones(3), k)], ValueError, r"\(3,\), expected \(4, 3\)")
            refused(
                [lambda k=k, c=coarse: hbp.highway(c, np.ones((4, 3), np.float32), k)], TypeError, "float32 .* float64"
            )


@pytest.mark.parametrize(
    "maps",
    [
        [hbp.Dense(np.ones((1, 3))), hbp.Identity()],
        [hbp.Identity(), hbp.Diagonal(np.ones(4))],
        [hbp.Identity(), hbp.Scalar(np.ones(3))],
    ],
)
def test_a_map_that_does_not_fit_is_named_by_its_layer(maps):
    number = next(i for i, m in enumerate(maps) if not isinstance(m, hbp.Identity))
    refused(
        [lambda: hbp.linearize_layers([half] * 2, X, lambda i, *_: maps[i])], ValueError, f"layer {number}: .*shape"
    )


def test_masks_are_for_diagonals_only():
    mask = np.ones((2, 3, 3), bool)
    refused(
        [lambda: hbp.highway(LinearizedChain([np.negative] * 2, hbp.Dense(mask)), X, 0)], TypeError, "Dense is bool"
    )


@pytest.mark.parametrize("functions", [half, (f for f in [half])], ids=["function", "generator"])
def test_layers_come_as_a_list(functions):
    for linearize in (hbp.linearize, hbp.linearize_layers):
        refused([lambda f=linearize: f(functions, X)], TypeError, "give a list of functions")
    refused([lambda: LinearizedChain(functions)], TypeError, "give a list of callables")
    refused([lambda: hbp.linearize([3], X)], TypeError, "block 0 is a int; give a function")
    refused([lambda: hbp.linearize([half], X, hbp.Zero)], TypeError, "residual is a type; give an operator")
    refused([lambda: LinearizedChain([np.negative])[0]], TypeError, "cut by slices")


def test_chains_are_cut_in_their_own_order():
    for chain in (CHAIN, CHAIN.coarsen(2), CHAIN.coarsen(2).coarsen(2)):
        refused([lambda c=chain: c[::-1], lambda c=chain: c[3:1:-1]], ValueError, "positive step, not of -1")
        refused([lambda c=chain: c[::0]], ValueError, "positive step, not of 0")


def test_arrays_with_an_arithmetic_of_their_own():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(np.ones((1, 3)))
    for array in (matrix, np.ma.masked_array(np.ones((1, 3)))):
        message = f"a {type(array).__name__} has an arithmetic of its own; give a plain array"
        refused(solvers(cotangent=array), TypeError, message)
        refused([lambda a=array: hbp.highway(CHAIN, X, 1, sources=a)], TypeError, message)
        refused([lambda a=array: hbp.highway(LinearizedChain([half], hbp.Diagonal(a)), X, 1)], TypeError, message)


def test_dtypes_that_look_like_floating_point():
    refused(solvers(cotangent=np.ones(3, ">f8")), TypeError, "is >f8, in a byte order not this machine's; cast it")
    for fields in ([("float", "f8")], [("a", "f4"), ("b", "f4")]):
        refused(solvers(cotangent=np.ones(3, fields)), TypeError, "gradients need real floating-point numbers")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_number_of_a_residual_path_is_finite(value):
    refused([lambda: hbp.Scalar(value)], ValueError, "no residual path; give a finite number")


def test_operators_that_are_none():
    refused(
        [lambda: hbp.Scalar(("a",)), lambda: hbp.Scalar([1.0])], TypeError, "takes a number or an .L,. array, not a"
    )
    small, large = hbp.Dense(np.ones((1, 2, 2))), hbp.Dense(np.ones((1, 3, 3)))
    refused(
        [lambda: small @ large], ValueError, r"shapes \[\(1, 2, 2\)\] and \[\(1, 3, 3\)\]; they must act on the same"
    )

    class Own(hbp.LinearOperator):
        pass

    refused([lambda: hbp.highway(LinearizedChain([half], Own()), X, 1)], NotImplementedError, "an? Own has no mv")

    @dataclass(frozen=True, eq=False)
    class Aimless(hbp.LinearOperator):
        values: np.ndarray

    aimless = Aimless(np.ones((1, 3)))
    refused(
        [lambda: hbp.highway(LinearizedChain([half], aimless), X, 1)], ValueError, r"\(3,\).*define Aimless\._target"
    )


def test_reports_on_nothing():
    refused([lambda: hbp.Report((), (), True)], ValueError, "0 increments and 0 sizes; give one of each")
    refused([lambda: hbp.Report((1.0, 2.0), (1.0,), True)], ValueError, "2 increments and 1 sizes")


def test_a_report_says_what_is_not_finite():
    for increment in (float("nan"), float("inf")):
        report = hbp.Report((1.0, increment), (1.0, 1.0), False)
        assert report.verdict == "not finite: an increment holds NaN or infinity"
