"""The experiments' data: batches of seed and step alone, and the real loaders on small files in the real formats."""

from __future__ import annotations

import errno
import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import LINES, cifar10, imagenet32, mnli, roberta, wikitext

from experiments.data import (
    Adding,
    Cifar10,
    DataError,
    Digits,
    Entailment,
    Examples,
    ImageNet32,
    Mnli,
    StandardLibrary,
    WikiText103,
)  # fmt: skip
from experiments.data.images import Prepared
from experiments.data.text import Characters, stretches

COUNTED = Examples((np.arange(10),), np.arange(10))


def seen(seed: int, steps: int, size: int = 4, start: int = 0) -> list[list[int]]:
    return [batch.targets.tolist() for batch in islice(COUNTED.batches(size, seed, start), steps)]


def test_batches_depend_on_seed_and_step():
    assert seen(0, 9)[5:] == seen(0, 4, start=5)
    assert seen(0, 5) != seen(1, 5)


def test_each_epoch_visits_all_in_another_order():
    flat = [target for batch in seen(3, 5) for target in batch]
    epochs = flat[:10], flat[10:]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_may_be_larger_than_the_data():
    counts = np.bincount(seen(0, 1, size=25)[0], minlength=10)
    assert sorted(counts.tolist()) == [2] * 5 + [3] * 5


def test_validation_is_in_order_and_whole():
    batches = list(COUNTED.once(4))
    assert [batch.targets.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0].inputs[0].dtype == np.int64


def test_normalised_images():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), np.uint8)
    (found,) = Prepared.of(images)((images,), None)
    np.testing.assert_allclose(found.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((0, 2, 3)), 1, atol=1e-5)
    (pixels,) = Prepared.of(images, pixels=True)((images,), None)
    np.testing.assert_array_equal(pixels[:, 7], found[:, :, 1, 2])


def test_augmented_images_are_shifted_and_flipped():
    images = np.zeros((400, 1, 8, 8), np.uint8)
    images[:, :, 4, 3:5] = [1, 2]
    prepare = Prepared(np.zeros((1, 1, 1)), np.ones((1, 1, 1)), False, 2)
    (found,) = prepare((images,), np.random.default_rng(0))
    places = [tuple(np.argwhere(image[0] == 1)[0]) for image in found]
    flips = [image[0, y, x + 1 if x < 7 else x] != 2 for image, (y, x) in zip(found, places, strict=True)]
    assert {y for y, _ in places} == {2, 3, 4, 5, 6}
    assert 120 < sum(flips) < 280
    assert (found.sum((1, 2, 3)) == 3).all()
    assert prepare((images,), None)[0].tolist() == images.tolist()


def test_characters_are_the_most_common():
    encode = Characters.of("banana, Ünan", 3)
    assert encode("nax Üa").tolist() == [1, 0, 2, 0]  # a, n, then the first of those that come once


def test_stretches_predict_the_next_symbol():
    examples = stretches(np.arange(11), 3)
    assert examples.inputs[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert examples.targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_adding():
    data = Adding(length=11, examples=30).load()
    (x,), targets = next(data.train.once(30))
    assert x.shape == (30, 11, 2)
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(1, keepdims=True), targets, rtol=1e-6)
    assert (x[:, :5, 1].sum(1) == 1).all()
    assert (x[:, 5:, 1].sum(1) == 1).all()


def meaning(tokens: list[int]) -> int:
    """The label of a pair by the rules, read from its tokens."""
    cut = tokens.index(2)
    told = {tokens[i + 2]: (tokens[i] == 3, tokens[i + 1]) for i in range(1, cut, 3)}
    number, thing = tokens[cut + 1 : cut + 3]
    if thing not in told:
        return 1
    exact, known = told[thing]
    return 0 if number <= known else 2 if exact else 1


def test_entailment():
    data = Entailment(examples=300).load()
    (ids, mask), labels = next(data.train.once(300))
    assert [meaning(row.tolist()) for row in ids] == labels.tolist()
    assert np.bincount(labels).tolist() == [100] * 3
    assert ((ids > 0) == mask).all()
    assert 0 < mask.mean() < 1


def test_digits():
    pytest.importorskip("sklearn")
    plain, pixels, pairs = (Digits(**how).load() for how in ({}, {"pixels": True}, {"pairs": True}))
    assert (len(plain.train), len(plain.validation)) == (1437, 360)
    (images,), labels = next(plain.train.once(8))
    (sequences,), _ = next(pixels.train.once(8))
    np.testing.assert_array_equal(sequences[..., 0], images.reshape(8, 64))
    (both,), classes = next(pairs.train.once(500))
    assert both.shape == (500, 1, 8, 16)
    single = {
        image.tobytes(): int(label) for image, label in zip(plain.train.inputs[0], plain.train.targets, strict=True)
    }
    raw = pairs.train.inputs[0][:500]
    assert [
        10 * single[image[..., :8].tobytes()] + single[image[..., 8:].tobytes()] for image in raw
    ] == classes.tolist()
    assert labels.max() < 10


def test_standard_library():
    task = StandardLibrary(vocabulary=20, length=16, size=20_000)
    data = task.load()
    (inputs,), targets = next(data.train.batches(3, 0))
    assert inputs.shape == targets.shape == (3, 16)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert max(inputs.max(), targets.max()) < 20
    assert 0 < len(data.validation) < len(data.train) / 10


# The real formats.


