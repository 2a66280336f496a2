import json
from importlib.resources import files

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import coca
from hfvlm.models.coca import (
    HfvlmCoCaConfig,
    HfvlmCoCaModel,
    HfvlmCoCaTextConfig,
    HfvlmCoCaTextModel,
    HfvlmCoCaTokenizer,
    HfvlmCoCaVisionConfig,
    HfvlmCoCaVisionModel,
)
from hfvlm.modules.context import Context
from tests.support.contrastive_captioning import (
    END,
    IDS,
    MASK,
    PAD,
    START,
    ContrastiveCaptionerSuite,
    VisionSuite,
    WritingTowerSuite,
)
from tests.support.suite import PartSuite, close, same, tensors

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "initializer_range": 0.2}
VISION = SIZES | {"num_hidden_layers": 2, "image_size": 24, "patch_size": 8}
VISION |= {"projection_dim": 32, "num_queries": 5, "pooler_heads": 4}
TEXT = SIZES | {"num_hidden_layers": 4, "multimodal_layers": 2, "multimodal_heads": 4, "projection_dim": 32}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": START, "eos_token_id": END}


class TestVision(VisionSuite):
    model_class, auto_class = HfvlmCoCaVisionModel, AutoModel

    def config(self):
        return HfvlmCoCaVisionConfig(**VISION)

    def test_the_pooler_must_fit(self):
        with pytest.raises(StrictDataclassClassValidationError, match="32 is not a multiple of pooler_heads 5"):
            HfvlmCoCaVisionConfig(**VISION | {"pooler_heads": 5})
        with pytest.raises(StrictDataclassClassValidationError, match="num_queries 1"):
            HfvlmCoCaVisionConfig(**VISION | {"num_queries": 1})


class TestReading(PartSuite):
    """The lower half of the text tower."""

    model_class, auto_class = HfvlmCoCaTextModel, AutoModel

    def config(self):
        return HfvlmCoCaTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def objective(self, model, batch):
        """Of both uses."""
        written = model(IDS, context=Context(torch.linspace(-1, 1, 192).sin().view(2, 3, 32)))
        return super().objective(model, batch) + written.logits.square().mean()

    def test_records_hidden_states_and_attentions(self, model, batch):
        model.set_attn_implementation("eager")
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        assert (len(output.hidden_states), len(output.attentions)) == (3, 2)

    def test_the_class_token_sees_what_it_was_trained_to_see(self, model):
        """One token of padding and, where there is padding, not itself."""
        model.set_attn_implementation("eager")
        seen = model(IDS, output_attentions=True).attentions[0][:, 0, -1] > 0
        assert seen.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
        config = self.config()
        config.correct_class_mask = True
        mended = HfvlmCoCaTextModel._from_config(config, attn_implementation="eager").eval()
        seen = mended(IDS, output_attentions=True).attentions[0][:, 0, -1] > 0
        assert seen.tolist() == [[True] * 4 + [False] * 2 + [True], [True] * 7]

    def test_the_mask_is_not_needed(self, model):
        assert torch.equal(model(IDS, MASK).embeds, model(IDS).embeds)


class TestWriting(WritingTowerSuite):
    model_class, auto_class = HfvlmCoCaTextModel, AutoModelForCausalLM

    def config(self):
        return HfvlmCoCaTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "context": Context(torch.randn(2, 5, 32))}

    def test_halves_must_be_parts(self):
        with pytest.raises(StrictDataclassClassValidationError, match="multimodal_layers 4 must be a part"):
            HfvlmCoCaTextConfig(**TEXT | {"multimodal_layers": 4})
        with pytest.raises(StrictDataclassClassValidationError, match="32 is not a multiple of multimodal_heads 3"):
            HfvlmCoCaTextConfig(**TEXT | {"multimodal_heads": 3})


