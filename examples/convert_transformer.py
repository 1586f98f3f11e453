"""Train a small GPT-2 or Llama of `transformers` on source code, with exact backprop and with Highway-BP.

The model is converted in place by one call; `diagnose` finds k on the first batch; both runs start from the same
weights and see the same batches. Needs: pip install "hbp[torch,demo]" transformers

    python examples/convert_transformer.py --all --plot curves.png
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.progress import track
from text import VOCABULARY, batch_of, source_text

import hbp.backends.torch as hb

LENGTH, BATCH, LAYERS, WIDTH = 64, 16, 8, 64


def build(name: str) -> Any:
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if name == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**tokens, **sizes, **dropout))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tokens, **sizes, **heads))


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch, use_cache=False).loss


def batches(steps: int, masked: bool) -> list[dict[str, Any]]:
    """Excerpts; ``masked`` ones have their first characters, a random number of them, replaced by padding."""
    text, generator = source_text(), torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        ids = batch_of(text, LENGTH, BATCH, generator)
        if not masked:
            found.append({"input_ids": ids, "labels": ids})
            continue
        lengths = torch.randint(LENGTH // 2, (BATCH, 1), generator=generator)
        mask = (torch.arange(LENGTH) >= lengths).long()
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def train(model: Any, data: list[dict[str, Any]], title: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in track(data, title):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(name: str, masked: bool, steps: int, target: float) -> dict[str, Any]:
    """Both runs' curves, and the mean losses of their last 20 steps."""
    torch.manual_seed(0)
    model, data = build(name), batches(steps, masked)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    hb.convert(model)
    found = hb.diagnose(model, loss_of, data[0], target=target)
    chosen = (*found.within, found.exact)[0]  # the smallest k: what is fastest differs from machine to machine
    k = chosen.iterations

    curves = {}
    for title, setting in (("exact backprop", found.exact), (f"Highway-BP, k = {k}", chosen)):
        model.load_state_dict(start)
        hb.configure(model, setting)
        curves[title] = train(model, data, title)
    exact, found = (sum(curve[-20:]) / len(curve[-20:]) for curve in curves.values())
    figures = {"model": name, "masked": masked, "k": k, "layers": LAYERS, "exact": exact, "highway": found}
    print(json.dumps(figures))
    return figures | {"curves": curves}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--masked", action="store_true", help="pad the texts, with an attention mask")
    parser.add_argument("--all", action="store_true", help="both models, without and with padding")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--target", type=float, default=0.05, help="error of the gradient that diagnose aims at")
    parser.add_argument("--plot", type=Path, help="a file for the curves")
    given = parser.parse_args(arguments)
    cases = product(("gpt2", "llama"), (False, True)) if given.all else [(given.model, given.masked)]
    results = [compare(name, masked, given.steps, given.target) for name, masked in cases]
    if given.plot:
        figure = Figure(figsize=(4 * len(results) + 1, 3.5), layout="constrained")
        for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
            for title, curve in result["curves"].items():
                axes.plot(curve, label=title, linewidth=1)
            axes.set(xlabel="step", ylabel="loss", title=result["model"] + (", padded" if result["masked"] else ""))
            axes.legend()
        figure.savefig(given.plot, dpi=120)
    return results


if __name__ == "__main__":
    main()
