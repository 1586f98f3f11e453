"""Iterations as a function of the training step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hbp import Schedule


@pytest.mark.parametrize(
    ("step", "iterations"),
    [(0, 1), (1, 1), (499, 1), (500, 2), (999, 2), (1000, 5), (1999, 5), (2000, None), (10**9, None)],
)
def test_a_phase_lasts_until_the_next_one(step, iterations):
    assert Schedule({0: 1, 500: 2, 1000: 5, 2000: None})(step) == iterations
    assert Schedule({2000: None, 500: 2, 0: 1, 1000: 5})(step) == iterations


def test_one_phase():
    assert Schedule({0: 3})(10**6) == 3
    assert Schedule({0: None})(0) is None
    assert Schedule({0: 0})(7) == 0


def test_a_schedule_is_a_value():
    phases = {0: 1, 10: 2}
    schedule = Schedule(phases)
    phases[5] = 9
    assert schedule(7) == 1
    assert schedule == Schedule({10: 2, 0: 1})
    assert hash(schedule) == hash(Schedule({10: 2, 0: 1}))
    assert schedule != Schedule({0: 1, 10: 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.phases = {}


def test_integers_of_numpy_are_integers():
    schedule = Schedule({np.int64(0): np.int32(1), np.int64(5): None})
    assert schedule(np.int64(4)) == 1
    assert type(schedule(4)) is int
    assert schedule(np.int64(5)) is None
