"""The gated cells against textbook loops, finite differences, explicit matrices and PyTorch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hbp
from hbp.cells import GRUParameters, LSTMParameters

if TYPE_CHECKING:
    from conftest import Library

EXACT = 1e-13  # of an array's largest entry, where both sides are exact up to rounding
STENCIL = 1e-10  # where one side is a finite difference
WEIGHTS = (0.75, -0.15, 1 / 60)  # central differences of sixth order
EPS = 5e-3


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def affine(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x @ weight.T if bias is None else x @ weight.T + bias


def gru_step(p: GRUParameters, x: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step on states (..., 1, H), h alone, and its residual map as a matrix."""
    h = s[..., 0, :]
    xr, xz, xn = np.split(affine(x, p.weight_ih, p.bias_ih), 3, -1)
    hr, hz, hn = np.split(affine(h, p.weight_hh, p.bias_hh), 3, -1)
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    n = np.tanh(xn + r * hn)
    return ((1 - z) * n + z * h)[..., None, :], diagonal(z)


def lstm_step(p: LSTMParameters, x: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step on states (..., 2, H), c then h, and its residual map as a matrix."""
    c, h = s[..., 0, :], s[..., 1, :]
    i, f, g, o = np.split(affine(x, p.weight_ih, p.bias_ih) + affine(h, p.weight_hh, p.bias_hh), 4, -1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c = f * c + i * g
    by_c = np.concatenate([diagonal(f), diagonal(o * (1 - np.tanh(c) ** 2) * f)], axis=-2)
    return np.stack([c, o * np.tanh(c)], axis=-2), np.concatenate([by_c, np.zeros_like(by_c)], axis=-1)


def diagonal(values: np.ndarray) -> np.ndarray:
    return values[..., None] * np.eye(values.shape[-1])


def run_gru(p: GRUParameters, x: Any, s0: Any) -> tuple[Any, Any, Any]:
    """The library's GRU on states (B, 1, H)."""
    h, pullback = hbp.cells.gru(p, x, s0[:, 0])

    def pull(d: Any, **options: Any) -> Any:
        dp, dx, dh0 = pullback(d[:, :, 0], **options)
        return dp, dx, dh0[:, None]

    return h[:, :, None], pull, pullback


def run_lstm(p: LSTMParameters, x: Any, s0: Any) -> tuple[Any, Any, Any]:
    """The library's LSTM on states (B, 2, H), c then h."""
    (h, c), pullback = hbp.cells.lstm(p, x, (s0[:, 1], s0[:, 0]))

    def pull(d: Any, **options: Any) -> Any:
        dp, dx, (dh0, dc0) = pullback((d[:, :, 1], d[:, :, 0]), **options)
        return dp, dx, np.stack([dc0, dh0], axis=1)

    return np.stack([c, h], axis=2), pull, pullback


@dataclass(frozen=True)
class Cell:
    name: str
    kind: type
    gates: int
    parts: int
    step: Callable[..., tuple[np.ndarray, np.ndarray]]
    run: Callable[..., tuple[Any, Any, Any]]

    def loop(self, p: Any, x: np.ndarray, s0: np.ndarray) -> np.ndarray:
        """The textbook: one step after another, (T, B, parts, H)."""
        states = [s0]
        for row in x:
            states.append(self.step(p, row, states[-1])[0])
        return np.stack(states[1:])


GRU = Cell("gru", GRUParameters, 3, 1, gru_step, run_gru)
LSTM = Cell("lstm", LSTMParameters, 4, 2, lstm_step, run_lstm)
both_cells = pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
every_bias = pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False), (False, True)], ids=str)

SIZES = [(5, 2, 3, 2), (1, 2, 2, 3), (4, 1, 1, 1), (1, 1, 1, 1)]
SIZE = SIZES[0]


@dataclass(frozen=True)
class Problem:
    p: Any
    x: np.ndarray
    s0: np.ndarray
    d: np.ndarray

    @property
    def given(self) -> tuple[Any, np.ndarray, np.ndarray]:
        return self.p, self.x, self.s0


