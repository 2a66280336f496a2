import json
import runpy
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.filip import config_from_original, keys_for, processor_for
from hfvlm.losses import contrastive_loss, late_interaction_loss
from hfvlm.models.filip import (
    HfvlmFILIPConfig,
    HfvlmFILIPForImageClassification,
    HfvlmFILIPImageProcessor,
    HfvlmFILIPModel,
    HfvlmFILIPTextConfig,
    HfvlmFILIPTextModel,
    HfvlmFILIPTokenizer,
    HfvlmFILIPVisionConfig,
    HfvlmFILIPVisionModel,
)
from hfvlm.models.filip.modeling_filip import FILIPOutput
from hfvlm.presets import load_preset
from hfvlm.samples import scenes
from hfvlm.training import cached_backward
from tests.support.paths import EXAMPLES
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 7, "projection_dim": 16}
TOKENS = {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
TEXT = SIZES | TOKENS | {"max_position_embeddings": 8, "projection_dim": 16}
WHOLE = {"vision_config": VISION, "text_config": TEXT, "top_k": 3, "summary_dim": 12}
IDS = torch.tensor([[48, 2, 49, 0, 0], [48, 2, 3, 4, 49], [48, 7, 7, 49, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
VOCABULARY = files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz"


class TestVision(PartSuite):
    model_class, auto_class = HfvlmFILIPVisionModel, AutoModel

    def config(self):
        return HfvlmFILIPVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_any_size_with_interpolated_positions(self, model, batch):
        plain = model(**batch).embeds
        assert plain.shape == (3, 16, 16)
        close(model(**batch, interpolate_pos_encoding=True).embeds, plain, 1e-5, "the size it was made for")
        assert model(torch.randn(1, 3, 14, 35), interpolate_pos_encoding=True).embeds.shape == (1, 10, 16)
        with pytest.raises(ValueError, match=r"pixel_values are \(14, 35\)"):
            model(torch.randn(1, 3, 14, 35))


class TestText(PartSuite):
    model_class, auto_class = HfvlmFILIPTextModel, AutoModel

    def config(self):
        return HfvlmFILIPTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def test_padding_changes_no_word(self, model):
        """It comes after the words, and no token looks ahead; with and without a mask."""
        changed = IDS.masked_fill(MASK == 0, 11)
        for mask in (None, MASK):
            kept = MASK.bool()
            close(model(changed, mask).embeds[kept], model(IDS).embeds[kept], 1e-5, "words")


class TestFILIP(ModelSuite):
    """As the reproduction: no mask, `top_k`; here the summaries count in the loss."""

    model_class, auto_class = HfvlmFILIPModel, AutoModelForZeroShotImageClassification

    def config(self):
        return HfvlmFILIPConfig(**WHOLE, summary_loss_weight=0.5)

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 28, 28)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_scores_are_means_of_best_matches(self, model, batch):
        output = model(**batch)
        mask = batch.get("attention_mask", torch.ones_like(IDS)).bool()
        for i in range(3):
            for t in range(3):
                cosine = output.image_embeds[i] @ output.text_embeds[t][mask[t]].t()
                scale = output.logit_scale
                close(output.logits_per_image[i, t], (scale * cosine.amax(1).mean())[0], 1e-5, "image to text")
                close(output.logits_per_text[t, i], (scale * cosine.amax(0).mean())[0], 1e-5, "text to image")

    def test_loss_of_all_pairs(self, model, batch):
        output = model(**batch, return_loss=True)
        expected = late_interaction_loss(
            output.image_embeds,
            output.text_embeds,
            output.logit_scale,
            b_mask=batch.get("attention_mask"),
            top_k=model.config.top_k,
        )
        whole = contrastive_loss(output.image_summary_embeds, output.text_summary_embeds, output.summary_scale)
        close(output.loss, expected + model.config.summary_loss_weight * whole, 1e-6, "loss")

    def test_loss_of_outputs_that_were_computed_in_parts(self, model, batch):
        expected = model(**batch, return_loss=True).loss
        parts = [model(**{k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 2), slice(2, 3))]
        joined = {
            name: torch.cat([part[name] for part in parts])
            for name in ("image_embeds", "text_embeds", "image_summary_embeds", "text_summary_embeds")
        }
        scales = {name: parts[0][name] for name in ("logit_scale", "summary_scale")}
        close(model.contrast(FILIPOutput(**joined, **scales)), expected, 1e-5, "loss")

    def test_summaries_are_those_of_clip(self, model, batch):
        output = model(**batch)
        summary = output.vision_model_output.summary
        first = model.image_summary.norm(output.vision_model_output.last_hidden_state[:, 0])
        close(summary, first @ model.image_summary.projection.weight.t(), 1e-6, "summary")
        close(output.image_summary_embeds, F.normalize(summary, dim=-1), 1e-6, "unit")


class TestFILIPAsInThePaper(TestFILIP):
    """Padding does not count, and all tokens may be matched; summaries have no weight, but keep their gradients."""

    test_compiles_as_one_graph = None  # its parts are in the graph above

    def config(self):
        return HfvlmFILIPConfig(**WHOLE | {"top_k": None})

    def inputs(self):
        return super().inputs() | {"attention_mask": MASK}

    def test_padding_is_never_read(self, model, batch):
        changed = batch | {"input_ids": IDS.masked_fill(MASK == 0, 11)}
        for name in ("logits_per_image", "logits_per_text", "loss"):
            left, right = model(**changed, return_loss=True), model(**batch, return_loss=True)
            close(left[name], right[name], 1e-5, name)
        without = {key: value for key, value in changed.items() if key != "attention_mask"}
        assert not torch.allclose(model(**without).logits_per_text, model(**batch).logits_per_text)


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmFILIPForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmFILIPModel

    def config(self):
        return HfvlmFILIPConfig(**WHOLE, num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}


def test_bad_sizes_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="top_k is 9, but of 16 patches and 8 tokens"):
        HfvlmFILIPConfig(**WHOLE | {"top_k": 9})
    with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs: 16"):
        HfvlmFILIPConfig(vision_config=VISION, text_config=TEXT | {"projection_dim": 8}, top_k=None)


def test_recipes():
    def trained(recipe):
        tuned = hfvlm.lora(HfvlmFILIPModel(load_preset("filip/tiny").make_config()), recipe, quiet=True)
        return {n.replace("base_model.model.", "") for n, p in tuned.named_parameters() if p.requires_grad}

    towers = trained("vision+text")
    assert {name.split(".")[0] for name in towers} == {"vision_model", "text_model"}
    assert {name.split(".")[4] for name in towers} == {"q_proj", "v_proj"}
    whole = {name.split(".modules_to_save")[0] for name in trained("text+projection+scale") if "lora_" not in name}
    towers = {"vision_model.projection", "text_model.projection"}
    assert whole == towers | {"image_summary.projection", "text_summary", "logit_scale", "summary_scale"}


# Processor


def test_images_are_cut_from_the_middle():
    image = Image.new("RGB", (90, 45), "white")
    image.paste("black", (31, 0, 59, 45))  # 28 columns, and as many in the middle of the short edge are kept
    processor = HfvlmFILIPImageProcessor(size=28, resized=45, image_mean=[0] * 3, image_std=[1] * 3)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    assert (pixels == 0).all()
    with pytest.raises(ValueError, match="no shorter than size"):
        HfvlmFILIPImageProcessor(size=28, resized=27)
    with pytest.raises(ValueError, match="must be 'shortest'"):
        HfvlmFILIPImageProcessor(resize_mode="squash")


def test_texts(tmp_path):
    """Clip's pieces, with `<|mask|>` before the two special ones, padded with the exclamation mark's id."""
    from hfvlm.models.clip import HfvlmCLIPTokenizer

    clip = HfvlmCLIPTokenizer.from_vocabulary(VOCABULARY, model_max_length=24)
    tokenizer = HfvlmFILIPTokenizer.from_vocabulary(VOCABULARY, model_max_length=24)
    start = len(clip) - 2
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, start + 1, start + 2)
    assert (len(tokenizer), tokenizer.pad_token_id) == (len(clip) + 1, 0)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, HfvlmFILIPTokenizer.from_pretrained(tmp_path)):
        for text in ("A handwritten THREE!", "wow!! a small blue circle", ""):
            expected = [i + (i >= start) for i in clip(text)["input_ids"]]
            encoded = one([text, "a"], padding=True)
            assert set(encoded) == {"input_ids"}
            assert encoded["input_ids"][0] == expected + [0] * (24 - len(expected)), text
    assert one("circle " * 30)["input_ids"][-1] == tokenizer.eos_token_id
    again = HfvlmFILIPTokenizer.from_vocabulary(tmp_path / "tokenizer.json", model_max_length=24)
    assert again("a!")["input_ids"] == tokenizer("a!")["input_ids"]
    masked = HfvlmFILIPTokenizer.from_vocabulary(VOCABULARY, model_input_names=["input_ids", "attention_mask"])
    masked.save_pretrained(tmp_path / "masked")
    again = HfvlmFILIPTokenizer.from_pretrained(tmp_path / "masked")
    assert sum(again("a circle")["attention_mask"]) == sum(i > 0 for i in again("a circle")["input_ids"])
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"has no <\|mask\|>; it is another model's"):
        HfvlmFILIPTokenizer.from_vocabulary(tmp_path / "clip" / "tokenizer.json")