class TestModel(ContrastiveCaptionerSuite):
    model_class, limit = HfvlmCoCaModel, 16

    def config(self):
        return HfvlmCoCaConfig(vision_config=VISION, text_config=TEXT)

    def test_records_hidden_states_and_attentions(self, model, batch):
        output = model(**batch, output_hidden_states=True)
        assert len(output.vision_model_output.hidden_states) == 3
        assert len(output.text_model_output.hidden_states) == 3

    def test_captioning_goes_on_from_what_was_read(self, model, batch):
        output = model(**batch, return_loss=True)
        written = model.text_model(IDS, None, model.read(batch["pixel_values"])).logits
        close(output.logits, written, 1e-5, "logits")

    def test_the_first_query_is_compared_and_the_others_written_from(self, model, batch):
        context = model.read(batch["pixel_values"])
        assert context.tokens.shape == (2, 4, 32)
        tokens = model.get_image_features(batch["pixel_values"]).last_hidden_state
        assert torch.equal(context.tokens, tokens[:, 1:])

    def test_other_auto_classes_find_it(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for auto in (AutoModel, AutoModelForImageTextToText):
            assert type(auto.from_pretrained(tmp_path)) is HfvlmCoCaModel

    def test_widths_must_agree(self):
        with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs: 16"):
            HfvlmCoCaConfig(vision_config=VISION | {"projection_dim": 16}, text_config=TEXT)
        with pytest.raises(StrictDataclassClassValidationError, match="The pooler's tokens are 16 wide"):
            HfvlmCoCaConfig(vision_config=VISION | {"projection_dim": 16}, text_config=TEXT | {"projection_dim": 16})

    def test_recipes_adapt_both_kinds_of_attention(self, model, batch):
        expected = model(**batch, return_loss=True).loss
        tuned = hfvlm.lora(model, "text+scale", quiet=True)
        close(tuned(**batch, return_loss=True).loss, expected, 1e-6, "at the start")
        tuned(**batch, return_loss=True).loss.backward()
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
        parts = ("text_model.layers", "text_model.multimodal_layers", "text_model.grounding_layers", "logit_scale")
        assert all(any(part in name for part in parts) for name in trained)
        assert all(any(part in name for name in trained) for part in parts)
        adapters = {name: p.grad for name, p in tuned.named_parameters() if "lora_B" in name}
        assert all(grad.abs().max() > 0 for grad in adapters.values())


# Files, texts, pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file in open_clip's layout, its configuration and its vocabulary, converted; and the model it came from."""
    torch.manual_seed(0)
    source = tmp_path_factory.mktemp("open_clip")
    model = HfvlmCoCaModel(hfvlm.load_preset("coca/tiny").make_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = restore_keys(model.state_dict(), coca.keys_for(model.config))
    save_file({k: v.contiguous().clone() for k, v in state.items()}, source / "open_clip_model.safetensors")
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": ORIGINAL, "preprocess_cfg": PIXELS}))
    vocabulary = SAMPLES / "bpe_simple_vocab.txt.gz"
    output = tmp_path_factory.mktemp("ours") / "coca"
    return hfvlm.convert(source, "coca", output, vocabulary=vocabulary), model


SAMPLES = files("hfvlm.samples") / "clip-tiny"
ORIGINAL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 9,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 632,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 24, "vocab_size": 632, "width": 64, "heads": 2, "layers": 2},
    "custom_text": True,
}
PIXELS = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("L", (20, 50), 90)


def test_released_files_become_folders(folder):
    path, model = folder
    again = AutoModel.from_pretrained(path)
    assert type(again) is HfvlmCoCaModel
    same(again.state_dict(), model.state_dict(), exact=True)
    beside = {"dtype": None, "licence": None, "preset": None}  # what a conversion adds
    assert again.config.text_config.to_dict() | beside == model.config.text_config.to_dict() | beside
    processor = AutoProcessor.from_pretrained(path)
    assert processor.image_processor.image_mean == [0.5, 0.5, 0.5]
    assert all(check.passed for check in hfvlm.verify(path))


def test_what_no_release_has_is_refused():
    def changed(part, **options):
        return ORIGINAL | {part: ORIGINAL[part] | options}

    for original, words in (
        (changed("vision_cfg", attentional_pool="parallel"), "attentional_pool true"),
        (changed("text_cfg", embed_cls=False), "embed_cls"),
        (changed("text_cfg", hf_model_name="roberta-base"), "text_cfg: hfvlm does not implement hf_model_name"),
        (changed("multimodal_cfg", ls_init_value=0.1), "ls_init_value"),
    ):
        with pytest.raises(UnsupportedOriginalError, match=words):
            coca.config_from_original(original, {})
    with pytest.raises(UnsupportedOriginalError, match="transformers has no CoCa"):
        coca.keys_for(HfvlmCoCaConfig(), "transformers")


