"""Chat models without their output layers, as servers build them."""

import re

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfvlm
from hfvlm.integrations import serving
from hfvlm.modeling.headless import headless
from hfvlm.modules.transformer import eager_attention_forward
from hfvlm.registry import architectures

OTHERS = {"clip", "flamingo", "paligemma"}


def whole_model(name):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(hfvlm.load_preset(f"{name}/tiny").make_config()).eval()


def inputs_of(model):
    """A text after an image, or after a video of two frames."""
    config, modality = model.config, next(iter(model.media_inputs))
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size)
    media = (
        {"pixel_values": pixels} if modality == "image" else {"pixel_values_videos": pixels.expand(1, 2, -1, -1, -1)}
    )
    count = config.count_tokens() if modality == "image" else config.count_tokens(2)
    ids = [getattr(config, f"{modality}_token_id")] * count + [5, 7, 6]
    return {"input_ids": torch.tensor([ids]), **media}


@pytest.fixture(params=serving.SERVED)
def pair(request):
    """A model and the same without its output layer."""
    whole = whole_model(request.param)
    kind = headless(type(whole))
    lean = kind(whole.config).eval()
    missing = lean.load_state_dict(whole.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all("lm_head" in key for key in missing.unexpected_keys)
    assert kind.__name__ == type(whole).__name__.replace("ForConditionalGeneration", "Model")
    return whole, lean


@torch.no_grad()
def test_hidden_states_come_first(pair):
    whole, lean = pair
    inputs = inputs_of(whole)
    expected = whole(**inputs).logits
    for states in (lean(**inputs)[0], lean(**inputs, return_dict=False)[0]):
        torch.testing.assert_close(whole.get_output_embeddings()(states), expected)
    with pytest.raises(TypeError, match="'made_up'"):
        lean(**inputs, made_up=1)


def test_plans_name_modules(pair):
    _, lean = pair
    names = {name for name, _ in lean.named_modules()}
    assert len(lean.tp_plan) >= 6
    for pattern in lean.tp_plan:
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        assert any(rule.fullmatch(name) for name in names), pattern
    assert set(lean.pp_plan) <= names
    assert any(name.endswith(".layers") for name in lean.pp_plan)
    assert lean.get_decoder() is not lean.language_model
    assert lean.get_decoder() in list(lean.language_model.modules())


def test_tied_embeddings_need_no_output_layer():
    config = whole_model("llava").config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    kind = headless(hfvlm.HfvlmLLaVAForConditionalGeneration)
    assert not [key for key in kind(config).state_dict() if "lm_head" in key]


@torch.no_grad()
def test_qwen_takes_positions_of_texts_end_to_end(monkeypatch):
    """A server hands on the position of each token, for its own attention; by itself the model counts columns."""
    text = whole_model("qwen_vl").config.text_config
    model = AutoModelForCausalLM.from_config(text, attn_implementation="eager").eval().base_model
    ids, plain = torch.tensor([[5, 7, 6, 8]]), {"use_cache": False}
    counted = model(ids, **plain).last_hidden_state
    places = torch.arange(4)[None]
    torch.testing.assert_close(model(ids, position_ids=places + 3, **plain).last_hidden_state, counted)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", eager_attention_forward)
    model.config._attn_implementation = "vllm"
    mask = torch.ones(4, 4).tril().log()[None, None]
    served = {"attention_mask": mask, "attention_instances": {}, **plain}
    torch.testing.assert_close(model(ids, position_ids=places, **served).last_hidden_state, counted)
    two = model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), **served).last_hidden_state
    assert not torch.allclose(two[:, 2:], counted[:, 2:])
    torch.testing.assert_close(two[:, :2], counted[:, :2])


def test_auto_model_leaves_heads_out_where_a_server_runs(monkeypatch):
    """Of models that chat alone, and of those loaded later, too; in this process it is undone."""
    mapping = AutoModel._model_mapping
    monkeypatch.setattr(hfvlm.registry, "after_load", [*hfvlm.registry.after_load])
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    configs = {name: hfvlm.load_preset(f"{name}/tiny").make_config() for name in (*serving.SERVED, *OTHERS)}
    before = {name: type(AutoModel.from_config(configs[name])) for name in OTHERS}
    serving.register()
    serving.register()
    for name in serving.SERVED:
        (kind, *_) = architectures()[name].models["AutoModelForImageTextToText"]
        assert type(AutoModel.from_config(configs[name])) is headless(getattr(hfvlm, kind))
        assert type(AutoModelForImageTextToText.from_config(configs[name])).__name__ == kind
    assert {name: type(AutoModel.from_config(configs[name])) for name in OTHERS} == before
