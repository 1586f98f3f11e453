"""Beyond the paper: strong directions in the residual path, on the adding problem, whose dependencies are long."""

from __future__ import annotations

from experiments.ranks import AUTO, EXACT, FEW, GATE, RANK, compared

TASKS = {"adding-256": (EXACT, GATE, RANK, AUTO), "adding-256-lstm": FEW, "adding-256-wide": FEW}
EXPERIMENT = compared("adding", "Strong directions on the adding problem", TASKS)