def problem(cell: Cell, rng: np.random.Generator, size: Any = SIZE, biases: Any = (True, True)) -> Problem:
    """Read-only random numbers."""
    steps, batch, inputs, hidden = size

    def draw(*shape: int) -> np.ndarray:
        values = rng.uniform(-1, 1, shape)
        values.setflags(write=False)
        return values

    rows = cell.gates * hidden
    p = cell.kind(draw(rows, inputs), draw(rows, hidden), *(draw(rows) if has else None for has in biases))
    state = (batch, cell.parts, hidden)
    return Problem(p, draw(steps, batch, inputs), draw(*state), draw(steps, *state))


def last_only(d: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(d[:-1]), d[-1:]])


def h_only(d: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(d[:, :, :-1]), d[:, :, -1:]], axis=2)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal structure, shapes and dtypes, and values equal up to ``tolerance`` of the largest."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            close(a, b, tolerance)
    elif expected is None:
        assert actual is None
    else:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def derivative(f: Callable[[np.ndarray], np.ndarray], at: np.ndarray) -> np.ndarray:
    """The derivatives of ``f`` by each entry of ``at``, shape (at.size, *f(at).shape), by finite differences."""
    rows = []
    for unit in EPS * np.eye(at.size).reshape(at.size, *at.shape):
        terms = [w * (f(at + m * unit) - f(at - m * unit)) for m, w in enumerate(WEIGHTS, 1)]
        rows.append(sum(terms) / EPS)
    return np.array(rows)


def parameter_derivatives(f: Callable[[Any], np.ndarray], p: Any) -> tuple[np.ndarray | None, ...]:
    """`derivative` by each of the parameters; None where there is no bias."""
    return tuple(
        None if array is None else derivative(lambda new, name=name: f(p._replace(**{name: new})), array)
        for name, array in p._asdict().items()
    )


