"""The experiments' models: the parameter counts of the paper's table 2, and gradients exact when they should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experiments.data import Adding, Batch, Digits, StandardLibrary
from experiments.models import (
    GPT2,
    Llama,
    RecurrentClassifier,
    RecurrentLM,
    ResidualMLP,
    ResNet,
    Roberta,
    build,
)  # fmt: skip
from experiments.settings import LAPTOP, PAPER, Training, problem

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")

from experiments.models import torch as models  # noqa: E402 - needs torch

TABLE_2 = {
    "resnet32": "464k", "resnet110": "1.7M", "resnet56": "917k", "lstm": "2.3M", "gru": "1.8M", "gru3": "21.1M",
    "pixels": "29.8k", "roberta": "124M",
}  # fmt: skip


def on_paper(name: str) -> Any:
    """The paper's model without its numbers, of a RoBERTa not those of the hub."""
    sizes = problem(name, "paper").sizes
    with torch.device("meta"):
        return build(replace(sizes, pretrained=None) if isinstance(sizes, Roberta) else sizes)


def printed(count: int, like: str) -> str:
    digits = len(like[:-1].partition(".")[2])
    return f"{count / {'k': 1e3, 'M': 1e6}[like[-1]]:.{digits}f}{like[-1]}"


@pytest.mark.parametrize("name", TABLE_2)
def test_parameters_of_table_2(name):
    if name == "roberta":
        pytest.importorskip("transformers")
    assert printed(models.trained(on_paper(name)), TABLE_2[name]) == TABLE_2[name]


def test_parameters_that_the_paper_prints_otherwise():
    assert printed(models.trained(on_paper("gpt2")), "14.5M") == "13.6M"


@pytest.mark.parametrize(("name", "layers"), [("resnet32", 15), ("resnet110", 54), ("resnet56", 27), ("gpt2", 24)])
def test_layers_of_table_2(name, layers):
    assert len(on_paper(name).stack) == layers


@pytest.mark.parametrize("preset", [PAPER, LAPTOP])
def test_models_answer_what_their_tasks_ask(preset):
    for name, made in preset.items():
        sizes: Any = made().sizes
        answers = sizes.classes if hasattr(sizes, "classes") else getattr(sizes, "outputs", None) or sizes.vocabulary
        assert answers == made().task.outputs, name


IMAGES, SYMBOLS = (torch.randn(4, 1, 8, 8),), (torch.arange(4 * 12).reshape(4, 12) % 17 + 3,)
MASKED = (*SYMBOLS, (torch.arange(12) < torch.tensor([[12], [9], [7], [12]])).long())
SMALL = {
    "pre-activation": (ResNet(2, True, 4, 1), IMAGES, 6),
    "post-activation": (ResNet(2, False, 4, 1), IMAGES, 6),
    "mlp": (ResidualMLP(4, 8), IMAGES, 4),
    "gru": (RecurrentLM("gru", 20, 8, 2), SYMBOLS, 12),
    "lstm": (RecurrentLM("lstm", 20, 8, 2), SYMBOLS, 12),
    "classifier": (RecurrentClassifier("gru", 2, 3, 8), (torch.randn(4, 12, 2),), 12),
    "gpt2": (GPT2(20, 12, 16, 2, 2), SYMBOLS, 4),
    "llama": (Llama(20, 12, 16, 2, 3), SYMBOLS, 3),
    "roberta": (Roberta(3, None, 20, 12, 16, 2, 2, dropout=0.0), MASKED, 4),
}


