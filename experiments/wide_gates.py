"""Beyond the paper: the gate alone, and in chunks, on the task of `wide`."""

from __future__ import annotations

from experiments.gates import without

EXPERIMENT = without("wide_gates", "Without strong directions: a wide LSTM", "adding-256-wide-lstm")
