"""The paper's data sets and its pre-trained model, small, in the formats of the hub and of image-net.org."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def parquet(folder: Path, config: str, splits: dict[str, Any], told: Any = None, features: str = "") -> None:
    """A data set as the hub has it: a card that lists the files and their rows, and Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, info = [], []
    for split, columns in splits.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        rows = (told or {}).get(split, len(next(iter(columns.values()))))
        lines.append(f"  - split: {split}\n    path: {config}/{split}-*")
        info.append(f"  - name: {split}\n    num_bytes: {path.stat().st_size}\n    num_examples: {rows}")
    files = f"configs:\n- config_name: {config}\n  data_files:\n" + "\n".join(lines)
    sizes = f"dataset_info:\n- config_name: {config}\n{features}  splits:\n" + "\n".join(info)
    (folder / "README.md").write_text(f"---\n{sizes}\n{files}\n---\n")


def png(image: np.ndarray) -> bytes:
    image_of = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image_of.fromarray(image).save(file, "png")
    return file.getvalue()


def cifar10(hub: Path, rng: np.random.Generator, **options: Any) -> tuple[np.ndarray, list[int]]:
    images, labels = rng.integers(0, 256, (12, 32, 32, 3), np.uint8), [int(label) for label in rng.integers(0, 10, 12)]
    rows = [{"bytes": png(image), "path": None} for image in images]
    splits = {"train": {"img": rows[:9], "label": labels[:9]}, "test": {"img": rows[9:], "label": labels[9:]}}
    features = "  features:\n  - name: img\n    dtype: image\n  - name: label\n    dtype: int64\n"
    parquet(hub / "uoft-cs/cifar10", "plain_text", splits, features=features, **options)
    return images, labels


def imagenet32(hub: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray, np.ndarray]:
    images, labels = rng.integers(0, 256, (22, 3072), np.uint8), rng.integers(1, 1001, 22)
    names = [f"Imagenet32_train_npz/train_data_batch_{i}.npz" for i in range(1, 11)] + [
        "Imagenet32_val_npz/val_data.npz"
    ]
    for i, name in enumerate(names):
        path = hub / "imagenet32" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, data=images[2 * i : 2 * i + 2], labels=labels[2 * i : 2 * i + 2], mean=np.zeros(3072))
    return hub / "imagenet32", images, labels


LINES = [" = A title = \n", " The cat sat on the mat , the cat .\n", "", " Zürich is a town .\n"] * 30


def wikitext(hub: Path, times: int = 1) -> None:
    """All lines to train on, some to validate on; each so many times."""
    splits = {"train": {"text": LINES * times}, "validation": {"text": LINES[:8] * times}, "test": {"text": LINES[:4]}}
    parquet(hub / "Salesforce/wikitext", "wikitext-103-raw-v1", splits)


def roberta(hub: Path, positions: int = 20) -> Any:
    """A tiny pre-trained model with its tokenizer, as the hub has them."""
    transformers: Any = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    folder = hub / "FacebookAI/roberta-base"
    folder.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(LINES, 300, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=positions, type_vocab_size=1,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def mnli(hub: Path) -> None:
    """Two pairs, the second a long one."""
    rows = {
        "premise": ["the cat sat", "on the mat " * 9],
        "hypothesis": ["a cat", "Zürich"],
        "label": [0, 2],
        "idx": [0, 1],
    }
    kinds = ("train", "validation_matched", "validation_mismatched", "test_matched")
    parquet(hub / "nyu-mll/glue", "mnli", dict.fromkeys(kinds, rows))
