"""Train a GPT-2 of 12 blocks whose blocks lie on several ranks, on source code, and compare with one process.

Every rank builds the same model from a config and keeps its share of the blocks. A schedule begins with few rounds of
Highway-BP and ends exact. Afterwards the first rank trains the whole model alone, from the same start on the same
batches, with exact backprop. Needs: pip install "hbp[torch,demo]" transformers

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 examples/depth_parallel.py
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import torch.distributed as dist
import transformers
from text import VOCABULARY, batch_of, source_text
from torch.distributed.device_mesh import init_device_mesh

import hbp
import hbp.backends.torch as hb

LENGTH, BATCH, WIDTH = 64, 16, 64


def build(layers: int) -> Any:
    """The same weights on all ranks; without dropout, since the comparison would draw other masks."""
    torch.manual_seed(0)
    sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": layers, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **tokens))


def train(model: Any, steps: int, spread: bool) -> tuple[list[float], float]:
    """The losses of all steps, and the seconds of a step."""
    text, generator = source_text(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if not p.is_meta), lr=1e-3)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        ids = batch_of(text, LENGTH, BATCH, generator)  # the same on all ranks
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if spread:
            hb.clip_grad_norm_(model, 1.0)
            hb.step(model)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / steps


def mean_of_last(losses: list[float]) -> float:
    return sum(losses[-20:]) / len(losses[-20:])


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """What was found, on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="k at the start; one more after half of the steps")
    parser.add_argument("--exact-from", type=float, default=0.8, help="the part of the steps after which it is exact")
    given = parser.parse_args(arguments)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("depth",))

    phases = {0: given.rounds, given.steps // 2: given.rounds + 1, max(1, int(given.exact_from * given.steps)): None}
    model = hb.convert(build(given.layers), hbp.Schedule(phases), mesh=mesh["depth"])
    losses, seconds = train(model, given.steps, spread=True)

    first = dist.get_rank() == 0
    if started:
        dist.destroy_process_group()
    if not first:
        return None
    alone, seconds_alone = train(build(given.layers), given.steps, spread=False)
    found = {"ranks": ranks, "layers": given.layers, "schedule": {str(step): k for step, k in phases.items()}}
    found |= {"loss": mean_of_last(losses), "loss of one process": mean_of_last(alone)}
    found |= {"seconds a step": round(seconds, 3), "of one process": round(seconds_alone, 3)}
    print(json.dumps(found))
    return found | {"losses": losses, "alone": alone}


if __name__ == "__main__":
    main()