def differences(cell: Cell, given: Problem, d: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """The gradients of ``<d, states>`` by finite differences of the textbook loop."""
    p, x, s0 = given.given
    dp = parameter_derivatives(lambda new: (d * cell.loop(new, x, s0)).sum(), p)
    dp = tuple(None if g is None else g.reshape(array.shape) for g, array in zip(dp, p, strict=True))
    dx = derivative(lambda new: (d * cell.loop(p, new, s0)).sum(), x).reshape(x.shape)
    return dp, dx, derivative(lambda new: (d * cell.loop(p, x, new)).sum(), s0).reshape(s0.shape)


@both_cells
@every_bias
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_is_the_textbook_loop(cell: Cell, biases: Any, size: Any, rng: np.random.Generator) -> None:
    given = problem(cell, rng, size, biases)
    close(cell.run(*given.given)[0], cell.loop(*given.given), EXACT)


@both_cells
@every_bias
@pytest.mark.parametrize("loss", [np.array, last_only, h_only], ids=["every step", "last step", "h only"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_gradients_are_finite_differences(
    cell: Cell, biases: Any, loss: Any, size: Any, rng: np.random.Generator
) -> None:
    given = problem(cell, rng, size, biases)
    d = loss(given.d)
    expected = differences(cell, given, d)
    pull = cell.run(*given.given)[1]
    for iterations in (None, size[0]):
        dp, dx, ds0 = pull(d, iterations=iterations)
        assert type(dp) is cell.kind
        close((tuple(dp), dx, ds0), expected, STENCIL)


@both_cells
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_values_and_gradients_are_those_of_torch_layers(
    library: Library, cell: Cell, bias: bool, rng: np.random.Generator
) -> None:
    torch = library.front_end.backend.xp
    given = problem(cell, rng, (12, 3, 4, 5), (bias, bias))
    d = h_only(given.d)
    d[-1] = given.d[-1]  # the layers return no cell state but the last
    layer = getattr(torch.nn, cell.name.upper())(4, 5, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for name, array in given.p._asdict().items():
            if array is not None:
                getattr(layer, f"{name}_l0").copy_(torch.tensor(array))
    x, *initial = (torch.tensor(a, requires_grad=True) for a in (given.x, *np.moveaxis(given.s0, 1, 0)[::-1]))
    h, last = layer(x, tuple(s[None] for s in initial) if cell is LSTM else initial[0][None])
    loss = (torch.tensor(d[:, :, -1]) * h).sum()
    if cell is LSTM:
        loss = loss + (torch.tensor(d[-1, :, 0]) * last[1]).sum()
    expected = [g.numpy() for g in torch.autograd.grad(loss, [*layer.parameters(), x, *initial])]
    states, pull, _ = cell.run(*given.given)
    close(states[:, :, -1], h.detach().numpy(), EXACT)
    dp, dx, ds0 = pull(d)
    found = [*(g for g in dp if g is not None), dx, *np.moveaxis(ds0, 1, 0)[::-1]]
    close(tuple(found), tuple(expected), EXACT)


# Iterate k against the Highway recursion with explicit matrices.


def product(maps: np.ndarray) -> np.ndarray:
    """The first map, then the second, ..."""
    out = maps[0]
    for a in maps[1:]:
        out = a @ out
    return out


def transposed(a: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("...ij,...i->...j", a, v)


def iterate(jacobian: np.ndarray, path: np.ndarray, c: np.ndarray, k: int, chunk: int) -> np.ndarray:
    """The cotangents of all states after k iterations over stages of ``chunk`` steps, (T+1, B, D)."""
    edges = [*range(0, len(jacobian), chunk), len(jacobian)]
    spans = list(pairwise(edges))

    def inside(a: int, b: int, g: np.ndarray) -> list[np.ndarray]:
        states = [g]
        for t in reversed(range(a, b)):
            states.insert(0, transposed(jacobian[t], states[0]) + c[t])
        return states

    def scan(v: list[np.ndarray]) -> list[np.ndarray]:
        states = [v[-1]]
        for a, row in zip(paths[::-1], v[-2::-1], strict=True):
            states.insert(0, transposed(a, states[0]) + row)
        return states

    paths = [product(path[a:b]) for a, b in spans]
    blocks = [product(jacobian[a:b]) - r for (a, b), r in zip(spans, paths, strict=True)]
    sources = [inside(a, b, np.zeros_like(c[-1]))[0] for a, b in spans] + [c[-1]]
    g = scan(sources)
    for _ in range(k):
        pulled = [transposed(block, row) + v for block, row, v in zip(blocks, g[1:], sources, strict=False)]
        g = scan([*pulled, sources[-1]])
    rows = [
        row for (a, b), first, end in zip(spans, g, g[1:], strict=False) for row in [first, *inside(a, b, end)[1:-1]]
    ]
    return np.stack([*rows, g[-1]])


SPLITS: dict[str, Callable[[np.ndarray], Any]] = {
    "own": lambda _: None,
    "zero": lambda _: hbp.Zero(),
    "identity": lambda _: hbp.Identity(),
    "scalar": lambda _: hbp.Scalar(0.3),
    "diagonal": lambda values: hbp.Diagonal(values),
}


def split_matrix(split: str, values: np.ndarray, own: np.ndarray) -> np.ndarray:
    one = np.broadcast_to(np.eye(own.shape[-1]), own.shape)
    flat = values.reshape(own.shape[:-1])
    return {"own": own, "zero": 0 * one, "identity": one, "scalar": 0.3 * one, "diagonal": diagonal(flat)}[split]


def split_values(cell: Cell, given: Problem, split: str) -> tuple[np.ndarray, Any]:
    """Values of a residual path, read-only, and the operator; a GRU's chain has states (B, H)."""
    values = np.cos(given.d)
    values.setflags(write=False)
    return values, SPLITS[split](values[:, :, 0] if cell is GRU else values)


def outside(cell: Cell, d: np.ndarray) -> dict[str, np.ndarray]:
    """What the loss sends into the chain of steps: the cotangent of the last state and those of the others."""
    d = d[:, :, 0] if cell is GRU else d
    return {"cotangent": d[-1], "sources": np.concatenate([np.zeros_like(d[:1]), d[:-1]])}


def along_directions(cell: Cell, weight: np.ndarray, rank: int) -> np.ndarray:
    """The projection of states onto the span of a weight's leading right singular vectors, and onto c as it is."""
    rows = np.linalg.svd(weight)[2][:rank]
    size, projection = weight.shape[1], np.eye(cell.parts * weight.shape[1])
    projection[-size:, -size:] = rows.T @ rows
    return projection


@both_cells
@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
@pytest.mark.parametrize("split", [*SPLITS, "rank 1", "rank 2"])
def test_iterates_are_those_of_explicit_matrices(cell: Cell, chunk: int, split: str, rng: np.random.Generator) -> None:
    given = problem(cell, rng, (7, 2, 2, 2))
    p, x, s0 = given.given
    _, pull, pullback = cell.run(p, x, s0)
    before = np.concatenate([s0[None], cell.loop(p, x, s0)[:-1]])
    by_state = derivative(lambda e: cell.step(p, x, before + e)[0], np.zeros(s0.shape[1:]))
    by_input = derivative(lambda e: cell.step(p, x + e, before)[0], np.zeros(x.shape[2]))
    by_parameters = parameter_derivatives(lambda new: cell.step(new, x, before)[0], p)
    flat = (7, 2, s0[0].size)
    jacobian = np.moveaxis(by_state.reshape(-1, *flat), 0, -1)
    own = cell.step(p, x, before)[1]
    if split.startswith("rank"):
        rank = int(split[-1])
        options = {"rank": rank}
        path = own + (jacobian - own) @ along_directions(cell, p.weight_hh, rank)
        chain = pullback.split(hbp.directions(p.weight_hh, rank))
    else:
        values, residual = split_values(cell, given, split)
        options, path = {"residual": residual}, split_matrix(split, values, own)
        chain = pullback.split(residual)
    c = np.concatenate([np.zeros_like(s0[None]), given.d]).reshape(8, 2, -1)
    for k in range(-(-7 // chunk) + 2):
        g = iterate(jacobian, path, c, k, chunk).reshape(8, *s0.shape)
        dp, dx, ds0 = pull(given.d, iterations=k, chunk=chunk, **options)
        dp_expected = tuple(
            (a * g[1:]).sum((1, 2, 3, 4)).reshape(array.shape) for a, array in zip(by_parameters, p, strict=True)
        )
        expected = dp_expected, np.moveaxis((by_input * g[1:]).sum((3, 4)), 0, -1), g[0]
        close((tuple(dp), dx, ds0), expected, STENCIL)
        every = hbp.highway(chain, **outside(cell, given.d), iterations=k, chunk=chunk)
        close(every.reshape(g.shape), g, STENCIL)


@both_cells
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_every_split_is_exact_from_the_number_of_stages(
    cell: Cell, split: str, chunk: int, rng: np.random.Generator
) -> None:
    given = problem(cell, rng, (6, 2, 3, 2))
    pull = cell.run(*given.given)[1]
    exact = pull(given.d)
    _, residual = split_values(cell, given, split)
    for iterations in (6 // chunk, 100, np.int64(100)):
        close(pull(given.d, iterations=iterations, chunk=chunk, residual=residual), exact, EXACT)
    early = pull(given.d, iterations=1, chunk=chunk, residual=residual)
    assert np.abs(early[2] - exact[2]).max() > 1e-3 * np.abs(exact[2]).max()
    close(pull(given.d, iterations=1, chunk=6, residual=residual), exact, EXACT)  # one stage: exact whatever the split


@both_cells
@pytest.mark.parametrize("biases", [(True, True), (False, False)], ids=str)
def test_all_directions_are_exact_without_a_round_and_none_are_the_gates_path(
    cell: Cell, biases: Any, rng: np.random.Generator
) -> None:
    given = problem(cell, rng, (6, 3, 2, 4), biases)
    pull = cell.run(*given.given)[1]
    exact = pull(given.d)
    close(pull(given.d, iterations=0, rank=4), exact, EXACT)
    close(pull(given.d, rank=4), exact, 0)  # exact backprop under any split
    close(pull(given.d, iterations=6, rank=2), exact, EXACT)
    for k in (0, 1, 2):
        close(pull(given.d, iterations=k, rank=0), pull(given.d, iterations=k), 0)
    stale = hbp.directions(given.p.weight_hh + 0.1 * rng.normal(size=given.p.weight_hh.shape), 2)
    close(pull(given.d, iterations=6, rank=stale), exact, EXACT)  # of another weight: a worse split, no other gradient
    reports: list[Any] = []
    close(pull(given.d, tolerance=1e-14, rank=2, watch=reports.append), exact, EXACT)
    assert len(reports) == 1
    assert len(reports[0].increments) > 1


def test_residual_dense_holds_all_of_a_gru_at_no_iteration(rng: np.random.Generator) -> None:
    given = problem(GRU, rng, (5, 2, 2, 3))
    before = np.concatenate([given.s0[None], GRU.loop(*given.given)[:-1]])
    by_state = derivative(lambda e: gru_step(given.p, given.x, before + e)[0], np.zeros((1, 3)))
    whole = hbp.Dense(np.moveaxis(by_state[:, :, :, 0], 0, -1))
    pull = GRU.run(*given.given)[1]
    close(pull(given.d, iterations=0, residual=whole), pull(given.d), STENCIL)


def test_lstm_carries_a_loss_on_h_through_time_without_iterations(rng: np.random.Generator) -> None:
    given = problem(LSTM, rng)
    pull = LSTM.run(*given.given)[1]
    d = h_only(last_only(given.d))
    _, dx, ds0 = pull(d, iterations=0)
    assert (np.abs(dx).max((1, 2)) > 0).all()
    states = np.concatenate([given.s0[None], LSTM.loop(*given.given)])
    paths = [lstm_step(given.p, x, s)[1] for x, s in zip(given.x, states, strict=False)]
    close(ds0, transposed(product(np.array(paths)), d[-1].reshape(2, -1)).reshape(ds0.shape), EXACT)
    assert np.abs(ds0[:, 0]).min() > 0
    assert not ds0[:, 1].any()
    _, dx, ds0 = pull(d, iterations=0, residual=hbp.Zero())
    assert not dx[:-1].any()
    assert dx[-1].any()
    assert not ds0.any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_lstms_pullback_finds_its_cell_states_again(size: Any, rng: np.random.Generator) -> None:
    given = problem(LSTM, rng, size)
    pullback = LSTM.run(*given.given)[2]
    forgetful, d = replace(pullback, states=(pullback.states[0], None)), (given.d[:, :, 1], given.d[:, :, 0])
    for options in ({"iterations": 1}, {"iterations": size[0], "chunk": 2}, {"iterations": 0, "residual": hbp.Zero()}):
        found, expected = forgetful(d, **options), pullback(d, **options)
        close((tuple(found[0]), *found[1:]), (tuple(expected[0]), *expected[1:]), EXACT)


def test_lstm_without_a_cotangent_of_c_is_one_of_zeros(rng: np.random.Generator) -> None:
    given = problem(LSTM, rng)
    pullback = LSTM.run(*given.given)[2]
    dh = given.d[:, :, 1]
    for options in ({}, {"iterations": 1}, {"iterations": 1, "chunk": 2, "residual": hbp.Zero()}):
        found, expected = pullback((dh, None), **options), pullback((dh, np.zeros_like(dh)), **options)
        close((tuple(found[0]), *found[1:]), (tuple(expected[0]), *expected[1:]), 0)


@both_cells
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("split", SPLITS)
def test_dtype_stays(cell: Cell, dtype: str, split: str, rng: np.random.Generator) -> None:
    given = problem(cell, rng)
    p = cell.kind(*(a.astype(dtype) for a in given.p))
    states, pull, _ = cell.run(p, given.x.astype(dtype), given.s0.astype(dtype))
    _, residual = split_values(cell, Problem(p, given.x, given.s0, given.d.astype(dtype)), split)
    assert states.dtype == dtype
    small = {"tolerance": 1e-2} if split == "own" else {}
    for options in ({}, {"iterations": 2}, {"iterations": 1, "chunk": 2}, small):
        dp, dx, ds0 = pull(given.d.astype(dtype), residual=residual, **options)
        assert {g.dtype for g in (*dp, dx, ds0)} == {np.dtype(dtype)}


@both_cells
def test_inputs_are_unchanged_and_a_pullback_can_be_called_again(cell: Cell, rng: np.random.Generator) -> None:
    given = problem(cell, rng)
    arrays = [*given.p, given.x, given.s0, given.d]
    copies = [a.copy() for a in arrays]
    states, pull, _ = cell.run(*given.given)
    kept = states.copy()
    values, diagonal_path = split_values(cell, given, "diagonal")
    first = [pull(given.d, iterations=k, chunk=s, residual=diagonal_path) for k, s in ((None, 1), (1, 1), (1, 2))]
    again = [pull(given.d, iterations=k, chunk=s, residual=diagonal_path) for k, s in ((1, 2), (1, 1), (None, 1))]
    close(tuple(first), tuple(again[::-1]), 0)
    close((*arrays, states, values), (*copies, kept, np.cos(given.d)), 0)


@both_cells
def test_gradients_are_linear_in_the_cotangent(cell: Cell, rng: np.random.Generator) -> None:
    given = problem(cell, rng)
    pull = cell.run(*given.given)[1]
    other = rng.normal(size=given.d.shape)
    for options in ({}, {"iterations": 1}, {"iterations": 1, "chunk": 2}):
        one, two, both = (pull(d, **options) for d in (given.d, other, 2 * given.d - other))
        expected = tuple(2 * a - b for a, b in zip((*one[0], *one[1:]), (*two[0], *two[1:]), strict=True))
        close((*both[0], *both[1:]), expected, EXACT)


@both_cells
def test_tolerance_stops_at_the_first_small_increment(cell: Cell, rng: np.random.Generator) -> None:
    given = problem(cell, rng, (9, 2, 3, 2))
    _, pull, pullback = cell.run(*given.given)
    found = hbp.report(pullback.chain, **outside(cell, given.d))
    shares = [a / b for a, b in zip(found.increments, found.sizes, strict=True)]
    for tolerance in (1.0, 0.2, 1e-2, 1e-4, 0.0):
        k = next(k for k, share in enumerate(shares) if share <= tolerance or k == 9)
        close(pull(given.d, tolerance=tolerance), pull(given.d, iterations=k), EXACT)
        close(pull(given.d, tolerance=tolerance, iterations=1), pull(given.d, iterations=min(k, 1)), EXACT)


@both_cells
def test_a_pullback_keeps_its_backend_whatever_is_pinned(cell: Cell, foreign: str, rng: np.random.Generator) -> None:
    given, options = problem(cell, rng), [{}, {"iterations": 1, "chunk": 2}, {"iterations": 1, "residual": hbp.Zero()}]
    run = getattr(hbp.cells, cell.name)
    initial, d = given.s0[:, 0], given.d[:, :, 0]
    if cell is LSTM:
        initial, d = (initial, given.s0[:, 1]), (d, given.d[:, :, 1])
    expected = [run(given.p, given.x, initial)[1](d, **row) for row in options]
    with hbp.using(foreign):
        with pytest.raises(TypeError, match="arrays belong to numpy"):
            run(given.p, given.x, initial)
        pullback = run(given.p, given.x, initial, backend="numpy")[1]
        found = [pullback(d, **row) for row in options]
    close(tuple(found), tuple(expected), 0)


@both_cells
def test_report_reads_the_chain_of_a_pullback(cell: Cell, rng: np.random.Generator) -> None:
    given = problem(cell, rng)
    _, pull, pullback = cell.run(*given.given)
    found = hbp.report(pullback.chain, **outside(cell, given.d))
    assert len(pullback.chain) == 5
    assert len(found.increments) == 6
    assert found.exact
    assert not found.diverges
    g = hbp.backprop(pullback.chain, **outside(cell, given.d))
    close(g[0].reshape(given.s0.shape), pull(given.d)[2], EXACT)
    assert not hbp.report(pullback.chain, **outside(cell, given.d), iterations=2).exact
    diverging = pullback.chain.resplit(hbp.Scalar(-5.0))
    assert hbp.report(diverging, **outside(cell, given.d)).verdict.startswith("diverges")
    with pytest.warns(hbp.DivergenceWarning, match="the increments grow"):
        pull(given.d, tolerance=1e-9, residual=hbp.Scalar(-5.0))


# Bad input: each error says what was given and what is accepted.


def wrong(name: str, change: Callable[[np.ndarray], Any], error: type, match: str) -> Any:
    return pytest.param(name, change, error, match, id=f"{name}: {match[:30]}")


@both_cells
@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        wrong("x", lambda x: x[0], ValueError, r"x has shape \(3, 3\).*\(T, B, I\)"),
        wrong("x", lambda x: x[:0], ValueError, "at least one step"),
        wrong("x", lambda x: x[:, :2], ValueError, r"h0 has shape \(3, 2\), expected \(2, 2\)"),
        wrong("x", lambda x: x[:, :, :2], ValueError, r"weight_ih has shape \(\d+, 3\), expected \(\d+, 2\)"),
        wrong("x", lambda x: x.astype("float32"), TypeError, "one dtype.*float32"),
        wrong("x", lambda x: x.astype(int), TypeError, "x is int64.*real floating-point"),
        wrong("x", lambda x: x > 0, TypeError, "x is bool.*real floating-point"),
        wrong("x", lambda x: x + 0j, TypeError, "x is complex128.*real floating-point"),
        wrong("x", lambda x: x.tolist(), TypeError, "list is not an array"),
        wrong("x", lambda _: None, TypeError, "NoneType is not an array"),
        wrong("weight_ih", lambda w: w.T, ValueError, "weight_ih has shape .* expected"),
        wrong("weight_ih", lambda w: w.tolist(), TypeError, "list is not an array"),
        wrong("weight_ih", lambda _: None, TypeError, "weight_ih"),
        wrong("weight_hh", lambda _: None, TypeError, "weight_hh"),
        wrong("weight_hh", lambda w: w[:-1], ValueError, "weight_hh has shape .* expected"),
        wrong("weight_hh", lambda w: w[0], ValueError, r"weight_hh has shape \(2,\); expected \(\d H, H\)"),
        wrong("weight_hh", lambda w: w.astype("float16"), TypeError, "one dtype.*float16"),
        wrong("bias_ih", lambda b: b[:2], ValueError, r"bias_ih has shape \(2,\), expected"),
        wrong("bias_hh", lambda b: b[:, None], ValueError, "bias_hh has shape .* expected"),
        wrong("bias_hh", lambda b: b.astype("float32"), TypeError, "one dtype.*bias_hh"),
        wrong("h0", lambda h: h[0], ValueError, r"h0 has shape \(2,\), expected \(3, 2\)"),
        wrong("h0", lambda h: h[None], ValueError, r"h0 has shape \(1, 3, 2\), expected \(3, 2\)"),
        wrong("h0", lambda h: h[:, :1], ValueError, r"h0 has shape \(3, 1\), expected \(3, 2\)"),
        wrong("h0", lambda _: 0.0, TypeError, "float is not an array"),
        wrong("h0", lambda h: h.astype("float32"), TypeError, "one dtype.*h0"),
    ],
)
def test_bad_input(cell: Cell, name: str, change: Any, error: type, match: str, rng: np.random.Generator) -> None:
    given = problem(cell, rng, (4, 3, 3, 2))
    h0 = np.zeros((3, 2))
    arrays = {**given.p._asdict(), "x": given.x, "h0": h0}
    arrays[name] = change(arrays[name])
    p = cell.kind(*(arrays[key] for key in given.p._fields))
    with pytest.raises(error, match=match):
        getattr(hbp.cells, cell.name)(p, arrays["x"], (arrays["h0"], h0) if cell is LSTM else arrays["h0"])


@both_cells
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"iterations": -1}, ValueError, "iterations=-1 is too small"),
        ({"iterations": 1.5}, TypeError, "iterations=1.5 is a float"),
        ({"chunk": 0}, ValueError, "chunk=0 is too small"),
        ({"chunk": None}, TypeError, "chunk=None is a NoneType"),
        ({"tolerance": -1.0}, ValueError, "tolerance=-1.0.*non-negative"),
        ({"tolerance": True}, ValueError, "tolerance=True.*non-negative"),
        ({"residual": 0.5}, TypeError, "residual is a float; give an operator"),
        ({"iterations": hbp.Schedule({0: 1})}, TypeError, "iterations is a Schedule; call it with the training step"),
        ({"rank": -1}, ValueError, "rank=-1 is too small"),
        ({"rank": 1.5}, TypeError, "rank=1.5 is a float"),
        ({"rank": "all"}, ValueError, "rank='all'; give a number of directions, 'auto'"),
        ({"rank": 3}, ValueError, r"rank=3 is more than a weight of shape \(\d+, 2\) has"),
        ({"rank": 1, "residual": hbp.Zero()}, ValueError, "residual and rank are given"),
        ({"residual": hbp.Diagonal(np.ones((3, 2)))}, ValueError, "Diagonal has 3 maps and the chain 4 layers"),
        ({"residual": hbp.Diagonal(np.ones((4, 5)))}, ValueError, r"Diagonal has shape \(5,\).*states of shape"),
        ({"residual": hbp.Diagonal(np.ones((4, 2), "float32"))}, TypeError, "Diagonal is float32 .* float64"),
        ({"residual": hbp.Pair(np.ones((4, 1, 3)), np.ones((4, 2, 1)))}, ValueError, "Pair"),
    ],
    ids=str,
)
def test_bad_options(cell: Cell, options: Any, error: type, match: str, rng: np.random.Generator) -> None:
    given = problem(cell, rng, (4, 3, 3, 2))
    pull = cell.run(*given.given)[1]
    with pytest.raises(error, match=match):
        pull(given.d, **options)


@both_cells
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: d[:-1], ValueError, r"dh has shape \(3, 3, 2\), expected \(4, 3, 2\)"),
        (lambda d: d[-1], ValueError, r"dh has shape \(3, 2\), expected \(4, 3, 2\)"),
        (lambda d: d.astype("float32"), TypeError, "one dtype.*dh.*float32"),
        (lambda d: d.astype(int), TypeError, "dh is int64.*real floating-point"),
        (lambda d: d.tolist(), TypeError, "list is not an array"),
        (lambda _: None, TypeError, "NoneType is not an array"),
        (lambda _: 1.0, TypeError, "float is not an array"),
    ],
)
def test_bad_cotangents(cell: Cell, change: Any, error: type, match: str, rng: np.random.Generator) -> None:
    given = problem(cell, rng, (4, 3, 3, 2))
    pullback = cell.run(*given.given)[2]
    dh = np.ones((4, 3, 2))
    with pytest.raises(error, match=match):
        pullback((change(dh), dh) if cell is LSTM else change(dh))
    if cell is LSTM and change(dh) is not None:
        with pytest.raises(error, match=match.replace("dh", "dc")):
            pullback((dh, change(dh)))


