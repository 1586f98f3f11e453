"""Beyond the paper: strong directions in the residual path of an LSTM of 256 units, on the adding problem."""

from __future__ import annotations

from experiments.ranks import FEW, compared

EXPERIMENT = compared("wide", "Strong directions of a wide LSTM on the adding problem", {"adding-256-wide-lstm": FEW})
