"""Pairs of sentences, the second entailed by the first, neutral or contradicted: MNLI, and a synthetic stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.examples import Array, Data, Examples, Task
from experiments.data.files import from_hub

ROBERTA = "FacebookAI/roberta-base"


@dataclass(frozen=True)
class Mnli(Task):
    """MultiNLI, by `datasets` (nyu-mll/glue), in RoBERTa's tokens: inputs (B, T) and their mask; 3 classes.

    392,702 pairs to train on, evaluated on the matched validation split. The paper's 433k pairs are all of MultiNLI's,
    the validation and test splits among them. Longer pairs are cut to ``length`` tokens.
    """

    title = "MNLI"
    length: int = 128

    @property
    def outputs(self) -> int:
        return 3

    def load(self, folder: Path | None = None) -> Data:
        from datasets import load_dataset
        from transformers import AutoTokenizer

        found = from_hub("nyu-mll/glue", folder, lambda name: load_dataset(name, "mnli"))
        tokenizer = from_hub(ROBERTA, folder, AutoTokenizer.from_pretrained)
        splits = []
        for split in ("train", "validation_matched"):
            rows = found[split]
            tokens = tokenizer(
                list(rows["premise"]), list(rows["hypothesis"]), max_length=self.length,
                truncation=True, padding="max_length", return_tensors="np",
            )  # fmt: skip
            ids, mask = tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(np.int8)
            splits.append(Examples((ids, mask), np.array(rows["label"])))
        return Data(*splits)


PADDING, START, SEPARATOR = range(3)
THINGS, COLOURS = 10, 6


@dataclass(frozen=True)
class Entailment(Task):
    """A synthetic stand-in for MNLI: a premise that colours some things, and a hypothesis on one thing.

    A thing and its colour are two tokens: ``<s> ball red box blue cup red </s> box blue``. The hypothesis is entailed
    where the premise gives the thing this colour, contradicted where another, neutral where it does not name the
    thing; each a third of the time. Premises have 2 to ``things`` things, so batches are padded and have a mask.
    """

    title = "synthetic entailment"
    things: int = 4
    examples: int = 20_000

    @property
    def outputs(self) -> int:
        return 3

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 3 + THINGS + COLOURS

    @property
    def length(self) -> int:
        """Tokens of the longest pair."""
        return 2 * self.things + 4

    def load(self, folder: Path | None = None) -> Data:
        return Data(self._drawn(self.examples, 0), self._drawn(1500, 1))

    def _drawn(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng([20260101, seed])
        labels = rng.integers(0, 3, count)
        ids = np.full((count, self.length), PADDING, np.int64)
        for row, label in zip(ids, labels, strict=True):
            tokens = self._pair(rng, label)
            row[: len(tokens)] = tokens
        return Examples((ids, (ids != PADDING).astype(np.int64)), labels)

    def _pair(self, rng: np.random.Generator, label: int) -> Array:
        """A pair's tokens; labels as MNLI's: 0 entailed, 1 neutral, 2 contradicted."""
        known = int(rng.integers(2, self.things + 1))
        things, colours = rng.permutation(THINGS), rng.integers(0, COLOURS, known)
        asked = int(rng.integers(0, known))
        colour = colours[asked] if label != 2 else (colours[asked] + rng.integers(1, COLOURS)) % COLOURS
        thing = things[known] if label == 1 else things[asked]
        premise = np.stack([things[:known] + 3, colours + 3 + THINGS], 1).ravel()
        return np.concatenate([[START], premise, [SEPARATOR], [thing + 3, colour + 3 + THINGS]])
