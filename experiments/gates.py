"""Beyond the paper: the gate alone, and in chunks, where `ranks` takes strong directions in: digits pixel by pixel."""

from __future__ import annotations

from experiments.experiment import Claim
from experiments.ranks import CHUNK, EXACT, GATE, compared
from experiments.results import Results

TASKS = dict.fromkeys(("pixels-lstm", "pixels-256", "pixels-lstm-256"), (EXACT, GATE, CHUNK))


def _claim(results: Results, task: str) -> Claim:
    claim = "Where it fails: at k = 3 the gate alone ends worse than exact backprop; chunks end closer to it (ours)."
    rule = "The gate's mean metric at the end is more than .01 worse than exact's, and that of chunks is better."
    gate, closer = results.worse(task, GATE), results.worse(task, CHUNK, GATE)
    parts = [f"{method.label}: {results.show(task, method)}" for method in results.methods(task)]
    agrees = None if gate is None or closer is None else gate > 0.01 and closer < 0
    return Claim(claim, f"{results.title(task)}: {'; '.join(parts)}{results.note(task)}", rule, agrees, limit=True)


EXPERIMENT = compared("gates", "Without strong directions", TASKS, _claim)