# DeCLIP's files


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint as DeCLIP's training code saves one, converted."""
    config = load_preset("filip/tiny").make_config()
    model = HfvlmFILIPModel(config)
    original = restore_keys(model.state_dict(), [row for row in keys_for(config) if row.target])
    original["text_label_predictor.weight"] = torch.randn(3, 4)
    wrapped = {f"module.{key}": tensor.clone() for key, tensor in original.items()}
    torch.save({"model": wrapped, "optimizer": {"state": {}}, "last_iter": 7}, tmp_path / "filip.pth.tar")
    arguments = {"image_encode": {"heads": 2}, "text_encode": {"transformer_heads": 2}}
    hfvlm.convert(tmp_path / "filip.pth.tar", "filip", tmp_path / "filip", original=arguments, vocabulary=VOCABULARY)
    loaded = AutoModel.from_pretrained(tmp_path / "filip")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    return tmp_path / "filip"


def test_a_checkpoint_to_a_pipeline(folder):
    failed = [check for check in hfvlm.verify(folder) if not check.passed]
    assert failed == []
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.resized == 36
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["a small blue circle", "red square!"]
    image = Image.new("RGB", (40, 50), "blue")
    answer = {entry["label"]: entry["score"] for entry in classify(image, labels, hypothesis_template="{}")}
    inputs = processor(images=image, text=labels)
    expected = AutoModel.from_pretrained(folder)(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert [answer[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
def test_trains_in_mini_batches_and_finds_pairs(tmp_path, names):
    """With the gradients of the whole batch; recall is that of the scores."""
    config = load_preset("filip/tiny").make_config()
    config.top_k, config.summary_loss_weight = 4, 0.5
    processor = processor_for(config, {"tokenizer": {"model_input_names": names}}, VOCABULARY)
    random = np.random.RandomState(0)
    rows = [{"image": scene.render(random), "text": scene.caption()} for scene in scenes.all_scenes()[:10]]
    model = HfvlmFILIPModel(config)
    for layer in (*model.vision_model.layers, *model.text_model.layers):
        for linear in (layer.attention.v_proj, layer.attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            linear.weight.data *= 3  # scores that differ by more than rounding
    batch = dict(processor(images=[row["image"] for row in rows], text=[row["text"] for row in rows]))
    model(**batch, return_loss=True).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cached_backward(model, model.contrast, batch, 4)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name

    options = {"max_steps": 2, "per_device_train_batch_size": 5, "mini_batch_size": 2, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = hfvlm.ContrastiveTrainingArguments(str(tmp_path), **options, **quiet)
    trainer = hfvlm.ContrastiveTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {name for name in metrics if "recall@1" in name and "0" not in name} == {
        "eval_image_to_text_recall@1",
        "eval_text_to_image_recall@1",
    }
    with torch.no_grad():
        output = model.eval()(**batch, return_loss=True)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    for name, logits in (("image_to_text", output.logits_per_image), ("text_to_image", output.logits_per_text)):
        found = (logits.argmax(dim=1) == torch.arange(len(rows))).double().mean().item()
        assert metrics[f"eval_{name}_recall@1"] == pytest.approx(found)


def test_the_example_matches_words_with_patches(folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "blue.png")
    example = str(EXAMPLES / "words_to_patches.py")
    monkeypatch.setattr(sys, "argv", [example, str(folder), str(tmp_path / "blue.png"), "a circle"])
    runpy.run_path(example, run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    tokens = AutoProcessor.from_pretrained(folder).tokenizer
    assert len(lines) == tokens("a circle")["input_ids"].index(tokens.eos_token_id) + 2
    assert lines[0].endswith("<|startoftext|>")
    assert lines[-2].endswith("<|endoftext|>")
    scores = [float(line.split()[0]) for line in lines]
    assert scores[-1] == pytest.approx(sum(scores[:-1]) / len(scores[:-1]), abs=1e-3)


def test_other_files_are_refused(folder):
    with pytest.raises(UnsupportedOriginalError, match="no Bert"):
        config_from_original({"text_encode": {"text_encode_type": "Bert"}}, {})
    with pytest.raises(UnsupportedOriginalError, match="has a vision transformer"):
        config_from_original({}, {"visual.layer1.0.conv1.weight": torch.empty(1)})
    config = HfvlmFILIPConfig.from_pretrained(folder)
    assert json.loads((folder / "conversion.json").read_text())["layout"] == "declip"
    with pytest.raises(ValueError, match="633 pieces are not the model's 50"):
        processor_for(HfvlmFILIPConfig(**WHOLE), {}, VOCABULARY)
    assert config.text_config.eos_token_id == 632