def test_lstm_states_are_pairs(rng: np.random.Generator) -> None:
    given = problem(LSTM, rng, (4, 3, 3, 2))
    h0, dh = np.zeros((3, 2)), np.ones((4, 3, 2))
    for initial in (h0, None, (h0,), (h0, h0, h0)):
        with pytest.raises(TypeError, match=r"initial state of an LSTM is a pair \(h0, c0\)"):
            hbp.cells.lstm(given.p, given.x, initial)
    with pytest.raises(ValueError, match=r"c0 has shape \(2,\), expected \(3, 2\)"):
        hbp.cells.lstm(given.p, given.x, (h0, h0[0]))
    with pytest.raises(TypeError, match="NoneType is not an array"):
        hbp.cells.lstm(given.p, given.x, (h0, None))
    pullback = hbp.cells.lstm(given.p, given.x, (h0, h0))[1]
    for d in (dh, None, (dh,), (dh, dh, dh)):
        with pytest.raises(TypeError, match=r"cotangents of an LSTM are a pair \(dh, dc\)"):
            pullback(d)


@both_cells
@pytest.mark.parametrize("size", [(3, 0, 2, 2), (3, 2, 0, 2), (3, 2, 2, 0), (3, 0, 0, 0)])
@pytest.mark.parametrize("k", [None, 0, 2])
def test_nothing_has_gradients_of_zero(cell: Cell, size: Any, k: int | None, rng: np.random.Generator) -> None:
    given = problem(cell, rng, size)
    _, pull, _ = cell.run(*given.given)
    dp, dx, ds0 = pull(given.d, iterations=k)
    assert [g.shape for g in (*dp, dx, ds0)] == [a.shape for a in (*given.p, given.x, given.s0)]
    assert size[1] or not any(g.any() for g in dp)


def test_parameters_are_those_of_the_cell(rng: np.random.Generator) -> None:
    given, h0 = problem(GRU, rng, (4, 3, 3, 2)), np.zeros((3, 2))
    with pytest.raises(TypeError, match=r"params is a tuple; give the cell's parameters, as hbp\.cells\.GRUParameters"):
        hbp.cells.gru(tuple(given.p), given.x, h0)
    with pytest.raises(ValueError, match=r"weight_hh has shape \(6, 2\), expected \(8, 2\)"):
        hbp.cells.lstm(LSTMParameters(*given.p), given.x, (h0, h0))