def test_texts_are_padded_to_the_full_length_with_a_piece_that_stays_a_piece(folder):
    tokenizer = AutoProcessor.from_pretrained(folder[0]).tokenizer
    assert type(tokenizer) is HfvlmCoCaTokenizer
    plain = tokenizer("a red circle! yes!no", padding=False)["input_ids"]
    for options in ({}, {"padding": True}, {"padding": "max_length"}):
        padded = tokenizer(["a red circle! yes!no", "a"], **options)
        assert padded["input_ids"][0] == plain + [PAD] * (24 - len(plain))
        assert sum(padded["attention_mask"][0]) == len(plain)
    assert tokenizer.decode(padded["input_ids"][0], skip_special_tokens=True).strip() == "a red circle ! yes ! no"
    assert tokenizer.decode([PAD, PAD, *plain], skip_special_tokens=True).strip() == "a red circle ! yes ! no"
    assert PAD not in plain


def test_captions_and_labels(folder):
    path, model = folder
    processor = AutoProcessor.from_pretrained(path)
    inputs = processor.captions([RED, BLUE], ["a red square", "a"])
    assert inputs["labels"].shape == inputs["input_ids"].shape == (2, 24)
    assert (inputs["labels"] == -100).tolist() == (inputs["attention_mask"] == 0).tolist()
    del inputs["attention_mask"]
    loss = model(**inputs).loss
    del inputs["labels"]
    close(model(**inputs, return_loss=True).loss, loss, 1e-6, "loss")
    written = model.generate(processor(images=[RED, BLUE])["pixel_values"], max_length=8)
    captions = processor.decode_captions(written)
    assert len(captions) == 2
    assert not any("<|" in caption for caption in captions)


def test_the_trainer_trains_both_losses(folder, tmp_path):
    path, _ = folder
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    rows = [{"image": image, "text": text} for image, text in ((RED, "a red square"), (BLUE, "a"))] * 2

    def collate(batch):
        return dict(processor.captions([row["image"] for row in batch], [row["text"] for row in batch]))

    arguments = hfvlm.ContrastiveTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, mini_batch_size=2, max_steps=2, report_to="none", use_cpu=True
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = hfvlm.ContrastiveTrainer(
        model, arguments, collate, train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in ("projection", "lm_head", "class_token", "grounding_layers", "logit_scale"):
        assert any(part in name for name in moved), part
    metrics = trainer.evaluate()
    with torch.no_grad():
        close(torch.tensor(metrics["eval_loss"]), model.eval()(**collate(rows)).loss, 1e-5, "loss of the whole set")


def test_the_stock_pipelines(folder):
    path, model = folder
    processor = AutoProcessor.from_pretrained(path)
    classify = pipeline("zero-shot-image-classification", model=str(path))
    labels = ["red", "a blue circle"]
    scores = {row["label"]: row["score"] for row in classify(RED, candidate_labels=labels, hypothesis_template="{}")}
    expected = model(**processor(images=RED, text=labels)).logits_per_image.softmax(dim=-1)[0]
    close(torch.tensor([scores[label] for label in labels]), expected, 1e-5, "scores")
    write = pipeline("image-text-to-text", model=str(path))
    text = write(RED, text="a red", return_full_text=False)[0]["generated_text"]
    ids = model.generate(**processor(images=RED, text="a red"), max_length=24)
    assert processor.decode_captions(ids)[0].removeprefix("a red").strip() == text.strip()
    assert len(write([RED, BLUE], text=["a", "a red"], max_new_tokens=2)) == 2


def test_the_towers_of_a_folder_load_alone(folder):
    path, model = folder
    alone = HfvlmCoCaTextModel.from_pretrained(path).eval()
    ids = AutoProcessor.from_pretrained(path)(text=["a red circle"])["input_ids"]
    same(tensors(alone(ids)), tensors(model.text_model(ids)), 1e-6)
