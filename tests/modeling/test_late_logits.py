"""In training, tokens without a label are not scored, and logits are computed for who reads them."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hfvlm.modeling.language import PLAIN_SCORES, is_plain_layer, scored_late
from hfvlm.presets import load_preset
from hfvlm.registry import architectures

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "bos_token_id": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
OWN_NAMES = {
    "mpt": {"vocab_size": 50, "d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2},
    "opt": SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 8},
}
PROMPT = 4


def language_model(kind):
    architectures()["qwen_vl"]
    torch.manual_seed(0)
    if kind == "hfvlm_qwen":
        config = load_preset("qwen_vl/tiny").make_config().text_config
    else:
        config = AutoConfig.for_model(kind, **OWN_NAMES.get(kind, SIZES))
    return AutoModelForCausalLM.from_config(config).eval()


def batch():
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def full(model, **inputs):
    """The loss of all scores, by transformers' own forward."""
    logits = model(**{name: x for name, x in inputs.items() if name not in ("labels", "num_items_in_batch")}).logits
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", sorted(PLAIN_SCORES))
def test_loss_logits_and_gradients_are_those_of_all_scores(kind, wrapped):
    model, inputs = language_model(kind), batch()
    expected, logits = full(model, **inputs)
    whole = gradients(model, expected)
    head, rows = model.get_output_embeddings(), []
    if wrapped:  # as adapters and sharded weights do, which observe each call
        head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    output = scored_late(model, **inputs)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    assert "logits" not in output
    assert rows == ([int((inputs["labels"][:, 1:] != -100).sum())] if wrapped else [])
    torch.testing.assert_close(output.late_logits(), logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, output.loss).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)
    counted = scored_late(model, **inputs, num_items_in_batch=torch.tensor(20)).loss
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(counted, expected * labels / 20, rtol=1e-5, atol=1e-5)


def test_other_language_models_score_by_their_forward():
    config = AutoConfig.for_model("gemma2", **SIZES, head_dim=8, final_logit_softcapping=0.1)
    model = AutoModelForCausalLM.from_config(config).eval()
    output = scored_late(model, **batch())
    torch.testing.assert_close(output.loss, full(model, **batch())[0], rtol=1e-5, atol=1e-5)
    assert output.logits.abs().max() <= 0.1


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    llava = architectures()["llava"]
    return llava.HfvlmLLaVAForConditionalGeneration(load_preset("llava/tiny").make_config()).eval()


def test_logits_come_when_they_are_read(llava):
    inputs = batch()
    with torch.no_grad():
        expected = llava(**inputs)
    assert "logits" in dict(expected)
    readers = {
        "attribute": lambda output: output.logits,
        "key": lambda output: output["logits"],
        "number": lambda output: output[1],
        "tuple": lambda output: output.to_tuple()[1],
        "mixed precision": lambda output: convert_outputs_to_fp32(lambda: output)().logits,
    }
    for name, read in readers.items():
        output = llava(**inputs)
        assert "logits" not in dict(output), name
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
        found = read(output)
        torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=1e-5)
        assert found.requires_grad
        assert output.logits is output["logits"]
        assert "late_logits" not in dict(output) or name == "mixed precision"
    found = llava(**inputs, return_dict=False)
    torch.testing.assert_close(found[1], expected.logits, rtol=1e-5, atol=1e-5)


def test_a_decoder_scores_labelled_tokens(llava):
    torch.manual_seed(0)
    coca = architectures()["coca"]
    decoder = coca.HfvlmCoCaModel(load_preset("coca/tiny").make_config()).eval()
    context = decoder.read(torch.randn(2, 3, *[decoder.config.vision_config.image_size] * 2))
    inputs = batch()
    with torch.no_grad():
        expected = decoder.text_model(**inputs, context=context)
    rows = []
    decoder.text_model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    output = decoder.text_model(**inputs, context=context)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_what_is_no_plain_layer():
    layer = nn.Linear(2, 3)
    assert is_plain_layer(layer)
    assert not is_plain_layer(nn.Sequential(layer))
    layer.register_forward_pre_hook(lambda module, args: None)
    assert not is_plain_layer(layer)
