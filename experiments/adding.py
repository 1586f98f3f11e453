"""Beyond the paper: strong directions in the residual path, on the adding problem, whose dependencies are long."""

from __future__ import annotations

from experiments.ranks import FEW, compared

TASKS = dict.fromkeys(("adding-256", "adding-256-lstm", "adding-256-wide"), FEW)
EXPERIMENT = compared("adding", "Strong directions on the adding problem", TASKS)
