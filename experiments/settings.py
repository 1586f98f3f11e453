"""Each model with the data it learns and how it is trained: tables 2, 4 and 5 of the paper, and scaled for a laptop.

``paper`` has the paper's values; where the paper is silent, what was chosen stands beside. ``laptop`` has models of the
same kinds, smaller, on data that need no network, with rates and steps chosen so that exact backprop learns each in
half a minute or so on one core: none of its numbers is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from experiments.data import Adding, Cifar10, Digits, Entailment, ImageNet32, Mnli, StandardLibrary, Task, WikiText103
from experiments.data.pairs import ROBERTA
from experiments.models import GPT2, Llama, RecurrentClassifier, RecurrentLM, ResidualMLP, ResNet, Roberta, Sizes

PRESETS = ("laptop", "paper")


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        optimizer: SGD with momentum, Adam, or AdamW; weight decay is of all parameters.
        rate: the largest learning rate.
        steps: of the optimizer, in all.
        batch: examples of a step.
        warmup: steps in which the rate grows linearly from 0.
        decay: "divided" divides the rate by 10 after a half and three quarters of the steps (He et al.); "cosine"
            falls to a tenth of it.
        momentum: also Adam's beta1.
        beta2: Adam's.
        weight_decay: of SGD and AdamW.
        clip: the largest norm of the gradient.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    rate: float
    steps: int
    batch: int
    warmup: int = 0
    decay: Literal["divided", "cosine"] = "cosine"
    momentum: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.decay == "divided":
            return self.rate * (1.0, 1.0, 0.1, 0.01)[min(3, 4 * step // self.steps)]
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Problem:
    """A model, what it learns, and how."""

    title: str
    """As pages name it."""
    task: Task
    sizes: Sizes
    training: Training


def epochs(count: float, examples: int, batch: int) -> int:
    """Steps of so many epochs."""
    return round(count * examples / batch)


def _sgd(steps: int) -> Training:
    """ResNets (table 4)."""
    return Training("sgd", 0.1, steps, 128, decay="divided", weight_decay=1e-4)


def _adam(steps: int) -> Training:
    """Recurrent models (table 5); betas are not stated there, and are Adam's own."""
    return Training("adam", 1e-3, steps, 128, warmup=steps // 10)


PAPER: dict[str, Callable[[], Problem]] = {
    "resnet32": lambda: Problem(
        "pre-activation ResNet32", Cifar10(), ResNet(5, preactivation=True), _sgd(epochs(200, 50_000, 128))
    ),
    "resnet110": lambda: Problem(
        "ResNet110", Cifar10(), ResNet(18, preactivation=False), _sgd(epochs(200, 50_000, 128))
    ),
    "resnet56": lambda: Problem(
        "ResNet56", ImageNet32(), ResNet(9, preactivation=False, classes=1000), _sgd(epochs(100, 1_281_167, 128))
    ),
    "gpt2": lambda: Problem(
        "GPT-2", WikiText103(unit="words", vocabulary=16_000), GPT2(16_000),
        Training("adamw", 1e-3, 20_000, 128, 2000, beta2=0.98, weight_decay=0.1, clip=1.0),  # 5.3 epochs
    ),
    "roberta": lambda: Problem(
        "RoBERTa", Mnli(), Roberta(pretrained=ROBERTA),
        Training("adamw", 3e-5, epochs(2, 392_702, 32), 32, 2500, weight_decay=0.1, clip=1.0),
    ),
    "lstm": lambda: Problem("LSTM, characters", WikiText103(), RecurrentLM("lstm", 210), _adam(10_000)),
    "gru": lambda: Problem("GRU, characters", WikiText103(), RecurrentLM("gru", 210), _adam(10_000)),
    "gru3": lambda: Problem(
        "GRU of 3 layers, words", WikiText103(unit="words", vocabulary=16_000),
        RecurrentLM("gru", 16_000, layers=3), _adam(10_000),
    ),
    "pixels": lambda: Problem(
        "GRU, pixel by pixel", Cifar10(pixels=True), RecurrentClassifier("gru", 3, 10), _adam(2500)
    ),
}  # fmt: skip
"""Tables 2, 4 and 5."""

CHARACTERS = StandardLibrary()
WORDS = StandardLibrary(unit="words", vocabulary=1000, length=64)


def _small_roberta(task: Entailment) -> Roberta:
    return Roberta(vocabulary=task.vocabulary, length=task.length, width=64, heads=4, layers=4, dropout=0.0)


LAPTOP: dict[str, Callable[[], Problem]] = {
    "resnet32": lambda: Problem(
        "pre-activation ResNet", Digits(), ResNet(5, preactivation=True, width=8, channels=1),
        Training("sgd", 0.1, 150, 32, decay="divided", weight_decay=1e-4),
    ),
    "resnet110": lambda: Problem(
        "ResNet, longer", Digits(), ResNet(9, preactivation=False, width=8, channels=1),
        Training("sgd", 0.02, 120, 32, decay="divided", weight_decay=1e-4),
    ),
    "resnet56": lambda: Problem(
        "ResNet, shorter", Digits(), ResNet(6, preactivation=False, width=8, channels=1),
        Training("sgd", 0.02, 120, 32, decay="divided", weight_decay=1e-4),
    ),
    "mlp": lambda: Problem(
        "residual MLP", Digits(), ResidualMLP(16), Training("adam", 2e-3, 300, 64, warmup=30),
    ),
    "gpt2": lambda: Problem(
        "GPT-2", WORDS, GPT2(1000, length=64, width=64, heads=4, layers=6),
        Training("adamw", 3e-3, 200, 8, 20, beta2=0.98, weight_decay=0.1, clip=1.0),
    ),
    "llama": lambda: Problem(
        "Llama", WORDS, Llama(1000, length=64, layers=6),
        Training("adamw", 3e-3, 200, 8, 20, beta2=0.98, weight_decay=0.1, clip=1.0),
    ),
    "roberta": lambda: Problem(
        "RoBERTa", Entailment(),
        _small_roberta(Entailment()),
        Training("adamw", 1e-3, 300, 32, 30, weight_decay=0.1, clip=1.0),
    ),
    "lstm": lambda: Problem(
        "LSTM, characters", CHARACTERS, RecurrentLM("lstm", 96, 96), Training("adam", 4e-3, 400, 16, warmup=40)
    ),
    "gru": lambda: Problem(
        "GRU, characters", CHARACTERS, RecurrentLM("gru", 96, 96), Training("adam", 4e-3, 400, 16, warmup=40)
    ),
    "gru3": lambda: Problem(
        "GRU of 3 layers, words", WORDS, RecurrentLM("gru", 1000, 96, layers=3),
        Training("adam", 3e-3, 300, 16, warmup=30),
    ),
    "pixels": lambda: Problem(
        "GRU, pixel by pixel", Digits(pixels=True), RecurrentClassifier("gru", 1, 10),
        Training("adam", 5e-3, 600, 64, warmup=60),
    ),
    "adding": lambda: Problem(
        "GRU, adding problem", Adding(100), RecurrentClassifier("gru", 2, 1), Training("adam", 5e-3, 600, 32, warmup=60)
    ),
    "gru-long": lambda: Problem(
        "GRU, characters, long", StandardLibrary(length=1024), RecurrentLM("gru", 96, 64),
        Training("adam", 4e-3, 200, 2, warmup=20, clip=1.0),
    ),
    "pixels-lstm": lambda: Problem(
        "LSTM, pixel by pixel", Digits(pixels=True), RecurrentClassifier("lstm", 1, 10),
        Training("adam", 5e-3, 600, 64, warmup=60, clip=1.0),
    ),
    "pixels-256": lambda: Problem(
        "GRU of 256 units, pixel by pixel", Digits(pixels=True), RecurrentClassifier("gru", 1, 10, 256),
        Training("adam", 3e-3, 300, 32, warmup=30, clip=1.0),
    ),
    "pixels-lstm-256": lambda: Problem(
        "LSTM of 256 units, pixel by pixel", Digits(pixels=True), RecurrentClassifier("lstm", 1, 10, 256),
        Training("adam", 3e-3, 300, 32, warmup=30, clip=1.0),
    ),
    "adding-256": lambda: Problem(
        "GRU, adding problem", Adding(256), RecurrentClassifier("gru", 2, 1),
        Training("adam", 5e-3, 400, 32, warmup=40, clip=1.0),
    ),
    "adding-256-wide": lambda: Problem(
        "GRU of 256 units, adding problem", Adding(256), RecurrentClassifier("gru", 2, 1, 256),
        Training("adam", 3e-3, 250, 8, warmup=25, clip=1.0),
    ),
    "adding-256-lstm": lambda: Problem(
        "LSTM, adding problem", Adding(256), RecurrentClassifier("lstm", 2, 1, remembers=256),
        Training("adam", 6e-3, 900, 32, warmup=75, clip=0.3),
    ),
    "adding-256-wide-lstm": lambda: Problem(
        "LSTM of 256 units, adding problem", Adding(256), RecurrentClassifier("lstm", 2, 1, 256, remembers=256),
        Training("adam", 2e-3, 700, 8, warmup=70, clip=0.3),
    ),
}  # fmt: skip
"""Models of the same kinds on data that need no network, and those that the paper has not."""


def problem(name: str, preset: str = "laptop") -> Problem:
    """The problem of this name in a preset; those that the paper has not are the laptop's in both.

    Raises:
        ValueError: there is no such name or preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}; give one of {', '.join(PRESETS)}")
    known = LAPTOP | (PAPER if preset == "paper" else {})
    if name not in known:
        raise ValueError(f"there is no problem {name!r}; give one of {', '.join(known)}")
    return known[name]()