def sums(folder: Path, *paths: Path) -> None:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in paths]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_cifar10(hub, rng):
    images, labels = cifar10(hub, rng)
    data, pixels = Cifar10().load(hub), Cifar10(pixels=True).load(hub)
    mean, std = (getattr(images[:9], name)((0, 1, 2)) for name in ("mean", "std"))
    expected = (images[9:] - mean) / std
    (found,), targets = next(data.validation.once(3))
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert targets.tolist() == labels[9:]
    (sequences,), _ = next(pixels.validation.once(3))
    np.testing.assert_allclose(sequences, expected.reshape(3, 1024, 3), rtol=1e-4, atol=1e-5)
    assert len(data.train) == 9


def test_a_card_that_tells_of_other_rows(hub, rng):
    cifar10(hub, rng, told={"train": 50_000})
    with pytest.raises(DataError, match=r"uoft-cs/cifar10 cannot be read from .*50000.*; get it by: hf download"):
        Cifar10().load(hub)


def test_imagenet32(tmp_path, rng):
    _, images, labels = imagenet32(tmp_path, rng)
    data = ImageNet32().load(tmp_path)
    np.testing.assert_array_equal(data.train.inputs[0], images[:20].reshape(20, 3, 32, 32))
    np.testing.assert_array_equal(data.train.targets, labels[:20] - 1)
    (found,), targets = next(data.validation.once(2))
    assert found.shape == (2, 3, 32, 32)
    assert targets.tolist() == (labels[20:] - 1).tolist()
    assert abs(next(data.train.once(20)).inputs[0].mean()) < 1e-5


def test_broken_imagenet32(tmp_path, rng):
    folder, *_ = imagenet32(tmp_path, rng)
    path = folder / "Imagenet32_train_npz" / "train_data_batch_3.npz"
    whole = path.read_bytes()
    sums(folder, path)
    ImageNet32().load(tmp_path)
    path.write_bytes(whole.replace(whole[200:210], whole[200:210][::-1]))
    with pytest.raises(
        DataError, match=r"train_data_batch_3.npz has the SHA-256 checksum [0-9a-f]{64}, and .*SHA256SUMS"
    ):
        ImageNet32().load(tmp_path)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match=r"ImageNet32 cannot be read from .*CRC-32.*; get it by: unpacking"):
        ImageNet32().load(tmp_path)
    np.savez(path, data=np.zeros((2, 3072), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(DataError, match="labels from 0 to 1; the official file has 1 to 1000"):
        ImageNet32().load(tmp_path)
    np.savez(path, data=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([1, 1]))
    with pytest.raises(DataError, match=r"\(2, 32, 32, 3\); the official file has uint8 \(N, 3072\)"):
        ImageNet32().load(tmp_path)
    path.unlink()
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {path.relative_to(folder)}\n")
    with pytest.raises(DataError, match=r"train_data_batch_3.npz is missing, and .*SHA256SUMS lists it"):
        ImageNet32().load(tmp_path)


def test_wikitext_by_characters(hub):
    wikitext(hub)
    data = WikiText103(vocabulary=5, length=7).load(hub)
    text = "".join(LINES)
    common = sorted(set(text), key=lambda c: (-text.count(c), c))[:5]
    expected = [common.index(c) for c in text if c in common]
    assert data.train.inputs[0].ravel().tolist() == expected[: data.train.inputs[0].size]
    assert len(data.train) == (len(expected) - 1) // 7


def test_wikitext_by_words(hub):
    wikitext(hub)
    task = WikiText103(unit="words", vocabulary=300, length=7)
    first = task.load(hub)
    symbols = first.train.inputs[0].ravel()
    assert 256 <= symbols.max() < 300
    assert 7 * len(first.train) < len("".join(LINES).encode()) / 2
    (hub / "Salesforce").rename(hub / "elsewhere")
    again = task.load(hub)  # from what is kept
    assert again.train.inputs[0].ravel().tolist() == symbols.tolist()


def test_a_full_disk(hub, monkeypatch):
    wikitext(hub)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        DataError, match=r"^the disk is full, while wikitext-103-characters-5-train.npy is read or kept"
    ):
        WikiText103(vocabulary=5, length=7).load(hub)
    assert not list((hub / "made").iterdir())


def test_mnli(hub):
    pytest.importorskip("torch")
    roberta(hub)
    mnli(hub)
    data = Mnli(length=16).load(hub)
    (ids, mask), labels = next(data.validation.once(2))
    assert labels.tolist() == [0, 2]
    assert ids.shape == mask.shape == (2, 16)
    assert mask[1].all()
    short = ids[0][mask[0] == 1].tolist()
    assert short[0] == 0
    assert short.count(2) == 3  # <s> premise </s></s> hypothesis </s>
    assert (ids[0][mask[0] == 0] == 1).all()


@pytest.mark.parametrize("task", [Cifar10(), WikiText103(), Mnli()])
def test_nothing_there(hub, task):
    with pytest.raises(
        DataError, match=rf"is neither in {hub}/.* nor to be had \(.*\); get it by: hf download .* --repo"
    ):
        task.load(hub)


def test_no_imagenet32(tmp_path):
    with pytest.raises(DataError, match=rf"^ImageNet32 is neither in {tmp_path}/imagenet32 nor .*image-net.org"):
        ImageNet32().load(tmp_path)


def test_a_text_needs_a_stretch_and_one_more_symbol():
    assert stretches(np.arange(9), 8).targets.tolist() == [[*range(1, 9)]]
    for length in (0, 8):
        with pytest.raises(DataError, match=rf"a text of {length} symbols has no stretch of 8 and one more"):
            stretches(np.arange(length), 8)