def small(name: str) -> tuple[Any, Any, int]:
    if name in ("llama", "roberta"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes, inputs, length = SMALL[name]
    return build(sizes).double(), tuple(x.double() if x.is_floating_point() else x for x in inputs), length


def gradient(model: Any, inputs: Any, k: int | None) -> Any:
    hb.set_iterations(model, k)
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_exact_from_the_number_of_layers_on(name):
    model, inputs, length = small(name)
    exact = gradient(model, inputs, None)
    errors = [float((gradient(model, inputs, k) - exact).norm() / exact.norm()) for k in (length, length // 2 - 1, 0)]
    assert errors[0] < 1e-12
    assert errors[1] > 1e-9
    assert errors[2] > 1e-3


def test_recurrent_layers_have_one_bias():
    model, *_ = small("gru")
    found = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert found == {"layers.0.bias_hh_l0", "layers.1.bias_hh_l0"}
    assert all(not p.any() for p in model.parameters() if not p.requires_grad)
    assert all(p.any() for p in model.parameters() if p.requires_grad)


def test_an_lstm_may_start_out_to_remember():
    """Forget gates that keep a state for 2 to T steps, 1 / (1 - sigmoid(b)), evenly, and input gates that let as little
    in.
    """
    layer = build(RecurrentClassifier("lstm", 2, 1, 400, remembers=50)).layers[0]
    enters, forgets = layer.bias_ih_l0.detach()[:800].view(2, 400)
    kept = 1 / (1 - forgets.sigmoid())
    assert 2 <= kept.min() < 4 < 48 < kept.max() <= 50
    assert abs(kept.mean() - 26) < 3
    assert torch.equal(enters, -forgets)


def test_damping_of_the_paper():
    assert [on_paper(name).stack.damping for name in ("gpt2", "resnet110")] == [0.2, 0]
    pytest.importorskip("transformers")
    assert on_paper("roberta").stack.damping == 0.8


@pytest.mark.parametrize("name", ["gpt2", "llama", "gru", "lstm"])
def test_language_models_do_not_look_ahead(name):
    model, (symbols,), _ = small(name)
    changed = symbols.clone()
    changed[:, 7] = 4
    difference = (model(changed) - model(symbols)).abs().amax(-1)
    assert (difference[:, :7] == 0).all()
    assert (difference[:, 7:] > 0).all()


def test_roberta_is_that_of_transformers(monkeypatch):
    pytest.importorskip("transformers")
    from experiments.models.torch import transformer

    made, own = [], transformer._roberta
    monkeypatch.setattr(transformer, "_roberta", lambda *given: made.append(own(*given)) or made[0])
    model, (tokens, mask), _ = small("roberta")
    expected = made[0](input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(model(tokens, mask), expected, rtol=1e-10, atol=1e-12)


def test_pretrained_roberta(tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=14, type_vocab_size=1,
    )  # fmt: skip
    saved = transformers.RobertaForMaskedLM(config)
    saved.save_pretrained(tmp_path / "FacebookAI/roberta-base")
    model = build(problem("roberta", "paper").sizes, folder=tmp_path)
    assert len(model.stack) == 6
    written = model.stack[3].block.read.dense.weight
    torch.testing.assert_close(written, saved.roberta.encoder.layer[1].intermediate.dense.weight)
    assert model(*MASKED).shape == (4, 3)


def test_losses_and_metrics():
    class Given(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], np.float32))
    batches = [Batch((logits,), np.array([[0, -100]])), Batch((logits,), np.array([[1, 1]]))]
    mean = -np.log([0.5, 0.25, 0.8]).mean()
    found = models.validate(StandardLibrary(vocabulary=3), Given(), batches)
    assert found == pytest.approx({"loss": mean, "perplexity": np.exp(mean)})
    found = models.validate(Digits(), Given(), batches)
    assert found == pytest.approx({"loss": mean, "accuracy": 2 / 3})
    far = [Batch((np.array([[0, 1e4]], np.float32),), np.array([0]))]
    assert models.validate(Digits(), Given(), far) == {"loss": 1e4, "accuracy": 0}
    assert models.validate(StandardLibrary(), Given(), far) == {"loss": 1e4, "perplexity": np.inf}
    numbers = [Batch((np.array([[1.0], [2.0]], np.float32),), np.array([[1.0], [5.0]], np.float32))]
    assert models.validate(Adding(), Given(), numbers) == {"loss": 4.5}


def test_rates():
    cosine = Training("adam", 2.0, steps=110, batch=1, warmup=10)
    assert [cosine.rate_at(step) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.2, 1, 2, 2, 1.1, 0.2])
    divided = Training("sgd", 2.0, steps=101, batch=1, decay="divided")
    assert [divided.rate_at(step) for step in (0, 50, 51, 75, 76, 100)] == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match=r"^there is no problem 'resnet'; give one of resnet32, .*adding.*$"):
        problem("resnet")
    with pytest.raises(ValueError, match=r"^preset='big'; give one of laptop, paper$"):
        problem("gru", "big")
    with pytest.raises(ValueError, match=r"^backend='numpy'; give 'torch' or 'jax'$"):
        build(ResidualMLP(2), "numpy")
