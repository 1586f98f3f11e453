"""The paper's models (table 2) and smaller ones of the same kinds, made of hbp's own front ends.

Sizes are frozen values (`experiments.models.sizes`), so that the paper's and a laptop's model are two values of one
type, and this package imports no array library: ``build(sizes, "torch")`` is a `torch.nn.Module` called as
``model(*batch.inputs)``, with exact backprop until `hbp.backends.torch.configure` says otherwise; those of depth have
their layers in ``model.stack``. ``build(sizes, "jax")`` is an `experiments.models.jax.Model`, a pair of functions.
"""

from experiments.models.sizes import (
    GPT2,
    Llama,
    RecurrentClassifier,
    RecurrentLM,
    ResidualMLP,
    ResNet,
    Roberta,
    Sizes,
    build,
)

__all__ = [
    "GPT2",
    "Llama",
    "RecurrentClassifier",
    "RecurrentLM",
    "ResNet",
    "ResidualMLP",
    "Roberta",
    "Sizes",
    "build",
]
