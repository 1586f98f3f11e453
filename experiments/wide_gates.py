"""Beyond the paper: the gate alone, and in chunks, where `wide` takes strong directions in."""

from __future__ import annotations

from experiments.gates import without

EXPERIMENT = without("wide_gates", "A wide LSTM on the adding problem without them", "adding-256-wide-lstm")
