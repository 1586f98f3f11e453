"""Beyond the paper: the gate alone, and in chunks, where `wide` takes strong directions in."""

from __future__ import annotations

from experiments.gates import without

TITLE = "Without strong directions: a wide LSTM on the adding problem"
EXPERIMENT = without("wide_gates", TITLE, "adding-256-wide-lstm")
