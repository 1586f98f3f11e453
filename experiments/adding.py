"""Beyond the paper: strong directions in the residual path, on the adding problem, whose dependencies are long."""

from __future__ import annotations

from experiments.ranks import EVERY, SHORT, WIDE, compared

TASKS = {"adding-256": EVERY, "adding-256-lstm": SHORT, "adding-256-wide": WIDE}
EXPERIMENT = compared("adding", "Strong directions on the adding problem", TASKS)
