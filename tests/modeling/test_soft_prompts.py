"""Embeddings in place of ids, together with images: what PEFT's soft prompts are made of."""

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

from hfvlm.modeling.compat import CACHE, StepInputs, new_cache, with_cache
from hfvlm.modeling.image_text import ImageTextModel
from tests.modeling.test_generation import SUITES
from tests.support.suite import close

IMAGE_TEXT = {name: suite for name, suite in SUITES.items() if issubclass(suite.model_class, ImageTextModel)}
SOFT = {
    "tuning": PromptTuningConfig,
    "encoder": lambda **options: PromptEncoderConfig(encoder_hidden_size=16, **options),
}


@pytest.fixture(params=IMAGE_TEXT)
def suite(request):
    return IMAGE_TEXT[request.param]()


@pytest.fixture
def model(suite):
    torch.manual_seed(0)
    return suite.model_class(suite.config()).eval()


@pytest.fixture
def batch(suite):
    torch.manual_seed(1)
    return suite.inputs()


def with_rows_for_placeholders(model):
    """A table that has a row for every placeholder."""
    rows = max(model.placeholder(modality) for modality in model.media_inputs) + 1
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    return model


def test_embeddings_with_images_equal_ids_with_images(model, batch):
    model = with_rows_for_placeholders(model)
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        close(model(inputs_embeds=embeds, **rest).logits, model(**batch).logits, 1e-6, "logits")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(inputs_embeds=embeds, **batch)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(**rest)


def test_a_placeholder_without_a_row_cannot_be_found_in_embeddings(model, batch):
    rows = model.get_input_embeddings().weight.shape[0]
    if all(model.placeholder(modality) < rows for modality in model.media_inputs):
        pytest.skip("every placeholder has a row")
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    embeds = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="no row in the table.*resize_token_embeddings"):
        model(inputs_embeds=embeds, **rest)


@pytest.mark.parametrize("kind", SOFT)
def test_soft_prompts_learn(suite, model, batch, kind):
    """And nothing else does."""
    model = with_rows_for_placeholders(model)
    options = {"task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"}
    text = model.config.text_config
    if text.model_type.endswith("mpt"):  # whose names of sizes PEFT does not know
        options |= {"num_layers": text.n_layers, "num_attention_heads": text.n_heads, "token_dim": text.hidden_size}
    tuned = get_peft_model(model, SOFT[kind](num_virtual_tokens=3, **options))
    before = tuned(**batch, **suite.loss_inputs()).loss
    before.backward()
    trained = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all("prompt_encoder" in name and grad.abs().max() > 0 for name, grad in trained.items())


def test_a_cache_is_found_by_either_name():
    inputs = StepInputs({CACHE: 1, "input_ids": 2})
    assert inputs.get("past_key_values") == inputs["cache"] == inputs["past_key_values"] == 1
    inputs["past_key_values"] = 3
    assert dict(inputs) == {CACHE: 3, "input_ids": 2}
    assert StepInputs().get("past_key_values") is None


def test_a_step_has_the_cache_by_peft_s_name(model, batch):
    """Without it, PEFT begins its prompt again with each token."""
    cache = new_cache(model)
    inputs = model.prepare_inputs_for_generation(batch["input_ids"], **with_cache(cache))
    assert inputs.get("past_key_values") is cache
