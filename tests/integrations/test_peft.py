"""PEFT's own loading of models of a package, which has to be allowed; its soft prompts from training to answers."""

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from tests.modeling.test_generation import sharpened
from tests.models.llava.tiny import converted
from tests.support.folders import tiny_folder

pytestmark = pytest.mark.integration

# OPT, of BLIP-2, counts positions by the mask; PaLI has an encoder and a decoder, and no chat.
NAMES = ("llava", "blip2-opt", "qwen_vl", "pali")
SOFT = {
    "prompt": PromptTuningConfig,
    "p": lambda **options: PromptEncoderConfig(encoder_hidden_size=16, **options),
    "prefix": PrefixTuningConfig,
}
STEPS = 6


def test_the_package_has_to_be_allowed(tmp_path):
    folder = converted(tmp_path)
    tuned = hfvlm.lora(AutoModelForImageTextToText.from_pretrained(folder), r=2, quiet=True).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hfvlm"]).eval()
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, tuned(input_ids=ids).logits)


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """A model whose table has a row for the placeholder, as soft prompts need it."""
    released = tiny_folder(request.param, tmp_path_factory.mktemp(request.param) / "released")
    model = sharpened(AutoModelForImageTextToText.from_pretrained(released))
    rows = model.config.image_token_id + 1
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    folder = released.parent / "model"
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(released).save_pretrained(folder)
    return folder


def prompts_of(processor, count):
    """Questions of different lengths about different images."""
    text = "What is it?"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8) for i in range(count)]
    texts = [text + " a red" * i for i in range(count)]
    return processor(text=texts, images=[Image.fromarray(pixels) for pixels in images], padding=True)


def by_hand(tuned, batch):
    """The likeliest tokens, one forward of the whole text for each."""
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    several = tuned.config.is_encoder_decoder
    answer = torch.full((len(ids), 1), tuned.config.get_text_config().decoder_start_token_id or 0 if several else 0)
    for _ in range(STEPS):
        if several:
            scores = tuned(input_ids=ids, attention_mask=mask, decoder_input_ids=answer, **rest).logits[:, -1]
        else:
            whole = torch.cat([ids, answer[:, 1:]], dim=1), torch.cat([mask, torch.ones_like(answer[:, 1:])], dim=1)
            scores = tuned(input_ids=whole[0], attention_mask=whole[1], **rest).logits[:, -1]
        scores = scores.clone()
        for modality in tuned.get_base_model().media_inputs:
            scores[:, tuned.get_base_model().placeholder(modality) :][:, :1] = -torch.inf
        answer = torch.cat([answer, scores.argmax(dim=-1, keepdim=True)], dim=1)
    return answer[:, 1:]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's name
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # the mask has OPT's
@pytest.mark.parametrize("kind", SOFT)
def test_soft_prompts_learn_answer_and_are_loaded(folder, kind, tmp_path):
    """A step of training, then answers by `generate` as by hand, of a batch as of a row, before and after saving."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    torch.manual_seed(0)
    tuned = get_peft_model(model, SOFT[kind](task_type=task, num_virtual_tokens=3))
    batch = dict(prompts_of(processor, 2))
    labels = torch.randint(5, 60, (2, 4)) if model.config.is_encoder_decoder else batch["input_ids"]
    if kind == "prefix" and model.config.is_encoder_decoder:  # a prefix is a decoder's cache
        with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_values'"):
            tuned(**batch, labels=labels)
        return
    tuned.eval()
    trained = [each for each in tuned.parameters() if each.requires_grad]
    before = tuned(**batch, labels=labels).loss
    before.backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.01)
    torch.optim.SGD(trained, lr=1.0).step()
    assert tuned(**batch, labels=labels).loss < before

    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = by_hand(tuned, batch)
        assert len(set(expected.flatten().tolist())) > 2
        found = tuned.generate(**batch, **options)[:, -STEPS:]
        assert torch.equal(found, expected)
        longest = {name: value[1:] for name, value in batch.items()}  # PEFT's tokens come before the padding of others
        assert torch.equal(tuned.generate(**longest, **options)[:, -STEPS:], expected[1:])

        tuned.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path).eval()
        assert torch.equal(again(**batch, labels=labels).logits, tuned(**batch, labels=labels).logits)
        assert torch.equal(again.generate(**batch, **options)[:, -STEPS:], expected)


def test_soft_prompts_of_a_table_without_the_placeholder_fail_as_the_page_says(tmp_path):
    folder = tiny_folder("llava", tmp_path / "llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(IndexError, match="index out of range in self"):
        tuned(**prompts_of(processor, 1))


def test_a_soft_prompt_is_not_merged(tmp_path):
    folder = tiny_folder("qwen_vl", tmp_path / "qwen_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned.save_pretrained(tmp_path / "adapter")
    assert "merge_and_unload" not in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter.*is merged into no weight: load it by peft.PeftModel"):
        hfvlm.Chat.from_pretrained(tmp_path / "adapter")
    assert isinstance(PeftModel.from_pretrained(model, tmp_path / "adapter"), PeftModel)
