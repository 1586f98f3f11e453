"""hb.convert on models of transformers, built from small configs with random weights."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
hb: Any = pytest.importorskip("hbp.backends.torch")

L, VOCABULARY = 4, 50
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": L, "num_attention_heads": 2}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**TEXT, n_positions=32, n_embd=16, n_layer=L, n_head=2)),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=1)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**TEXT, **SIZES)),
    "roberta": lambda t: t.RobertaForMaskedLM(t.RobertaConfig(**TEXT, **SIZES)),
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=4)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name](transformers).double()


def batch(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64), "labels": torch.tensor([0, 1])}
    ids = torch.randint(2, VOCABULARY, (2, 9))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)  # the same dropout
    model.zero_grad(set_to_none=True)
    found = model(**given)
    loss = found.loss
    if given.get("output_hidden_states"):
        loss = loss + sum(state.square().mean() for state in found.hidden_states)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ["plain", "padded", "hidden states"])
@pytest.mark.parametrize("name", MODELS)
def test_values_keys_and_gradients(name, case):
    model, given = build(name).train(), batch(name)
    if case == "padded" and name != "vit":
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :3] = 0
    if case == "hidden states":
        given["output_hidden_states"] = True
    keys = list(model.state_dict())
    loss, expected = gradients(model, given)
    largest = max(g.abs().max() for g in expected.values())
    hb.convert(model, iterations=L)
    for net in (model, copy.deepcopy(model)):
        again, found = gradients(net, given)
        assert again == loss
        assert found.keys() == expected.keys()
        for key, reference in expected.items():
            assert (found[key] - reference).abs().max() <= 1e-9 * max(reference.abs().max(), 1e-3 * largest), key
    hb.set_iterations(model, 1)
    _, rough = gradients(model, given)
    assert max((rough[key] - expected[key]).abs().max() for key in expected) > 1e-5 * largest
    assert list(hb.revert(model).state_dict()) == keys


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache(name):
    model, ids = build(name).eval(), batch(name)["input_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **how)
    hb.convert(model, iterations=2)
    assert torch.equal(model.generate(ids, **how), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_cache_of_a_training_step_is_filled_once(name):
    model, given = hb.convert(build(name), iterations=2), batch(name)
    found = model(**given, use_cache=True)
    found.loss.backward()
    assert found.past_key_values.get_seq_length() == given["input_ids"].shape[1]
    name = next(name for name in ("cache", "past_key_values") if name in signature(type(model).forward).parameters)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model(given["input_ids"], **{name: found.past_key_values})


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_attentions_have_their_values_and_are_refused_in_a_loss(name):
    model, given = build(name).eval(), batch(name)
    model.set_attn_implementation("eager")
    expected = model(**given, output_attentions=True).attentions
    found = hb.convert(model, iterations=L)(**given, output_attentions=True)
    for one, reference in zip(found.attentions, expected, strict=True):
        assert torch.equal(one, reference)
    with pytest.raises(RuntimeError, match="a tensor made inside"):
        (found.loss + found.attentions[1].square().sum()).backward()


def test_cross_attention_reaches_the_encoder_states():
    torch.manual_seed(0)
    config = transformers.GPT2Config(**TEXT, n_positions=32, n_embd=16, n_layer=L, n_head=2, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    states = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    given = {**batch("gpt2"), "encoder_hidden_states": states}
    (expected,) = torch.autograd.grad(model(**given).loss, states)
    hb.convert(model, iterations=L)
    (found,) = torch.autograd.grad(model(**given).loss, states)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_t5_whose_first_layer_makes_a_bias_for_the_others():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=L, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, given = transformers.T5ForConditionalGeneration(config).double(), batch("gpt2")
    _, expected = gradients(model, given)
    hb.convert(model, iterations=L, stacks=["encoder.block", "decoder.block"])
    with pytest.warns(UserWarning, match="a new run of Highway-BP begins there") as caught:
        _, found = gradients(model, given)
    assert len(caught) == 2  # one in each stack
    largest = max(g.abs().max() for g in expected.values())
    assert all((found[key] - g).abs().max() <= 1e-9 * largest for key, g in expected.items())


def test_gradient_checkpointing_is_refused():
    model = build("llama")
    model.model.layers[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        hb.convert(model, iterations=1)


IMAGES = {
    "convnext": lambda t: t.ConvNextForImageClassification(
        t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 3, 2], image_size=32, layer_scale_init_value=1.0)
    ),
    "swin": lambda t: t.SwinForImageClassification(
        t.SwinConfig(image_size=32, patch_size=1, embed_dim=8, depths=[1, 1, 4, 1], num_heads=[2] * 4, window_size=4)
    ),
    "resnet": lambda t: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 4, 2], layer_type="basic")
    ),
}
STAGES = {
    "convnext": "convnext.encoder.stages.2.layers of ConvNextForImageClassification: 3 layers, ConvNextLayer",
    "swin": "swin.encoder.layers.2.blocks of SwinForImageClassification: 4 layers, SwinLayer",
    "resnet": "resnet.encoder.stages.2.layers of ResNetForImageClassification: 3 layers, ResNetBasicLayer",
}


@pytest.mark.parametrize("name", IMAGES)
def test_of_staged_nets_the_longest_stage_is_converted(name, caplog):
    torch.manual_seed(0)
    model = IMAGES[name](transformers).double().train()
    given = {"pixel_values": torch.randn(4, 3, 32, 32, dtype=torch.float64), "labels": torch.tensor([0, 1, 1, 0])}
    loss, expected = gradients(model, given)
    with caplog.at_level("INFO", logger="hbp"):
        hb.convert(model, iterations=3 if name != "swin" else 4)
    assert caplog.messages == [f"hbp.convert: {STAGES[name]}"]
    again, found = gradients(model, given)
    assert (again - loss).abs() <= 1e-12 * loss.abs()
    largest = max(g.abs().max() for g in expected.values())
    assert all((found[key] - g).abs().max() <= 1e-9 * largest for key, g in expected.items())
    hb.set_iterations(model, 0)
    _, rough = gradients(model, given)
    assert max((rough[key] - g).abs().max() for key, g in expected.items()) > 1e-5 * largest


def test_a_list_of_stages_is_refused_with_the_remedy():
    model = hb.convert(IMAGES["convnext"](transformers), iterations=1, stacks="convnext.encoder.stages")
    with pytest.raises(ValueError, match=r'expected \(1, 8, 8, 8\); .*of a model in stages convert one, stacks="..."'):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_whole_stacks_are_still_converted_whole(name, caplog):
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=L, num_heads=2)
    model = build("bert") if name == "bert" else transformers.T5Model(config)
    with caplog.at_level("INFO", logger="hbp"):
        hb.convert(model, iterations=1)
    assert f": {L} layers, {'BertLayer' if name == 'bert' else 'T5Block'}" in caplog.text


@pytest.mark.filterwarnings("error")
def test_batching_where_asked_for_says_nothing():
    model, given = build("bert").eval(), batch("bert")
    _, expected = gradients(model, given)
    hb.convert(model, iterations=L, stacked=True)
    largest = max(g.abs().max() for g in expected.values())
    for layers in hb.options.scheduled(model).values():
        for layers.chunk in (1, 2):
            found = gradients(model, given)[1]
            assert all((found[key] - g).abs().max() <= 1e-9 * largest for key, g in expected.items())
    assert {stack.path for stack in hb.options.scheduled(model).values()} == {"stacked"}
