"""Figure 2: what models of depth learn with k iterations."""

from __future__ import annotations

from experiments.against_k import Axes, experiment

CLAIMS = {
    "resnet32": ("ResNet32 on CIFAR10 needs 3 to 4 iterations (L = 15).", 4),
    "resnet110": ("ResNet110 at k = 4 matches backprop (L = 54).", 4),
    "resnet56": ("ResNet56 on ImageNet32: about 5 iterations are enough.", 5),
    "gpt2": ("GPT-2 with gamma = 0.2: about 5 iterations are enough.", 5),
    "roberta": ("RoBERTa fine-tuned with gamma = 0.8: about 5 iterations are enough.", 5),
}
RESNET = ((0, 1, 2, 3, 4, 5, 6, 7),) * 2
AXES: dict[str, Axes] = {
    "laptop": dict.fromkeys(CLAIMS, ((0, 1, 3), (3,))),
    "paper": {
        "resnet32": RESNET,
        "resnet110": RESNET,
        "resnet56": RESNET,
        "gpt2": ((0, 1, 2, 3, 4, 5),) * 2,
        "roberta": ((0, 1, 2, 3, 5, 7, 10),) * 2,
    },
}
EXPERIMENT = experiment(
    "fig2",
    "Figure 2: models of depth, against k",
    AXES,
    CLAIMS,
    "Highway-BP outperforms the fixed-point iteration at the same k.",
)
