"""The zero-shot pipelines embed labels once, and score them as transformers' pipelines do."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast, pipeline
from transformers.feature_extraction_utils import BatchFeature
from transformers.pipelines import ZeroShotAudioClassificationPipeline, ZeroShotImageClassificationPipeline

from hfvlm.inference import label_cache
from hfvlm.presets import load_preset
from hfvlm.registry import architectures

TASK = "zero-shot-image-classification"
WORDS = ["circle", "square", "blue", "red", "dog", "cat"]
LABELS = ["circle", "blue square", "red dog of a cat", "dog"]
IMAGES = [Image.fromarray(np.full((40, 50, 3), value, np.uint8)) for value in (10, 90, 200)]


class Pixels(AutoImageProcessor):
    """Random pixels of an image's colour."""

    def __init__(self, size):
        self.size = size

    def __call__(self, images, return_tensors):
        random = torch.Generator().manual_seed(images[0].getpixel((0, 0))[0])
        return BatchFeature({"pixel_values": torch.randn(1, 3, self.size, self.size, generator=random)})


def tokenizer(config):
    ids = {"[PAD]": 0, "[UNK]": 1, **{word: i for i, word in enumerate([*WORDS, *"Thisaphotof", "."], 2)}}
    end = max(getattr(config, "eos_token_id", None) or 0, 60)
    # An end of text past the words, as CLIP's.
    ids |= {f"[{i}]": i for i in range(len(ids), end)} | {"[END]": end}
    engine = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=config.max_position_embeddings,
    )


def tiny_config(name):
    config = load_preset(f"{name}/tiny").make_config()
    if name == "siglip":  # the pipelines pad its texts to 64
        config.text_config.max_position_embeddings = 64
    if name == "blip2":
        words = {"vocab_size": 120, "projection_dim": 32, "bos_token_id": 3}
        queries = config.qformer_config.to_dict() | words
        config = type(config)(vision_config=config.vision_config, qformer_config=queries, text_config=None)
    return config


