"""Schedules as lists of actions, and a simulation of devices that carry them out: it knows no formula.

An action is (kind, stage, microbatch): "F" forward, "I" a cotangent pulled through, "W" the weight gradients, "B" both,
and of Highway-BP "X" a device's part in the exchange of a round and "P" its pullback of that round.
"""

from __future__ import annotations

from collections import deque
from typing import Any

Action = tuple[str, int, int]
Lists = dict[int, list[Action]]
"""The actions of each device, in order."""


def simulated(lists: Lists, durations: dict[str, float], lag: float = 0.0) -> float:
    """When the last device is done: each does its next action once that is possible and waits until then.

    What another device hands on takes a lag to arrive; an exchange begins when all devices take part and has no other.
    """
    device = {stage: rank for rank, actions in lists.items() for _, stage, _ in actions}
    done: dict[Action, float] = {}
    free = dict.fromkeys(lists, 0.0)
    waiting = {rank: deque(actions) for rank, actions in lists.items()}
    while any(waiting.values()):
        before = len(done)
        for rank, actions in waiting.items():
            while actions and all(needed in done for needed in _needs(actions[0], len(device), lists)):
                action = actions.popleft()
                kind, stage, number = action
                far = {
                    need: 0 if kind == "X" or device[need[1]] == rank else lag
                    for need in _needs(action, len(device), lists)
                }
                start = max([free[rank], *(done[need] + wait for need, wait in far.items())])
                free[rank] = done["I" if kind == "B" else kind, stage, number] = start + durations[kind]
        assert len(done) > before, "dead-lock"
    return max(free.values())


def _needs(action: Action, stages: int, lists: Lists) -> list[Action]:
    kind, stage, number = action
    if kind == "F":
        return [("F", stage - 1, number)] if stage else []
    if kind in "IB":
        return [("F", stage, number), *([("I", stage + 1, number)] if stage + 1 < stages else [])]
    if kind == "X" and not number:  # the loss is known to all once the last stage is through
        return [action for actions in lists.values() for action in actions if action[0] == "F"]
    if kind == "X":
        return [("P", rank, number - 1) for rank in lists]
    return []  # W and P follow on the same device


def gpipe(P: int, M: int, backward: str = "B") -> Lists:
    """All forwards, then all backwards; with backward="IW" the weight gradients at the very end."""
    return {p: [(kind, p, m) for kind in "F" + backward for m in range(M)] for p in range(P)}


def one_f_one_b(P: int, M: int) -> Lists:
    """As many forwards as there are stages from here on, then by turns."""
    lists: Lists = {}
    for p in range(P):
        ahead = min(P - 1 - p, M)
        steady = [("F", p, m) for m in range(ahead)]
        for m in range(M):
            steady += [("F", p, ahead + m)] * (ahead + m < M) + [("B", p, m)]
        lists[p] = steady
    return lists


def highway(P: int, M: int, k: int) -> Lists:
    """GPipe's forward, then k + 1 rounds of an exchange and a pullback on all devices, then weight gradients."""
    rounds = [(kind, r) for r in range(k + 1) for kind in "XP"]
    return {p: [*(("F", p, m) for m in range(M)), *((kind, p, r) for kind, r in rounds), ("W", p, 0)] for p in range(P)}


def of_torch(schedule: Any, P: int, M: int, pieces: int) -> Lists:
    """The action lists of a schedule of torch.distributed.pipelining, which makes them without stages too."""
    made = object.__new__(schedule)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = P, pieces, M
    made._num_stages = P * pieces
    made.number_of_rounds = max(1, M // P)
    made.microbatches_per_round = M // made.number_of_rounds
    single = hasattr(made, "_get_pipeline_order")
    every = made._get_pipeline_order() if single else {p: made._calculate_single_rank_operations(p) for p in range(P)}
    letters = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    kinds = {rank: [(a, a.computation_type.name) for a in actions if a is not None] for rank, actions in every.items()}
    return {
        rank: [(letters[kind], a.stage_index, a.microbatch_index) for a, kind in actions if kind in letters]
        for rank, actions in kinds.items()
    }
