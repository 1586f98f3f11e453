"""Figure 4: what recurrent models learn with k iterations."""

from __future__ import annotations

from experiments.against_k import Axes, experiment

CLAIMS = {
    "lstm": ("Character LSTM (L = 256): about 5 iterations are enough.", 5),
    "gru": ("Character GRU (L = 256): about 5 iterations are enough.", 5),
    "gru3": ("GRU of three layers on words: close to backprop at a very low k (its axis ends at 3).", 3),
    "pixels": ("Pixel GRU (L = 1024): k = 10 reaches backprop's accuracy.", 10),
}
FULL = ((0, 1, 2, 3, 5, 7, 10),) * 2
AXES: dict[str, Axes] = {
    "laptop": {**dict.fromkeys(("lstm", "gru", "gru3"), ((0, 1, 3), (3,))), "pixels": ((0, 1, 3, 10), (3,))},
    "paper": {"lstm": FULL, "gru": FULL, "gru3": ((0, 1, 2, 3),) * 2, "pixels": FULL},
}
EXPERIMENT = experiment(
    "fig4",
    "Figure 4: recurrent models, against k",
    AXES,
    CLAIMS,
    "Highway-BP constantly outperforms the fixed point at equal k.",
)