def made(name):
    """A tiny model, and its pipelines: ours and transformers'."""
    architecture = architectures()[name]
    config = tiny_config(name)
    torch.manual_seed(0)
    model = getattr(architecture, architecture.models["AutoModelForZeroShotImageClassification"][0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough to matter
            parameter.add_(torch.randn_like(parameter) * 0.05)
    text = config.qformer_config if name == "blip2" else config.text_config
    parts = {"tokenizer": tokenizer(text), "image_processor": Pixels(getattr(config.vision_config, "image_size", 64))}
    return model, pipeline(TASK, model=model, **parts), ZeroShotImageClassificationPipeline(model=model, **parts)


def zero_shot():
    return [n for n, found in architectures().items() if "AutoModelForZeroShotImageClassification" in found.models]


@pytest.fixture
def clip():
    return made("clip")


@pytest.fixture
def texts(monkeypatch):
    """Sizes of the batches of texts that were embedded."""
    seen = []
    made = label_cache.pooled
    monkeypatch.setattr(label_cache, "pooled", lambda f: (seen.append(len(f.pooler_output)), made(f))[1])
    return seen


def same(found, expected):
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    scores = [[row["score"] for row in rows] for rows in (found, expected)]
    assert np.allclose(*scores, rtol=0, atol=1e-5)


def test_every_architecture_is_here():
    known = {"align", "blip", "blip2", "clip", "coca", "filip", "flava", "imagebind", "siglip", "wukong"}
    assert known <= {*zero_shot()}


@pytest.mark.parametrize("name", zero_shot())
def test_scores_are_as_without_a_cache(name, monkeypatch):
    model, ours, plain = made(name)
    expected = [plain(image, candidate_labels=LABELS) for image in IMAGES]
    assert len({row["score"] for rows in expected for row in rows}) > len(LABELS), "scores must differ"
    embedded, embed = [], model.embed_texts
    monkeypatch.setattr(model, "embed_texts", lambda **inputs: (embedded.append(inputs), embed(**inputs))[1])
    for image, rows in zip(IMAGES, expected, strict=True):
        same(ours(image, candidate_labels=LABELS), rows)
    for rows, again in zip(ours(IMAGES, candidate_labels=LABELS, batch_size=2), expected, strict=True):
        same(rows, again)
    assert len(embedded) == 1


def test_tokens_and_text_tower_are_left_out(clip, monkeypatch):
    model, ours, _ = clip
    calls, tokenized, embed = [], [], model.text_model.forward
    monkeypatch.setattr(type(model.text_model), "forward", lambda _, *inputs: calls.append(1) or embed(*inputs))
    encode = ours.tokenizer._encode_plus
    monkeypatch.setattr(
        type(ours.tokenizer), "_encode_plus", lambda _, text, **k: (tokenized.append(len(text)), encode(text, **k))[1]
    )
    for image in IMAGES:
        ours(image, candidate_labels=LABELS)
    assert len(calls) == 1
    assert tokenized == [len(LABELS), 1, 1]


def test_other_labels_templates_and_tokenizers_are_other_entries(clip, texts):
    _, ours, plain = clip
    for options in (
        {"candidate_labels": LABELS},
        {"candidate_labels": LABELS[::-1]},
        {"candidate_labels": LABELS[:2]},
        {"candidate_labels": tuple(LABELS), "hypothesis_template": "{}"},
    ):
        for _ in range(2):
            same(ours(IMAGES[0], **options), plain(IMAGES[0], **options))
    assert texts == [4, 4, 2, 4]
    ours.tokenizer.padding_side = "left"
    same(ours(IMAGES[0], candidate_labels=LABELS), plain(IMAGES[0], candidate_labels=LABELS))
    assert texts == [4, 4, 2, 4, 4]


def by_optimizer(model):
    model.get_text_features(torch.tensor([[2, 3, 60]])).pooler_output.sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    model.zero_grad()


def by_copy(model):
    model.load_state_dict({name: x + 0.1 for name, x in model.state_dict().items()})


def by_data(model):
    for parameter in model.text_model.parameters():
        parameter.data.mul_(1.3)


def by_row(model):
    """As learned tokens change their rows of the table alone."""
    model.text_model.get_input_embeddings().weight.data[60:] += 0.5


def by_new_parameters(model):
    model.load_state_dict({name: x * 1.2 for name, x in model.state_dict().items()}, assign=True)


CHANGES = [by_optimizer, by_copy, by_data, by_row, by_new_parameters, nn.Module.double, nn.Module.half]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_drops_the_embeddings(clip, texts, change):
    model, ours, plain = clip
    before = ours(IMAGES[0], candidate_labels=LABELS)
    change(model)
    found = ours(IMAGES[0], candidate_labels=LABELS)
    same(found, plain(IMAGES[0], candidate_labels=LABELS))
    assert texts == [4, 4]
    assert len(ours.embeddings.entries) == 1
    assert {row["label"]: row["score"] for row in found} != {row["label"]: row["score"] for row in before}


def test_the_vision_towers_weights_drop_nothing(clip, texts):
    model, ours, plain = clip
    ours(IMAGES[0], candidate_labels=LABELS)
    by_data(type("", (), {"text_model": model.vision_model}))
    same(ours(IMAGES[0], candidate_labels=LABELS), plain(IMAGES[0], candidate_labels=LABELS))
    assert texts == [4]


def test_no_embeddings_are_cached_where_more_than_weights_decides(clip, texts):
    model, ours, _ = clip
    inputs = ours._ensure_tensor_on_device(ours.preprocess(IMAGES[0], LABELS), "cpu")
    with torch.enable_grad():
        assert ours._forward(dict(inputs))["logits"].requires_grad
    model.text_model.layers[0].train()
    ours(IMAGES[0], candidate_labels=LABELS)
    model.eval()
    seen = []
    handle = model.text_model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        ours(IMAGES[0], candidate_labels=LABELS)
    handle.remove()
    assert seen == [1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        ours(IMAGES[0], candidate_labels=LABELS)
    assert not texts
    ours(IMAGES[0], candidate_labels=LABELS)
    assert texts == [4]


def test_adapters_are_not_cached(clip, texts):
    from peft import LoraConfig, get_peft_model

    model, ours, plain = clip
    expected = ours(IMAGES[0], candidate_labels=LABELS)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ours.model = plain.model = adapted.eval()
    found = ours(IMAGES[0], candidate_labels=LABELS)
    same(found, plain(IMAGES[0], candidate_labels=LABELS))
    with adapted.disable_adapter():
        same(ours(IMAGES[0], candidate_labels=LABELS), expected)
    ours.model = plain.model = adapted.merge_and_unload()
    same(ours(IMAGES[0], candidate_labels=LABELS), found)
    assert texts == [4, 4]


def test_the_cache_is_bounded(clip, texts, monkeypatch):
    model, ours, plain = clip
    size = len(LABELS) * model.config.text_config.projection_dim * 4
    monkeypatch.setattr(label_cache, "MOST_BYTES", 2 * size)
    for labels in (LABELS, LABELS[::-1], LABELS, LABELS[1:] + LABELS[:1], LABELS, LABELS[::-1]):
        same(ours(IMAGES[1], candidate_labels=labels), plain(IMAGES[1], candidate_labels=labels))
        assert len(ours.embeddings.entries) <= 2
    assert len(texts) == 4
    monkeypatch.setattr(label_cache, "MOST_BYTES", 0)
    ours(IMAGES[1], candidate_labels=LABELS)
    assert len(ours.embeddings.entries) == 1


def test_labels_of_audio(imagebind_folder, texts):
    ours = pipeline("zero-shot-audio-classification", model=str(imagebind_folder))
    parts = {"tokenizer": ours.tokenizer, "feature_extractor": ours.feature_extractor}
    plain = ZeroShotAudioClassificationPipeline(model=AutoModel.from_pretrained(imagebind_folder), **parts)
    rate = ours.feature_extractor.sampling_rate
    for frequency in (0.01, 0.1):
        wave = np.sin(np.arange(3 * rate) * frequency).astype(np.float32)
        same(ours(wave, candidate_labels=LABELS), plain(wave, candidate_labels=LABELS))
    assert texts == [4]
