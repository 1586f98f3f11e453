"""Transformers: GPT-2's shape in hbp's layers, a Llama converted, RoBERTa's parts in post-norm layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import hbp.backends.torch as hb
from experiments.data.files import from_hub
from experiments.models import sizes as s


def build(sizes: s.Sizes, folder: Path | None) -> nn.Module:
    """The transformer of these sizes."""
    if isinstance(sizes, s.GPT2):
        return GPT2(sizes)
    return Llama(sizes) if isinstance(sizes, s.Llama) else Roberta(sizes, folder)


class Attention(nn.Module):
    """Causal self-attention of the normalised stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.read(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.write(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GPT-2's MLP of the normalised stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(nn.functional.gelu(self.read(self.norm(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Symbols (B, T) to logits (B, T, V)."""

    def __init__(self, sizes: s.GPT2) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.length, sizes.width)
        blocks: list[nn.Module] = []
        for _ in range(sizes.layers):
            blocks += [Attention(sizes.width, sizes.heads), FeedForward(sizes.width)]
        self.stack = hb.Sequential(*map(hb.Residual, blocks), damping=sizes.damping)
        self.norm = nn.LayerNorm(sizes.width)
        self.apply(_as_gpt2)
        for block in blocks:
            nn.init.normal_(block.write.weight, std=0.02 / len(blocks) ** 0.5)

    def forward(self, symbols: Tensor) -> Tensor:
        places = self.places.weight[: symbols.shape[1]]
        return self.norm(self.stack(self.embed(symbols) + places)) @ self.embed.weight.T


def _as_gpt2(part: nn.Module) -> None:
    if isinstance(part, nn.Linear | nn.Embedding):
        nn.init.normal_(part.weight, std=0.02)
    if isinstance(part, nn.Linear):
        nn.init.zeros_(part.bias)


class Llama(nn.Module):
    """Symbols (B, T) to logits (B, T, V)."""

    def __init__(self, sizes: s.Llama) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": max(1, sizes.heads // 2)}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.vocabulary, max_position_embeddings=sizes.length, hidden_size=sizes.width,
                intermediate_size=3 * sizes.width, num_hidden_layers=sizes.layers, **heads, **tokens,
            )
        )  # fmt: skip
        hb.convert(self.model, damping=sizes.damping)

    @property
    def stack(self) -> nn.ModuleList:
        """The converted layers."""
        return self.model.model.layers

    def forward(self, symbols: Tensor) -> Tensor:
        return self.model(input_ids=symbols, use_cache=False).logits


class RobertaAttention(nn.Module):
    """Self-attention and its output map, of RoBERTa's own parts; the sum and its norm are the layer's."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention, self.write, self.dropout = attention.self, attention.output.dense, attention.output.dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.dropout(self.write(self.attention(x, attention_mask=mask)[0]))


class RobertaFeedForward(nn.Module):
    """The feed-forward of RoBERTa's own parts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.read, self.write, self.dropout = layer.intermediate, layer.output.dense, layer.output.dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.dropout(self.write(self.read(x)))


class Roberta(nn.Module):
    """Tokens (B, T) and their mask (B, T) to logits (B, classes)."""

    def __init__(self, sizes: s.Roberta, folder: Path | None) -> None:
        super().__init__()
        model = _roberta(sizes, folder)
        self.embed, self.head = model.roberta.embeddings, model.classifier
        layers: list[nn.Module] = []
        for layer in model.roberta.encoder.layer:
            layers += [
                hb.PostNorm(RobertaAttention(layer.attention), layer.attention.output.LayerNorm),
                hb.PostNorm(RobertaFeedForward(layer), layer.output.LayerNorm),
            ]
        self.stack = hb.Sequential(*layers, damping=sizes.damping)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        return self.head(self.stack(self.embed(tokens), seen))


def _roberta(sizes: s.Roberta, folder: Path | None) -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    if sizes.pretrained is not None:
        classes = {"num_labels": sizes.classes}
        load = partial(RobertaForSequenceClassification.from_pretrained, **classes)
        return from_hub(sizes.pretrained, folder, load, "model")
    rates = {f"{part}_dropout_prob": sizes.dropout for part in ("hidden", "attention_probs")}
    config = RobertaConfig(
        vocab_size=sizes.vocabulary, max_position_embeddings=sizes.length + 2, hidden_size=sizes.width,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, intermediate_size=4 * sizes.width,
        num_labels=sizes.classes, pad_token_id=0, type_vocab_size=1, **rates,
        initializer_range=0.02 * (768 / sizes.width) ** 0.5,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)
