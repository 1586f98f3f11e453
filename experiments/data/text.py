"""Text, by characters or words: WikiText-103, and the sources of Python's standard library in its stead."""

from __future__ import annotations

import sysconfig
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.data.examples import Array, Data, Examples, Task
from experiments.data.files import DataError, from_hub, kept

PIECE = 10_000_000
"""Characters that are encoded at a time."""


@dataclass(frozen=True)
class Text(Task):
    """Predicting each next symbol of a text: inputs (B, T) and targets (B, T), one symbol later.

    The text is cut into stretches of T symbols, which an epoch visits once each, in random order; states do not pass
    from one to another.

    Args:
        unit: "characters": the most common ones, rarer ones being left out; "words": byte-level BPE, trained on the
            training text as GPT-2's tokenizer is.
        vocabulary: how many there are.
        length: T.
    """

    metric = "perplexity"
    unit: Literal["characters", "words"] = "characters"
    vocabulary: int = 210
    length: int = 256

    @property
    def outputs(self) -> int:
        return self.vocabulary

    @abstractmethod
    def texts(self, folder: Path | None) -> tuple[str, str]:
        """The text to train on and that to validate on."""

    def load(self, folder: Path | None = None) -> Data:
        return Data(*(stretches(symbols, self.length) for symbols in self.encoded(folder)))

    def made_up(self, count: int) -> Data:
        symbols = np.random.default_rng(0).integers(0, self.vocabulary, count * self.length + 1)
        return Data(*[stretches(symbols, self.length)] * 2)

    def encoded(self, folder: Path | None) -> tuple[Array, Array]:
        """Both texts as symbols."""
        train, validation = self.texts(folder)
        encode = {"characters": Characters, "words": Words}[self.unit].of(train, self.vocabulary)
        return encode(train), encode(validation)


def stretches(symbols: Array, length: int) -> Examples:
    """Stretches of ``length`` symbols, each beside the same one symbol later."""
    count = (len(symbols) - 1) // length
    if count < 1:
        raise DataError(f"a text of {len(symbols)} symbols has no stretch of {length} and one more; give a longer one")
    inputs, targets = (symbols[i : i + count * length].reshape(count, length) for i in (0, 1))
    return Examples((inputs,), targets)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


class Characters:
    """The most common characters of a text, numbered from the most common on."""

    def __init__(self, characters: str) -> None:
        codes = _codes(characters)
        self._numbers = np.full(0x110000, -1, np.int16)
        self._numbers[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, text: str, count: int) -> Characters:
        """The ``count`` most common characters of a text; of equally common ones, the first of Unicode."""
        counts = np.zeros(0x110000, np.int64)
        for piece in _pieces(text):
            counts += np.bincount(_codes(piece), minlength=len(counts))
        order = np.argsort(-counts, kind="stable")[:count]
        return cls("".join(map(chr, order[counts[order] > 0])))

    def __call__(self, text: str) -> Array:
        parts = [self._numbers[_codes(piece)] for piece in _pieces(text)]
        return np.concatenate([part[part >= 0].astype(np.uint8) for part in parts])


def _codes(text: str) -> Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class Words:
    """A byte-level BPE trained on a text, as GPT-2's tokenizer was."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, text: str, count: int) -> Words:
        """One of ``count`` symbols, the 256 bytes among them."""
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(_lines(text), count, min_frequency=2, show_progress=False)
        return cls(tokenizer)

    def __call__(self, text: str) -> Array:
        parts = (self._tokenizer.encode_batch(_lines(piece)) for piece in _pieces(text))
        return np.concatenate([np.array(line.ids, np.uint16) for part in parts for line in part])


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@dataclass(frozen=True)
class WikiText103(Text):
    """WikiText-103 (raw), by `datasets` (Salesforce/wikitext); its validation split validates.

    The symbols are kept in the folder, since making them takes minutes.
    """

    title = "WikiText-103"

    def texts(self, folder: Path | None) -> tuple[str, str]:
        from datasets import load_dataset

        found = from_hub("Salesforce/wikitext", folder, lambda name: load_dataset(name, "wikitext-103-raw-v1"))
        return tuple(_joined(found[split]["text"]) for split in ("train", "validation"))

    def encoded(self, folder: Path | None) -> tuple[Array, Array]:
        made: list[tuple[Array, Array]] = []

        def make(split: int) -> Array:
            if not made:
                made.append(super(WikiText103, self).encoded(folder))
            return made[0][split]

        names = (f"wikitext-103-{self.unit}-{self.vocabulary}-{split}" for split in ("train", "validation"))
        train, validation = (kept(name, folder, lambda i=i: make(i)) for i, name in enumerate(names))
        return train, validation


def _joined(rows: Iterable[str]) -> str:
    return "".join(rows)


@dataclass(frozen=True)
class StandardLibrary(Text):
    """The modules of Python's standard library, in an order shuffled once; a twentieth of the text validates.

    Args:
        size: characters in all; the library has some millions, not the same in each version of Python.
    """

    title = "standard library"
    vocabulary: int = 96
    length: int = 128
    size: int = 2_000_000

    def texts(self, folder: Path | None) -> tuple[str, str]:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        order = np.random.default_rng(0).permutation(len(paths))
        text = "".join(paths[i].read_text("utf-8", "replace") for i in order)[: self.size]
        cut = len(text) * 19 // 20
        return text[:cut], text[cut:]
