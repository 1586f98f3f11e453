"""Existing models over several ranks: hb.convert(mesh=), checkpoints, and what a model may go through besides."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
transformers: Any = pytest.importorskip("transformers")
from test_torch_depth import close, numpy  # noqa: E402
from torch import nn  # noqa: E402

LAYERS = 4
TOKENS = {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
HEADS = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}


class Plain(nn.Module):
    """A ModuleList of layers that return tuples, between a projection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.layers = nn.ModuleList(Halved() for _ in range(LAYERS))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x, rest = layer(x, scale=2.0)
            assert rest.shape == x.shape[:1]
        return self.head(x)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: Any, scale: float) -> Any:
        y = x + scale * torch.tanh(self.linear(self.norm(x))) * self.seen
        return y, y.sum(tuple(range(1, y.ndim)))


def build(name: str) -> Any:
    torch.manual_seed(1)
    if name == "plain":
        return Plain().double()
    if name == "gpt2":  # its head is its embedding
        sizes = {"n_positions": 8, "n_embd": 8, "n_layer": LAYERS, "n_head": 2}
        config = transformers.GPT2Config(**TOKENS, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        sizes = {"num_key_value_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": True}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, **HEADS, **sizes))
    elif name == "bert":
        config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, **HEADS)
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **HEADS)
        model = transformers.ViTForImageClassification(config)
    return model.double().eval()  # without dropout


def loss_of(name: str, model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    if name == "plain":
        return model(torch.randn(3, 5, dtype=torch.float64, generator=generator)).square().mean()
    if name == "vit":
        pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
        return model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
    ids = torch.randint(2, 11, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    keywords = {} if name == "bert" else {"use_cache": False}
    return model(input_ids=ids * mask, attention_mask=mask, labels=labels, **keywords).loss


def gradients(model: Any) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.numpy().copy() for name, p in model.named_parameters()}


def converted_on(mesh: Any, name: str, ks: Any) -> list[Any]:
    found = []
    for k in ks:
        model = hb.convert(build(name), iterations=k, mesh=mesh)
        loss = loss_of(name, model)
        loss.backward()
        found.append((loss.item(), gradients(model), [n for n, p in model.named_parameters() if p.is_meta]))
    return found


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama", "bert", "vit"])
def test_converted_models_have_the_gradients_of_one_process(ranks, name):
    ks = (1, 2, None)
    for count in (2, 3):
        answers = ranks(converted_on, name, ks, ranks=count)
        for i, k in enumerate(ks):
            model = build(name)
            if count == 2:
                hb.convert(model, iterations=k, chunk=LAYERS // 2)
            elif k == 1:
                continue
            loss = loss_of(name, model)
            loss.backward()
            reference, seen = gradients(model), set()
            inner = k == 2 and count == 3  # the layers are exact, what lies before them not
            for value, found, meta in (answer[i] for answer in answers):
                assert value == pytest.approx(loss.item(), rel=1e-12)
                here = [n for n in reference if n not in meta and not (inner and answers[0][i][1][n] is not None and "0." not in n and ("emb" in n or "wte" in n or "wpe" in n or "first" in n))]
                close([found[n] for n in here], [reference[n] for n in here])
                assert all(found[n] is None for n in meta)
                seen |= set(here)
            assert inner or seen == set(reference)
