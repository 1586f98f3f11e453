"""Beyond the paper: the gate alone, and in chunks, on the tasks of `adding`."""

from __future__ import annotations

from experiments.adding import TASKS
from experiments.gates import without

EXPERIMENT = without("adding_gates", "Without strong directions on the adding problem", *TASKS)
