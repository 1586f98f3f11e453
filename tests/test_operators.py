"""The algebra of residual maps, against explicit matrices."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from oracles import KINDS, converted, fits, residual_case

from hbp import Dense, Diagonal, Identity, LinearOperator, LowRank, Pair, Scalar, Zero
from hbp.backends.numpy import backend
from hbp.core.joining import concatenate, one_each
from hbp.core.scan import Affine
from hbp.linearization import stack_maps as stack

SHAPES = [(), (3,), (2, 3), (3, 2, 3)]
CASES = [(kind, shape) for kind, shape in product(KINDS, SHAPES) if fits(kind, shape)]
L = 3  # equal to a batch and to a width above, so that misaligned axes would broadcast silently


def bound_case(kind: str, rng: np.random.Generator, shape: tuple[int, ...], length: int = L) -> tuple[Any, np.ndarray]:
    operator, matrices = residual_case(kind, rng, length, shape)
    return operator.bind(length, np.zeros(shape), backend), matrices


def applied(matrices: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("lij,lj->li", matrices, v.reshape(len(v), matrices.shape[-1])).reshape(v.shape)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("kind", "shape"), [case for case in CASES if case[1] in [(), (2, 3)]])
def test_mv_is_multiplication_by_the_matrix(kind, shape, library, rng):
    operator, matrices = residual_case(kind, rng, L, shape)
    v = rng.normal(size=(L, *shape))
    bound = converted(operator, library.array).bind(L, library.array(v[0]), library.front_end.backend)
    w = bound.mv(library.array(v))
    assert type(w) is type(library.array(v))
    assert w.dtype == library.array(v).dtype
    close(library.numpy(w), applied(matrices, v))
    for i in range(L):
        close(library.numpy(bound[i].mv(library.array(v[i]))), applied(matrices[i : i + 1], v[i : i + 1])[0])


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_transpose_is_the_adjoint(kind, shape, rng):
    operator, matrices = bound_case(kind, rng, shape)
    v, w = rng.normal(size=(2, L, *shape))
    close(np.sum(operator.mv(v) * w), np.sum(v * operator.T.mv(w)))
    close(operator.T.mv(w), applied(matrices.swapaxes(1, 2), w))
    close(operator.T.T.mv(v), operator.mv(v))


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("index", [slice(1, None), slice(0, 5, 2), slice(1, 5, 2), slice(2, 2)], ids=str)
def test_slices_keep_the_maps_in_order(kind, shape, index, rng):
    operator, matrices = bound_case(kind, rng, shape, 5)
    v = rng.normal(size=(5, *shape))[index]
    close(operator[index].mv(v), applied(matrices[index], v))
    assert operator.length in (None, 5)
    assert operator[index].length in (None, len(v))


def composable(a: str, b: str) -> bool:
    mixed = a.startswith("pair") != b.startswith("pair")
    return not (mixed and any(kind.startswith(("diagonal", "dense", "low-rank")) for kind in (a, b)))


@pytest.mark.parametrize(("a", "b"), list(product(KINDS, KINDS)))
@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 3)], ids=str)
def test_composition_is_the_matrix_product(a, b, shape, rng):
    (first, A), (second, B) = bound_case(a, rng, shape), bound_case(b, rng, shape)
    if not composable(a, b):
        with pytest.raises(TypeError, match=r"cannot compose \w+ with \w+.*same kind"):
            first @ second
        return
    v = rng.normal(size=(L, *shape))
    close((first @ second).mv(v), applied(A @ B, v))
    close((first @ second).T.mv(v), applied((A @ B).swapaxes(1, 2), v))
    close((first[1] @ second[1]).mv(v[1]), applied(A @ B, v)[1])


@pytest.mark.parametrize(
    "family", [(*KINDS[:9], *KINDS[12:15]), (*KINDS[:4], *KINDS[9:12], KINDS[15])], ids=["matrices", "pairs"]
)
def test_composition_is_associative_with_an_identity(family, rng):
    shape = (2, 3)
    operators = {kind: bound_case(kind, rng, shape)[0] for kind in family}
    v, offsets = rng.normal(size=(L, *shape)), rng.normal(size=(3, L, *shape))
    for names in product(family, repeat=3):
        a, b, c = (operators[name] for name in names)
        close(((a @ b) @ c).mv(v), (a @ (b @ c)).mv(v))
        f, g, h = (Affine(x, offset) for x, offset in zip((a, b, c), offsets, strict=True))
        close(((f @ g) @ h)(v), f(g(h(v))))
        close((f @ (g @ h))(v), f(g(h(v))))
    for a in operators.values():
        close((Identity() @ a).mv(v), a.mv(v))
        close((a @ Identity()).mv(v), a.mv(v))
        f, identity = Affine(a, offsets[0]), Affine(Identity(), np.zeros((L, *shape)))
        close((identity @ f)(v), f(v))
        close((f @ identity)(v), f(v))
        close(f[1](v[1]), f(v)[1])


@pytest.mark.parametrize(("kind", "shape"), [case for case in CASES if case[1] in [(), (2, 3)]])
def test_concatenate_joins_stacks_of_one_kind(kind, shape, library, rng):
    (first, A), (second, B) = residual_case(kind, rng, 2, shape), residual_case(kind, rng, 3, shape)
    v = rng.normal(size=(5, *shape))
    like, own = library.array(v[0]), library.front_end.backend
    first, second = (converted(op, library.array).bind(n, like, own) for op, n in ((first, 2), (second, 3)))
    joined = concatenate(one_each(first, 2, like, own), one_each(second, 3, like, own), own)
    assert type(joined) is type(first)
    close(
        library.numpy(joined.bind(5, like, own).mv(library.array(v))),
        applied(np.concatenate([A, B]), v),
    )


def test_a_number_becomes_one_for_each_layer_in_the_states_dtype():
    states = np.ones((3, 2), np.float32)
    joined = concatenate(*(one_each(Scalar(s), n, states[0], backend) for s, n in ((0.5, 2), (0.25, 1))), backend)
    assert len(joined.value) == 3
    found = joined.bind(3, states[0], backend).mv(states)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([0.5, 0.5, 0.25])[:, None] * states)
    np.testing.assert_array_equal((joined @ joined).mv(states), np.float32([0.25, 0.25, 0.0625])[:, None] * states)
    assert not one_each(Identity(), 3, states[0], backend).arrays


def test_factors_whose_axes_do_not_meet_do_not_add_up(rng):
    shared, entries, one = (LowRank(*rng.normal(size=(2, *own, 3, 3))) for own in ((L,), (L, L), (1,)))
    for a, b in ((shared, entries), (entries, shared)):
        with pytest.raises(ValueError, match="factors with 3 and 4 axes do not add up; give all the axes of a batch"):
            a + b
    v = rng.normal(size=(L, L, 3))
    close((entries + one).mv(v), entries.mv(v) + one.mv(v))


def test_directions_go_through_a_path_of_ones_own_kind(rng):
    class Reversed(LinearOperator):
        def mv(self, v):
            return v[..., ::-1]

    a, b = (LowRank(*rng.normal(size=(2, L, 3, 3))) for _ in range(2))
    v = rng.normal(size=(L, 3))
    close(((Reversed() + a) @ b).mv(v), b.mv(v)[..., ::-1] + a.mv(b.mv(v)))


MATRIX = np.arange(9.0).reshape(3, 3) / 9
SINGLE = {
    "identity": (Identity(), np.eye(3)),
    "zero": (Zero(), np.zeros((3, 3))),
    "scalar": (Scalar(0.3), 0.3 * np.eye(3)),
    "diagonal": (Diagonal(np.array([0.1, 0.2, 0.3])), np.diag([0.1, 0.2, 0.3])),
    "mask": (Diagonal(np.array([True, False, True])), np.diag([1.0, 0.0, 1.0])),
    "dense": (Dense(MATRIX), MATRIX),
}
WIDTH = {"identity": 1, "zero": 1, "scalar": 1, "diagonal": 2, "mask": 2, "dense": 3}


@pytest.mark.parametrize("names", list(product(SINGLE, repeat=2)), ids="-".join)
def test_stack_promotes_mixed_kinds(names, library, rng):
    shape = (2, 3)
    v = rng.normal(size=(2, *shape))
    maps = [converted(SINGLE[name][0], library.array) for name in names]
    like, own = library.array(v[0]), library.front_end.backend
    stacked = stack(maps, like, own).bind(2, like, own)
    expected = np.einsum("lij,l...j->l...i", np.stack([SINGLE[name][1] for name in names]), v)
    found = stacked.mv(library.array(v))
    assert found.dtype == like.dtype
    close(library.numpy(found), expected)
    widest = max(WIDTH[name] for name in names)
    same = len(set(names)) == 1
    kinds = {1: (type(maps[0]),) if same else (Scalar,), 2: (Diagonal,), 3: (Dense,)}
    assert isinstance(stacked, kinds[widest])


@pytest.mark.parametrize("kind", [Diagonal, Dense])
def test_stack_of_shared_and_per_entry_maps(kind, rng):
    trailing = (3,) if kind is Diagonal else (3, 3)
    shared, entries = rng.normal(size=trailing), rng.normal(size=(2, *trailing))
    v = rng.normal(size=(2, 2, 3))
    stacked = stack([kind(shared), kind(entries)], v[0], backend).bind(2, v[0], backend)
    close(stacked.mv(v), np.stack([kind(shared).mv(v[0]), kind(entries).mv(v[1])]))


def test_stack_of_pairs(rng):
    left, right = rng.normal(size=(2, 2, 2, 3))
    v = rng.normal(size=(2, 2, 3))
    stacked = stack([Pair(left[0], right[0]), Pair(left[1], right[1])], v[0], backend)
    close(stacked.bind(2, v[0], backend).mv(v), Pair(left, right).mv(v))


def test_stack_of_pairs_shared_and_per_entry(rng):
    shared, entries = rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3))
    v = rng.normal(size=(2, 4, 2, 3))
    maps = [Pair(shared, entries), Pair(entries, shared)]
    stacked = stack(maps, v[0], backend).bind(2, v[0], backend)
    close(stacked.mv(v), np.stack([one.mv(state) for one, state in zip(maps, v, strict=True)]))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("beside", [Identity(), Dense(np.eye(3))], ids=lambda operator: type(operator).__name__)
def test_stack_refuses_matrices_that_are_not_square(shape, beside):
    """A vector beside another kind of map must not become a matrix by broadcasting."""
    like = np.zeros(3)
    with pytest.raises(ValueError, match="shape"):
        stack([Dense(np.ones(shape)), beside], like, backend).bind(2, like, backend)


@pytest.mark.parametrize("names", list(product(SINGLE, repeat=2)), ids="-".join)
def test_stack_on_an_empty_batch(names):
    like = np.zeros((0, 3))
    stacked = stack([SINGLE[name][0] for name in names], like, backend).bind(2, like, backend)
    assert stacked.mv(np.zeros((2, 0, 3))).shape == (2, 0, 3)


def test_stack_of_nothing_and_of_nonsense():
    assert isinstance(stack([], np.zeros(3), backend), LinearOperator)
    with pytest.raises(TypeError, match=r"returned a float for layer 1; return one map"):
        stack([Identity(), 0.5], np.zeros(3), backend)
    pair = Pair(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"mixes .*'Identity', 'Pair'.*Pairs only"):
        stack([pair, Identity()], np.zeros((2, 3)), backend)


ONES = np.ones
WRONG_LENGTH = [Scalar(ONES(2)), Diagonal(ONES((2, 3))), Dense(ONES((2, 3, 3))), Pair(ONES((2, 2, 3)), ONES((2, 2, 3)))]


@pytest.mark.parametrize("operator", WRONG_LENGTH, ids=lambda operator: type(operator).__name__)
def test_bind_refuses_another_length(operator):
    with pytest.raises(ValueError, match=r"has 2 maps and the chain 4 layers; give one map per layer"):
        operator.bind(4, np.zeros((2, 3)), backend)


@pytest.mark.parametrize("operator", WRONG_LENGTH, ids=lambda operator: type(operator).__name__)
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.complex128])
def test_bind_refuses_another_dtype(operator, dtype):
    other = converted(operator, lambda x: x.astype(dtype))
    with pytest.raises(TypeError, match=rf"{np.dtype(dtype).name} and the states are float64; cast"):
        other.bind(2, np.zeros((2, 3)), backend)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (Scalar(ONES((2, 1))), (3,)),
        (Diagonal(ONES((2, 4))), (3,)),
        (Diagonal(ONES((2, 3))), ()),
        (Diagonal(ONES((2, 5, 3))), (4, 3)),
        (Diagonal(ONES((2, 1, 3))), (3,)),
        (Dense(ONES((2, 3, 4))), (3,)),
        (Dense(ONES((2, 4, 4))), (3,)),
        (Dense(ONES((2, 5, 3, 3))), (4, 3)),
        (Dense(ONES((2, 3))), (3,)),
        (Dense(ONES((2, 1, 3))), (3,)),
        (Dense(ONES((2, 3, 1))), (3,)),
        (Dense(ONES((2, 3, 3))), ()),
        (Pair(ONES((2, 2, 4)), ONES((2, 2, 3))), (2, 3)),
        (Pair(ONES((2, 2, 3)), ONES((2, 2, 4))), (2, 3)),
        (Pair(ONES((2, 2, 3)), ONES((2, 2, 3))), (3,)),
        (Pair(ONES((2, 2, 3)), ONES((2, 2, 3))), (3, 3)),
        (Pair(ONES((2, 3)), ONES((2, 3))), (2, 3)),
        (Pair(ONES((2, 1, 3)), ONES((2, 1, 3))), (2, 3)),
    ],
    ids=lambda x: f"{type(x).__name__}{x.arrays[0].shape}" if isinstance(x, LinearOperator) else str(x),
)
def test_bind_refuses_maps_that_do_not_act_on_the_states(operator, shape):
    with pytest.raises(ValueError, match="shape"):
        operator.bind(2, np.zeros(shape), backend)


def test_boolean_masks_become_numbers(library, rng):
    mask = rng.uniform(size=(4, 3)) > 0.5
    for name in ("float32", "float64"):
        states = library.array(np.ones((2, 3), name))
        bound = Diagonal(library.array(mask)).bind(4, states, library.front_end.backend)
        squared = bound @ bound
        for operator in (bound, squared):
            assert operator.arrays[0].dtype == states.dtype
            found = library.numpy(operator.mv(library.array(np.ones((4, 2, 3), name))))
            np.testing.assert_array_equal(found, np.broadcast_to(mask[:, None], (4, 2, 3)).astype(name))


@pytest.mark.parametrize(
    "arrays",
    [(Scalar, (4,)), (Dense, (4, 3, 3)), (Pair, (4, 2, 3), (4, 2, 3))],
    ids=lambda arrays: arrays[0].__name__,
)
def test_boolean_arrays_of_other_kinds_are_refused(arrays, library, rng):
    kind, *shapes = arrays
    masks = kind(*(library.array(rng.uniform(size=shape) > 0.3) for shape in shapes))
    c = library.array(rng.normal(size=(5, 2, 3)))
    for solve in (
        lambda: library.front_end.propagate(masks, c),
        lambda: library.front_end.highway(library.front_end.LinearizedChain([lambda g: g] * 4, masks), c[0], 1),
    ):
        with pytest.raises(TypeError, match=f"residual {kind.__name__} is bool and the states are float64; cast one"):
            solve()


@pytest.mark.parametrize(("batch", "width"), [(2, 3), (3, 3), (3, 4), (4, 3), (4, 4)])
@pytest.mark.parametrize("kind", ["diagonal-shared", "scalars", "dense"])
def test_shared_maps_broadcast_over_the_batch_not_over_the_layers(kind, batch, width, rng):
    length, shape = 4, (batch, width)
    operator, matrices = bound_case(kind, rng, shape, length)
    v = rng.normal(size=(length, *shape))
    close(operator.mv(v), applied(matrices, v))
    close((operator @ operator).mv(v), applied(matrices @ matrices, v))
    for i in range(length):
        close(operator[i].mv(v[i]), applied(matrices, v)[i])


def test_operators_are_values():
    for operator in (Scalar(0.5), Diagonal(ONES((2, 3))), Dense(ONES((2, 3, 3))), Identity()):
        with pytest.raises(AttributeError):
            operator.value = 1
    assert Scalar(np.float64(0.5)).mv(ONES(3, np.float32)).dtype == np.float32
    with pytest.raises(TypeError, match=r"number or an \(L,\) array, not a list"):
        Scalar([0.5, 0.5])
