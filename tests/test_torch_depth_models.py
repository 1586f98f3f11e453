"""Existing models over several ranks: hb.convert(mesh=), checkpoints, and what a model may go through besides."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hb: Any = pytest.importorskip("hbp.backends.torch")
transformers: Any = pytest.importorskip("transformers")
from ranks import square  # noqa: E402
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
    for count, ks in ((2, (1, 2, None)), (3, (3, None))):
        answers = ranks(converted_on, name, ks, ranks=count)
        for i, k in enumerate(ks):
            model = build(name)
            if count == 2:
                hb.convert(model, iterations=k, chunk=LAYERS // 2)
            loss = loss_of(name, model)
            loss.backward()
            reference, seen = gradients(model), set()
            for value, found, meta in (answer[i] for answer in answers):
                assert value == pytest.approx(loss.item(), rel=1e-12)
                here = [n for n in reference if n not in meta]
                close([found[n] for n in here], [reference[n] for n in here])
                assert all(found[n] is None for n in meta)
                seen |= set(here)
            assert seen == set(reference)


def random_on(mesh: Any, k: Any) -> Any:
    model = hb.convert(build("gpt2"), iterations=k, mesh=mesh).train()
    torch.manual_seed(5)  # one for all: the embedding has dropout too
    loss = loss_of("gpt2", model)
    loss.backward()
    return loss.item(), gradients(model)


def test_dropout_is_that_of_one_rank(ranks):
    ((loss, reference),) = ranks(random_on, None, ranks=1)
    for k in (None, 3):
        answers = ranks(random_on, k, ranks=3)
        for value, found in answers:
            assert value == pytest.approx(loss, rel=1e-12)
            own = [name for name, gradient in found.items() if gradient is not None]
            close([found[name] for name in own], [reference[name] for name in own])
            assert (found["transformer.wte.weight"] == answers[0][1]["transformer.wte.weight"]).all()


def generated_on(mesh: Any) -> Any:
    model = hb.convert(build("gpt2"), iterations=1, mesh=mesh)
    ids = torch.tensor([[3, 4, 5], [2, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        found = [model.generate(ids, use_cache=cache, **given) for cache in (False, True)]
        found.append(model.generate(ids, num_beams=2, **given))
    with pytest.raises(RuntimeError, match=r"this rank holds layers \d to \d only, so save_pretrained would lose the"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="spread over several ranks cannot be reverted"):
        hb.revert(model)
    return numpy(found)


def test_generate_works_and_what_would_lose_layers_is_refused(ranks):
    model, ids = build("gpt2"), torch.tensor([[3, 4, 5], [2, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [numpy([model.generate(ids, num_beams=n, **given)])[0] for n in (1, 1, 2)]
    for found in ranks(generated_on, ranks=3):
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def moved_on(mesh: Any) -> Any:
    model = hb.convert(build("gpt2"), iterations=3, mesh=mesh).to("cpu").float().to(torch.float64)
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def test_a_converted_model_moves_and_changes_its_precision(ranks):
    model = build("gpt2").float().double()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    reference = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for found in ranks(moved_on, ranks=3):
        assert len(found) > 10
        close(list(found.values()), [reference[name] for name in found])


class Meddling(Plain):
    """A loop that changes the state between layers."""

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=2.0)[0] * 1.0
        return self.head(x)


def meddling_on(mesh: Any) -> str:
    model = hb.convert(Meddling().double(), iterations=1, mesh=mesh)
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(3, 5, dtype=torch.float64))
    return str(caught.value)


def test_a_loop_that_changes_the_state_is_refused_on_all_ranks(ranks):
    found = ranks(meddling_on, ranks=3)
    assert found[0] == found[1] == found[2]
    assert "layer 1, a Halved, was not called with what layer 0 returned" in found[0]


def copied_on(mesh: Any) -> None:
    model = hb.convert(Plain().double(), iterations=1, mesh=mesh)
    model(torch.randn(3, 5, dtype=torch.float64))
    copy.deepcopy(model)  # refuses states that need gradients


def test_nothing_of_a_pass_outlives_it(ranks):
    ranks(copied_on, ranks=2)


class Twice(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = self.layers[0]


class Borrowed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[3].linear.weight = self.layers[0].linear.weight


class Seeded(Plain):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.constant_(self.head.bias, torch.distributed.get_rank())


REFUSED = {
    Twice: "some of the layers are one and the same",
    Borrowed: "a parameter of layer 3 stands elsewhere too",
    Seeded: "disagree on the model to convert: the sum of head.bias is 0.0 on rank 0, 2.0 on rank 1, 4.0 on rank 2",
}


def refused_on(mesh: Any) -> list[str]:
    found = []
    for kind in REFUSED:
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"\w") as caught:
            hb.convert(kind(), mesh=mesh)
        found.append(str(caught.value))
    return found


def test_models_that_cannot_be_spread_are_refused_on_all_ranks(ranks):
    for found in ranks(refused_on, ranks=3):
        for told, expected in zip(found, REFUSED.values(), strict=True):
            assert expected in told


def train(model: Any, steps: int, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of("gpt2", model)
        optimizer.zero_grad()
        loss.backward()
        hb.clip_grad_norm_(model, 0.05)
        optimizer.step()
        losses.append(loss.item())
    return losses


def prepared(mesh: Any, k: Any) -> tuple[Any, Any]:
    model = hb.convert(build("gpt2"), iterations=k, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def saved_on(mesh: Any, folder: str, k: Any) -> list[float]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = prepared(mesh, k)
    train(model, 2, optimizer)
    own, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": own, "optimizer": moments}, checkpoint_id=folder, process_group=mesh.get_group())
    return train(model, 2, optimizer)


def restored_on(mesh: Any, folder: str, k: Any) -> list[float]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = prepared(mesh, k)
    own, moments = get_state_dict(model, optimizer)
    state = {"model": own, "optimizer": moments}
    checkpoint.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    told = set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert not told.missing_keys
    assert not told.unexpected_keys
    return train(model, 2, optimizer)


def test_checkpoints_restore_on_other_numbers_of_ranks(ranks, tmp_path):
    for k, count in ((1, 2), (None, 3)):
        folder = str(tmp_path / str(k))
        (losses, *others) = ranks(saved_on, folder, k, ranks=2)
        assert others == [losses]
        again = ranks(restored_on, folder, k, ranks=count)
        if count == 2:
            assert again == [losses] * 2
        for found in again:
            assert found == pytest.approx(losses, rel=1e-9)


def clipped_on(mesh: Any, norm_type: Any) -> Any:
    model = hb.convert(build("llama"), mesh=mesh)
    loss_of("llama", model).backward()
    total = hb.clip_grad_norm_(model, 0.01, norm_type)
    return total.item(), gradients(model)


@pytest.mark.parametrize("norm_type", [2.0, "inf"])
def test_gradients_are_clipped_by_the_norm_over_all_ranks(ranks, norm_type):
    model = build("llama")
    loss_of("llama", model).backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type).item()
    assert total > 0.02
    reference = gradients(model)
    for found, clipped in ranks(clipped_on, norm_type, ranks=3):
        assert found == pytest.approx(total, rel=1e-12)
        own = [name for name, gradient in clipped.items() if gradient is not None]
        close([clipped[name] for name in own], [reference[name] for name in own])


def data(half: int) -> Any:
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))[half]


def stacked(mesh: Any, k: Any) -> Any:
    """A projection, two layers per rank and a head."""
    model = build("plain")
    layers = [Whole(layer) for layer in model.layers]
    here = 2 * mesh.get_local_rank()
    return nn.Sequential(model.first, hb.DepthParallel(*layers[here : here + 2], mesh=mesh, iterations=k), model.head)


class Whole(nn.Module):
    """A layer without its further result."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x, scale=2.0)[0]


