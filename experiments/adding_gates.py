"""Beyond the paper: the gate alone, and in chunks, where `adding` takes strong directions in."""

from __future__ import annotations

from experiments.gates import without

TASKS = ("adding-256", "adding-256-lstm", "adding-256-wide")
EXPERIMENT = without("adding_gates", "Without strong directions on the adding problem", *TASKS)
