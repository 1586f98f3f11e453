"""Images: CIFAR-10, ImageNet32, and scikit-learn's digits in their stead; as planes or as sequences of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.examples import Array, Data, Examples, Inputs, Task
from experiments.data.files import DataError, check_sums, default_folder, from_hub, sentences


@dataclass(frozen=True)
class Prepared:
    """Bytes (B, C, H, W) to float32 of zero mean and unit variance, augmented in training.

    Args:
        mean, std: of each channel, over the training images.
        pixels: give sequences (B, H W, C), row after row, as the Long Range Arena does.
        padding: in training, crop at random from images padded by so many pixels, and flip left and right at random
            (He et al.); 0 does neither.
    """

    mean: Array
    std: Array
    pixels: bool
    padding: int

    @classmethod
    def of(cls, images: Array, pixels: bool = False, padding: int = 0) -> Prepared:
        """With the statistics of these images, of all of them or evenly spread 50,000."""
        some = images[:: max(1, len(images) // 50_000)]
        moments = [(channel.mean(dtype=np.float64), channel.std(dtype=np.float64)) for channel in some.swapaxes(0, 1)]
        mean, std = np.array(moments, np.float32).T.reshape(2, -1, 1, 1)
        return cls(mean, np.maximum(std, 1e-6), pixels, padding)

    def __call__(self, inputs: Inputs, rng: np.random.Generator | None) -> Inputs:
        (images,) = inputs
        if rng is not None and self.padding:
            images = _cropped_and_flipped(images, self.padding, rng)
        images = (images.astype(np.float32) - self.mean) / self.std
        return (images.reshape(*images.shape[:2], -1).swapaxes(1, 2) if self.pixels else images,)


def _cropped_and_flipped(images: Array, padding: int, rng: np.random.Generator) -> Array:
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    places, flips = rng.integers(0, 2 * padding + 1, (len(images), 2)), rng.random(len(images)) < 0.5
    cropped = np.stack([
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, places, strict=True)
    ])  # fmt: skip
    return np.where(flips[:, None, None, None], cropped[..., ::-1], cropped)


@dataclass(frozen=True)
class Cifar10(Task):
    """CIFAR-10: 50,000 and 10,000 images of 32 x 32, by `datasets` (uoft-cs/cifar10).

    Images are augmented, sequences of ``pixels`` are not; the paper augments "for ResNets".
    """

    title = "CIFAR-10"
    pixels: bool = False

    @property
    def outputs(self) -> int:
        return 10

    def load(self, folder: Path | None = None) -> Data:
        from datasets import load_dataset

        found = from_hub("uoft-cs/cifar10", folder, load_dataset)
        splits = []
        for split in ("train", "test"):
            rows = found[split]
            images = np.stack([np.asarray(image.convert("RGB")) for image in rows["img"]]).transpose(0, 3, 1, 2)
            splits.append((images, np.array(rows["label"])))
        prepare = Prepared.of(splits[0][0], self.pixels, 0 if self.pixels else 4)
        return Data(*(Examples((images,), labels, prepare) for images, labels in splits))

    def made_up(self, count: int) -> Data:
        return _noise(count, self.outputs, self.pixels, 0 if self.pixels else 4)


@dataclass(frozen=True)
class ImageNet32(Task):
    """ImageNet at 32 x 32 (Chrabaszcz et al., 2017), from the official npz files.

    They need an account at image-net.org and lie in ``folder/imagenet32``, as the archives unpack:
    ``Imagenet32_train_npz/train_data_batch_1.npz`` to ``_10.npz`` and ``Imagenet32_val_npz/val_data.npz``, each with
    ``data`` (N, 3072) of bytes, channels first, and ``labels`` from 1 to 1000. No checksums are published; each array's
    own (CRC-32) is compared when it is read, and a ``SHA256SUMS`` beside the folders before.
    """

    title = "ImageNet32"

    @property
    def outputs(self) -> int:
        return 1000

    def load(self, folder: Path | None = None) -> Data:
        place = (folder or default_folder()) / "imagenet32"
        cure = f"unpacking Imagenet32_train_npz.zip and Imagenet32_val_npz.zip of image-net.org into {place}"
        with sentences("ImageNet32", place, cure):
            check_sums(place)
            train = _joined([place / "Imagenet32_train_npz" / f"train_data_batch_{i}.npz" for i in range(1, 11)])
            validation = _joined([place / "Imagenet32_val_npz" / "val_data.npz"])
        prepare = Prepared.of(train[0], padding=4)
        return Data(*(Examples((images,), labels, prepare) for images, labels in (train, validation)))

    def made_up(self, count: int) -> Data:
        return _noise(count, self.outputs, padding=4)


def _noise(count: int, classes: int, pixels: bool = False, padding: int = 0) -> Data:
    """Random images of 32 x 32, of random classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, classes, count)
    examples = Examples((images,), labels, Prepared.of(images, pixels, padding))
    return Data(examples, examples)


def _joined(paths: list[Path]) -> tuple[Array, Array]:
    parts = [_npz(path) for path in paths]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels


def _npz(path: Path) -> tuple[Array, Array]:
    with np.load(path) as file:
        images, labels = file["data"], file["labels"].astype(np.int64)
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise DataError(f"{path} has data {images.dtype} {images.shape}; the official file has uint8 (N, 3072)")
    if labels.min() < 1 or labels.max() > 1000:
        raise DataError(f"{path} has labels from {labels.min()} to {labels.max()}; the official file has 1 to 1000")
    return images.reshape(-1, 3, 32, 32), labels - 1


@dataclass(frozen=True)
class Digits(Task):
    """Scikit-learn's 1797 digits of 8 x 8, 360 of them for validation: the stand-in for CIFAR-10 and ImageNet32.

    Args:
        pixels: sequences (B, 64, 1) of pixels.
        pairs: two digits side by side, 8 x 16, of 100 classes; 10,000 pairs of the training images and 2,000 of the
            others, always the same.
    """

    title = "digits"
    pixels: bool = False
    pairs: bool = False

    @property
    def outputs(self) -> int:
        return 100 if self.pairs else 10

    def load(self, folder: Path | None = None) -> Data:
        from sklearn.datasets import load_digits

        flat, labels = load_digits(return_X_y=True)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(labels))
        images, labels = flat.astype(np.uint8).reshape(-1, 1, 8, 8)[order], labels[order]
        splits = [(images[360:], labels[360:]), (images[:360], labels[:360])]
        if self.pairs:
            splits = list(_paired(splits, rng))
        prepare = Prepared.of(splits[0][0], self.pixels)
        return Data(*(Examples((images,), labels, prepare) for images, labels in splits))


def _paired(splits: list[tuple[Array, Array]], rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    for (images, labels), count in zip(splits, (10_000, 2_000), strict=True):
        left, right = rng.integers(0, len(labels), (2, count))
        yield np.concatenate([images[left], images[right]], 3), 10 * labels[left] + labels[right]
