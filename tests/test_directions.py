"""The strong directions of a weight, against NumPy's singular value decomposition and known spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hbp
from hbp.directions import flat_edge

if TYPE_CHECKING:
    from conftest import Library


def with_values(rng: np.random.Generator, shape: tuple[int, int], values: list[float]) -> np.ndarray:
    """A random matrix with these singular values."""
    left = np.linalg.qr(rng.normal(size=(shape[0], len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], len(values))))[0]
    return (left * values) @ right.T


def spiked(rng: np.random.Generator, shape: tuple[int, int], values: list[float]) -> np.ndarray:
    """Noise whose largest singular value is near 1, and a few directions of given strength."""
    scale = np.sqrt(3) / (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    return rng.uniform(-scale, scale, shape) + with_values(rng, shape, values)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_the_first_are_those_of_the_decomposition(library: Library, rank: int, rng: np.random.Generator) -> None:
    weight = with_values(rng, (12, 5), [4.0, 3.0, 2.0, 1.0, 0.5])
    found = hbp.directions(library.array(weight), rank)
    left, right = (library.numpy(factor) for factor in found.taken)
    assert (left.shape, right.shape, left.dtype) == ((12, rank), (rank, 5), weight.dtype)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(left @ right, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-12)
    np.testing.assert_allclose(found.values, s[:rank], atol=1e-12)


def test_a_warm_start_follows_a_weight_that_changes(library: Library, rng: np.random.Generator) -> None:
    weight, drift = with_values(rng, (12, 6), [4.0, 3.0, 0.3, 0.2, 0.1, 0.1]), rng.normal(size=(12, 6))
    found = hbp.directions(library.array(weight), 2)
    for n in range(1, 9):
        moved = weight + 0.02 * n * drift
        found = hbp.directions(library.array(moved), 2, found)
        rows = np.linalg.svd(moved)[2][:2]
        right = library.numpy(found.right)
        np.testing.assert_allclose(right @ right.T, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(right.T @ right, rows.T @ rows, atol=0.02)
        np.testing.assert_allclose(library.numpy(found.left), moved @ right.T, atol=1e-12)


@pytest.mark.parametrize("shape", [(192, 64), (300, 100), (60, 60)], ids=str)
def test_automatic_takes_what_rises_above_the_flat_edge_and_four_more(
    shape: tuple[int, int], rng: np.random.Generator
) -> None:
    for values in ([], [4.0], [6.0, 4.0, 2.5]):
        weight = spiked(rng, shape, values)
        assert hbp.directions(weight, "auto").rank == (len(values) + 4 if values else 0)


def test_automatic_sees_directions_rise_and_fall_from_a_warm_start(library: Library, rng: np.random.Generator) -> None:
    shape, strong = (96, 32), with_values(rng, (96, 32), [1.0] * 7)
    noise = spiked(rng, shape, [])
    found = hbp.directions(library.array(noise), "auto")
    ranks = []
    for strength in (0.0, 1.0, 2.0, 4.0, 8.0, 8.0, 4.0, 1.0, 0.0, 0.0):
        found = hbp.directions(library.array(noise + strength * strong), "auto", found)
        ranks.append(found.rank)
        assert found.rank <= len(found.values)
    assert ranks[0] == ranks[-1] == 0
    assert ranks[4:6] == [11, 11]


def test_automatic_decomposes_a_weight_again_only_where_all_that_it_follows_are_strong(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    flat, weight, stronger = (spiked(rng, (96, 32), [6.0] * n) for n in (0, 2, 6))
    following, found = hbp.directions(flat, "auto"), hbp.directions(weight, "auto")
    assert [len(following.values), *(factor.shape for factor in following.taken)] == [4, (96, 0), (0, 32)]
    monkeypatch.setattr(np.linalg, "svd", lambda *_, **__: pytest.fail("the weight is decomposed"))
    assert hbp.directions(weight, "auto", found).rank == 6
    with pytest.raises(pytest.fail.Exception, match="the weight is decomposed"):
        hbp.directions(stronger, "auto", found)


def test_a_start_of_more_directions_is_none(rng: np.random.Generator) -> None:
    weight = with_values(rng, (12, 5), [4.0, 3.0, 2.0, 1.0, 0.5])
    found = hbp.directions(weight, 2, hbp.directions(-weight, 3))
    np.testing.assert_allclose(found.values, [4.0, 3.0], atol=1e-12)


def test_a_start_of_another_weight_is_none(library: Library, rng: np.random.Generator) -> None:
    """One step from there would stay in a space in which the other has nothing."""
    one, other = np.diag([3.0, 0.1, 0.1]), np.diag([0.1, 5.0, 0.1])
    found = hbp.directions(library.array(other), 1, hbp.directions(library.array(one), 1))
    np.testing.assert_allclose(found.values, [5.0], atol=1e-12)
    one, other = (with_values(rng, (96, 32), [6.0, 5.0, 4.0]) for _ in range(2))
    found = hbp.directions(library.array(other), 3, hbp.directions(library.array(one), 3))
    np.testing.assert_allclose(found.values, [6.0, 5.0, 4.0], atol=1e-12)


def test_automatic_takes_directions_in_the_order_of_their_strength_now(library: Library) -> None:
    """The first is gone; what is left of the second is as strong as ever."""
    shape = (96, 32)
    before, after = (np.eye(*shape) * np.array([*values, *[0.01] * 28]) for values in ([9, 8, 0, 0], [0, 8, 0, 0]))
    found = hbp.directions(library.array(after), "auto", hbp.directions(library.array(before), "auto"))
    assert found.rank >= 1
    np.testing.assert_allclose(found.values[:1], [8.0], atol=1e-12)
    np.testing.assert_allclose(abs(library.numpy(found.right)[0]), np.eye(32)[1], atol=1e-12)


def test_the_flat_edge_is_the_largest_value_of_noise(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(1200, 400))
    edge = flat_edge((), float((weight**2).sum()), weight.shape)
    np.testing.assert_allclose(np.linalg.svd(weight)[1][0], edge, rtol=0.02)
    assert flat_edge((), 0.0, (3, 3)) == 0
    np.testing.assert_allclose(flat_edge((2.0,), 8.0, (3, 3)), 2 * 3**0.5)  # 2 x 2 entries of 1 remain


def test_weights_that_are_zero_or_not_finite_leave_no_trace_behind(library: Library, rng: np.random.Generator) -> None:
    good = with_values(rng, (6, 3), [3.0, 2.0, 1.0])
    for bad in (np.where(good == good[0, 0], np.nan, good), 0 * good):
        lost = hbp.directions(library.array(bad), 2)
        assert lost.right.shape == (2, 3)
        found = hbp.directions(library.array(good), 2, lost)
        np.testing.assert_allclose(found.values, [3.0, 2.0], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_no_direction(dtype: str, rng: np.random.Generator) -> None:
    for shape in ((24, 8), (32, 8), (256, 64)):
        for values in ([], [4.0], [6.0, 4.0, 0.1]):
            weight = with_values(rng, shape, values).astype(dtype)
            assert hbp.directions(weight, "auto").rank == len(values)


def test_inside_a_program_of_jax(rng: np.random.Generator) -> None:
    """A decomposition or a warm start of traced weights; what is followed goes in and out."""
    jax = pytest.importorskip("jax")
    weight = with_values(rng, (12, 6), [4.0, 3.0, 0.3, 0.2, 0.1, 0.1])
    weights = [weight, weight + 0.1 * rng.normal(size=weight.shape)]
    with jax.enable_x64(True):
        first, second = map(jax.numpy.asarray, weights)
        for start in (None, hbp.directions(first, 2)):
            found = jax.jit(lambda weight, start: hbp.directions(weight, 2, start))(second, start)
            expected = hbp.directions(second, 2, start)
            np.testing.assert_allclose(found.left @ found.right, expected.left @ expected.right, atol=1e-12)
            assert (found.rank, "traced" in repr(found)) == (2, False)
        lost = hbp.Directions(np.nan * found.left, found.right, 2)
        step = jax.jit(lambda start: hbp.directions(second, 2, start))
        for _ in range(12):
            lost = step(lost)
        rows = np.linalg.svd(weights[1])[2][:2]
        np.testing.assert_allclose(lost.right.T @ lost.right, rows.T @ rows, atol=1e-10)
        with pytest.raises(TypeError, match=r"rank='auto' needs the weight's numbers; inside jax\.jit give"):
            jax.jit(lambda weight: hbp.directions(weight, "auto").left)(second)
        jax.jit(lambda start: repr(start).index("values=traced"))(found)


def test_their_rows_are_constants_in_jax(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        weight, given = jax.numpy.ones((4, 3)), jax.numpy.asarray(rng.normal(size=(4, 2)))
        for start in (None, hbp.directions(weight, 2)):  # equal singular values, of which there are no derivatives

            def loss(weight: Any, start: Any = start) -> Any:
                found = hbp.directions(weight, 2, start)
                return (given * found.left).sum() + found.right.sum()

            rows = hbp.directions(weight, 2, start).right
            np.testing.assert_allclose(jax.grad(loss)(weight), given @ rows, atol=1e-14)

        def automatic(weight: Any) -> Any:
            left, _ = hbp.directions(weight, "auto").taken
            assert left.shape == (24, 1)
            return left.sum()

        strong = jax.numpy.asarray(with_values(rng, (24, 8), [4.0]))
        rows = hbp.directions(strong, 1).right
        np.testing.assert_allclose(jax.grad(automatic)(strong), np.ones((24, 1)) @ rows, atol=1e-12)


@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        (3, TypeError, "start is a int; give the directions of the weight before, or None"),
        (hbp.directions(np.ones((4, 3)), 2), ValueError, r"right factor has shape \(2, 3\), expected \(2, 2\)"),
        (hbp.directions(np.ones((4, 2), "f4"), 2), TypeError, "one dtype"),
    ],
    ids=str,
)
def test_a_start_is_that_of_such_a_weight(start: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        hbp.directions(np.ones((4, 2)), 2, start)


def test_directions_of_another_library_are_refused(library: Library) -> None:
    if library.name == "numpy":
        pytest.skip("NumPy's are those given")
    others = hbp.directions(np.ones((4, 2)), 1)
    for options in ({"rank": others}, {"rank": 1, "start": others}):
        with pytest.raises(TypeError, match="several libraries"):
            hbp.directions(library.array(np.ones((4, 2))), **options)


@pytest.mark.parametrize(
    ("weight", "rank", "error", "match"),
    [
        (np.ones((4, 2)), 3, ValueError, r"rank=3 is more than a weight of shape \(4, 2\)"),
        (np.ones((2, 4)), 3, ValueError, r"rank=3 is more than a weight of shape \(2, 4\)"),
        (np.ones((4, 2)), "some", ValueError, "rank='some'"),
        (np.ones((4, 2)), True, TypeError, "rank=True is a bool"),
        (np.ones(4), 1, ValueError, r"shape \(4,\); expected \(N, H\)"),
        (np.ones((4, 2), int), 1, TypeError, "weight is int"),
        (np.ones((3, 2)), hbp.directions(np.ones((4, 2)), 1), ValueError, "left factor has shape"),
        (np.ones((4, 2), "f4"), hbp.directions(np.ones((4, 2)), 1), TypeError, "one dtype"),
    ],
    ids=str,
)
def test_bad_input(weight: Any, rank: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        hbp.directions(weight, rank)