def over_data_on(mesh: Any, way: str, k: Any) -> Any:
    """One step on 2 x 2 ranks; the two halves of the data lie along one axis, the depth along the other."""
    grid = square()
    half = grid.get_local_rank("data")
    whole = way.startswith("converted")
    model = hb.convert(build("plain"), k, mesh=grid["depth"]) if whole else stacked(grid["depth"], k)
    group = grid["data"].get_group()
    if way.endswith("fully_shard"):
        away = {p for p in model.parameters() if p.is_meta}
        torch.distributed.fsdp.fully_shard(model, mesh=grid["data"], ignored_params=away)
    wrapped = model
    if way in ("ddp", "converted"):
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    for _ in range(2):  # gradients add up
        wrapped(data(half)).square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            continue
        gradient = p.grad.full_tensor() if way.endswith("fully_shard") else p.grad
        if way == "all-reduce":
            torch.distributed.all_reduce(gradient, group=group)
            gradient /= 2
        if not whole:
            name = re.sub(r"^1\.(\d)\.layer", r"layers.\1", name)
        found[name] = gradient.numpy().copy()
    total = hb.clip_grad_norm_(model, 1e9)
    return found, total.item()


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("way", ["all-reduce", "ddp", "converted", "fully_shard", "converted, fully_shard"])
def test_data_and_depth_go_together(ranks, way, k):
    model = build("plain")
    for _ in range(2):
        model(torch.cat([data(0), data(1)])).square().mean().backward()
    reference = gradients(model)
    rename = {"first.": "0.", "head.": "2."} if not way.startswith("converted") else {}
    for old, new in rename.items():
        reference = {name.replace(old, new): gradient for name, gradient in reference.items()}
    total = sum((gradient**2).sum() for gradient in reference.values()) ** 0.5
    answers = ranks(over_data_on, way, k)
    for found, norm in answers:
        close(list(found.values()), [reference[name] for name in found])
        if way != "all-reduce":
            assert norm == pytest.approx(total, rel=1e-12)
    assert set().union(*(found for found, _ in answers)) == set(reference)


class Single(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.float()


def autocast_on(mesh: Any, k: Any) -> Any:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    first, stack, head = stacked(mesh, k).float()
    model = nn.Sequential(first, Single(), stack, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=mesh.get_group())
    steps = []
    for bad in (False, True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(data(0).float()).float().square().mean()
        scaler.scale(loss).backward()
        if bad and mesh.get_local_rank() == 1:
            next(stack.parameters()).grad[0] = float("nan")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        steps.append((loss.item(), scaler.get_scale(), first.weight.detach().numpy().copy()))
    return steps


def test_mixed_precision_and_a_scaler_that_all_ranks_share(ranks):
    model = build("plain").float()
    layers = [Whole(layer) for layer in model.layers]
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.Sequential(model.first, Single(), *layers, model.head)(data(0).float()).float().square().mean()
    answers = [steps for k in (2, None) for steps in ranks(autocast_on, k, ranks=2)]
    for steps in answers:
        assert steps[0][0] == loss.item()
        assert [scale for _, scale, _ in steps] == [4.0, 2.0, 2.0]
        assert (steps[0][2] == steps[1][2]).all()  # all skip the step that one rank cannot make
        assert (steps[1][2] != steps[2][2]).any()
        assert (steps[2][2] == answers[0][2][2]).all() or steps[2][2] == pytest.approx(answers[0][2][2], abs=2e-3)
