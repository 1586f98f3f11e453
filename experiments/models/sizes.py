"""The sizes of all models, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class ResNet:
    """A residual network of three stages of ``blocks`` layers on images (He et al., 2016; appendix G of the paper).

    Args:
        blocks: residual layers of a stage, so that L is three times as many, and 6 blocks + 2 layers have weights.
        preactivation: whether blocks begin with normalisation and ReLU (K = I); else the sum passes a ReLU (K = its
            mask).
        width: channels of the stream, and of the first stage's blocks; the others have twice and four times as many.
        channels, classes: of the images.
    """

    blocks: int
    preactivation: bool
    width: int = 16
    channels: int = 3
    classes: int = 10


@dataclass(frozen=True)
class ResidualMLP:
    """Pre-normalised residual layers of two linear maps each, on flat inputs: small enough to form all Jacobians.

    Args:
        blocks: residual layers, L.
        width: of the stream.
        inputs: numbers of an example, of whatever shape.
        classes: of the answers.
    """

    blocks: int
    width: int = 64
    inputs: int = 64
    classes: int = 10


@dataclass(frozen=True)
class RecurrentLM:
    """Embedding, recurrent layers, and a linear classifier of each step's h (an LSTM's c is not read)."""

    cell: Literal["gru", "lstm"]
    vocabulary: int
    hidden: int = 512
    layers: int = 1


@dataclass(frozen=True)
class RecurrentClassifier:
    """A linear map of each step's input, recurrent layers, and an MLP of two layers on the last state.

    Args:
        remembers: an LSTM starts out to forget after 2 to so many steps, by the biases of its forget and input gates
            (Tallec and Ollivier 2018, arXiv 1804.11188); without, as PyTorch starts it.
    """

    cell: Literal["gru", "lstm"]
    inputs: int
    outputs: int
    hidden: int = 64
    layers: int = 1
    remembers: int | None = None


@dataclass(frozen=True)
class GPT2:
    """A pre-norm transformer in the shape of GPT-2, attention and MLP as two layers of the stack, L = 2 ``layers``.

    The embedding is the classifier's weight too, as in GPT-2. At the paper's sizes (width 256, 12 layers, 16,000
    tokens, 256 positions) that makes 13.6M parameters, and 17.7M with weights of their own; its 14.5M are met by
    neither. Heads and dropout are not stated: heads of 32 and none.

    Args:
        damping: gamma of equation 17, 0.2 in the paper; 0 diverges there.
    """

    vocabulary: int
    length: int = 256
    width: int = 256
    heads: int = 8
    layers: int = 12
    damping: float = 0.2


@dataclass(frozen=True)
class Llama:
    """A Llama from `transformers`, converted; a decoder layer, of attention and MLP, is one layer of the stack."""

    vocabulary: int
    length: int = 256
    width: int = 64
    heads: int = 4
    layers: int = 8
    damping: float = 0.2


@dataclass(frozen=True)
class Roberta:
    """RoBERTa with a classifier, attention and feed-forward as two post-norm layers of the stack, L = 2 ``layers``.

    RoBERTa-base with three classes has 124.6M parameters, which the paper prints as 124M.

    Args:
        pretrained: a model of the Hugging Face hub, whose config then gives all sizes but ``classes``; None starts
            from random weights.
        damping: gamma of equation 23, 0.8 in the paper.
        dropout: of attention, feed-forward and embedding.
    """

    classes: int = 3
    pretrained: str | None = None
    vocabulary: int = 50_265
    length: int = 128
    width: int = 768
    heads: int = 12
    layers: int = 12
    damping: float = 0.8
    dropout: float = 0.1


Sizes = ResNet | ResidualMLP | RecurrentLM | RecurrentClassifier | GPT2 | Llama | Roberta


def build(sizes: Sizes, backend: str = "torch", **options: Any) -> Any:
    """The model of these sizes.

    Args:
        sizes: one of this module's values.
        backend: "torch" or "jax".
        **options: ``folder`` for pre-trained weights.

    Raises:
        ValueError: there is no such backend, or no such model for it.
        DataError: pre-trained weights cannot be read.
    """
    if backend not in ("torch", "jax"):
        raise ValueError(f"backend={backend!r}; give 'torch' or 'jax'")
    return import_module(f"experiments.models.{backend}").build(sizes, **options)
