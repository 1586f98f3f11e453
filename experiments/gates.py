"""Beyond the paper: the gate alone, and in chunks, on digits pixel by pixel, beside the tasks of `ranks`."""

from __future__ import annotations

from experiments.experiment import Claim, Experiment
from experiments.ranks import CHUNK, EXACT, GATE, compared
from experiments.results import EQUAL, Results


def _claim(results: Results, task: str) -> Claim:
    claim = "Where it fails: at k = 3 the gate alone ends worse than exact backprop; chunks end better than it (ours)."
    rule = f"Chunks end better than the gate alone, of which this is not true: {EQUAL}."
    good, closer = results.as_good(task, GATE), results.worse(task, CHUNK, GATE)
    parts = [f"{method.label}: {results.show(task, method)}" for method in results.methods(task)]
    agrees = None if good is None or closer is None else not good and closer < 0
    return Claim(claim, f"{results.title(task)}: {'; '.join(parts)}{results.note(task)}", rule, agrees, limit=True)


def without(name: str, title: str, *tasks: str) -> Experiment:
    """The gate alone and chunks beside exact backprop on some tasks."""
    return compared(name, title, dict.fromkeys(tasks, (EXACT, GATE, CHUNK)), _claim)


EXPERIMENT = without("gates", "Without strong directions", "pixels-lstm", "pixels-256", "pixels-lstm-256")
