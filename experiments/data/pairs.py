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
        tokenizer = from_hub(ROBERTA, folder, AutoTokenizer.from_pretrained, "model")
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

    def made_up(self, count: int) -> Data:
        rng = np.random.default_rng(0)
        ids = rng.integers(4, 1000, (count, self.length))  # of RoBERTa's tokens the first four are signs
        examples = Examples((ids, np.ones_like(ids)), rng.integers(0, self.outputs, count))
        return Data(examples, examples)


PADDING, START, SEPARATOR, EXACTLY, AT_LEAST = range(5)
NUMBERS, THINGS = 5, 6


@dataclass(frozen=True)
class Entailment(Task):
    """A synthetic stand-in for MNLI: how many there are of some things, and whether there are so many of one.

    ``<s> exactly 5 balls at-least 2 cups </s> 4 balls``: premises tell of 1 to ``known`` things, hypotheses say that
    there are at least so many of one. Entailed is what holds in any case; contradicted what is more than an exact
    number; neutral what is more than a least number, or of another thing. Each is a third of the pairs. They are of
    several lengths, so batches are padded and have a mask.
    """

    title = "synthetic entailment"
    known: int = 2
    examples: int = 20_000

    @property
    def outputs(self) -> int:
        return 3

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 5 + NUMBERS + THINGS

    @property
    def length(self) -> int:
        """Tokens of the longest pair."""
        return 3 * self.known + 4

    def load(self, folder: Path | None = None) -> Data:
        return Data(self._drawn(self.examples, 0), self._drawn(1500, 1))

    def _drawn(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng([20260101, seed])
        pairs = [np.empty((0, self.length), np.int64)] * 3
        while min(map(len, pairs)) < -(-count // 3):
            ids, labels = self._any(count, rng)
            pairs = [np.concatenate([some, ids[labels == label]]) for label, some in enumerate(pairs)]
        ids = np.stack([some[: -(-count // 3)] for some in pairs], 1).reshape(-1, self.length)[:count]
        return Examples((ids, (ids != PADDING).astype(np.int64)), np.arange(count) % 3)

    def _any(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Pairs with labels as MNLI's (0 entailed, 1 neutral, 2 contradicted), not of equal shares."""
        rows, told = np.arange(count), rng.integers(1, self.known + 1, count)
        things = rng.permuted(np.tile(np.arange(THINGS), (count, 1)), axis=1)
        kinds, numbers = rng.integers(EXACTLY, AT_LEAST + 1, things.shape), rng.integers(0, NUMBERS, things.shape)
        asked, number = rng.integers(0, self.known + 1, count), rng.integers(0, NUMBERS, count)
        more, exact = number > numbers[rows, asked], kinds[rows, asked] == EXACTLY
        labels = np.where(asked >= told, 1, np.where(~more, 0, np.where(exact, 2, 1)))
        premises = np.stack([kinds, 5 + numbers, 5 + NUMBERS + things], 2).reshape(count, -1)
        ids, ends = np.full((count, self.length), PADDING), 1 + 3 * told
        ids[:, 0] = START
        ids[:, 1 : 1 + 3 * self.known] = premises[:, : 3 * self.known]
        ids[np.arange(self.length) >= ends[:, None]] = PADDING
        for place, token in enumerate((SEPARATOR, 5 + number, 5 + NUMBERS + things[rows, asked])):
            ids[rows, ends + place] = token
        return ids, labels
