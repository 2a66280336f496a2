import json
from importlib.resources import files

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

import hfvlm
from hfvlm.checkpoints.key_table import convert_keys, restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import mammut
from hfvlm.losses import captioning_loss, focal_contrastive_loss
from hfvlm.models.mammut import (
    HfvlmMaMMUTConfig,
    HfvlmMaMMUTModel,
    HfvlmMaMMUTTextConfig,
    HfvlmMaMMUTTextModel,
    HfvlmMaMMUTVisionConfig,
    HfvlmMaMMUTVisionModel,
)
from hfvlm.models.mammut.modeling_mammut import cropped
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
VISION = SIZES | {"num_hidden_layers": 2, "image_size": 24, "patch_size": 8, "projection_dim": 32}
TEXT = SIZES | {"num_hidden_layers": 4, "vocab_size": 50, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": START, "eos_token_id": END}
BARE = {"grounded_mlp": False, "token_rows": 60}


class TestVision(VisionSuite):
    model_class, auto_class = HfvlmMaMMUTVisionModel, AutoModel

    def config(self):
        return HfvlmMaMMUTVisionConfig(**VISION)

    def test_positions_are_cropped_in_training_alone(self, batch):
        model = HfvlmMaMMUTVisionModel(HfvlmMaMMUTVisionConfig(**VISION | {"cropped_positions": 12}))
        torch.manual_seed(0)
        calm = model.eval()(**batch).embeds
        close(model(**batch).embeds, calm, 0.0, "always the same")
        first, second = (model.train()(**batch).embeds for _ in range(2))
        assert (first - calm).abs().max() > 1e-3
        assert (first - second).abs().max() > 1e-3
        first.sum().backward()
        assert model.position.grad.abs().max() > 0
        with pytest.raises(StrictDataclassClassValidationError, match="cropped_positions 2 is a grid smaller"):
            HfvlmMaMMUTVisionConfig(**VISION | {"cropped_positions": 2})

    def test_a_crop_keeps_directions(self):
        """Of a table that counts rows and columns, each crop counts upwards, within the whole."""
        y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        table = torch.cat([torch.full((1, 2), 9.0), torch.stack([y, x], dim=-1).flatten(0, 1)])
        sizes = set()
        for seed in range(20):
            torch.manual_seed(seed)
            part = cropped(table, (4, 4), 16)
            assert torch.equal(part[0], table[0])
            rows, columns = part[1:].reshape(4, 4, 2).unbind(-1)
            assert (rows.diff(dim=0) >= 0).all()
            assert (columns.diff(dim=1) >= 0).all()
            assert part[1:].min() >= 0
            assert part[1:].max() <= 3
            sizes.add(round(float(rows[-1, 0] - rows[0, 0]), 3))
        assert len(sizes) > 5


class TestContrastivePass(PartSuite):
    model_class, auto_class = HfvlmMaMMUTTextModel, AutoModel

    def config(self):
        return HfvlmMaMMUTTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def objective(self, model, batch):
        """Of both passes."""
        written = model(IDS, context=Context(torch.linspace(-1, 1, 192).sin().view(2, 3, 32)))
        return super().objective(model, batch) + written.logits.square().mean()

    def test_all_tokens_see_all_others_and_padding_counts(self, model):
        model.set_attn_implementation("eager")
        output = model(IDS, output_attentions=True)
        assert all((attention > 0).all() for attention in output.attentions)
        close(output.embeds, output.last_hidden_state.mean(dim=1), 1e-6, "mean")
        shorter = model(IDS[:1, :4]).embeds
        assert (shorter - output.embeds[:1]).abs().max() > 1e-3
        assert torch.equal(model(IDS, MASK).embeds, output.embeds)

    def test_the_image_is_not_looked_at(self, model):
        for layer in model.grounding_layers:
            layer.forward = None
        model(IDS)


class TestContrastivePassWithoutMLPs(TestContrastivePass):
    def config(self):
        return HfvlmMaMMUTTextConfig(**TEXT | BARE)

    def test_grounded_layers_have_none(self, model):
        assert [hasattr(layer, "mlp") for layer in model.layers] == [False, True, False, True]
        assert len(model.token.weight) == 60


class TestGenerativePass(WritingTowerSuite):
    model_class, auto_class = HfvlmMaMMUTTextModel, AutoModelForCausalLM

    def config(self):
        return HfvlmMaMMUTTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "context": Context(torch.randn(2, 5, 32))}

    def test_every_other_layer_is_grounded(self, model):
        assert len(model.grounding_layers) == 2
        order = []
        for name, layer in (*model.layers.named_children(), *model.grounding_layers.named_children()):
            kind = type(layer).__name__
            layer.register_forward_hook(lambda *_, place=(kind, name): order.append(place))
        model(IDS, context=Context(torch.ones(2, 5, 32)))
        plain, grounding = "PreNormLayer", "GroundingLayer"
        assert order == [
            *((plain, "0"), (grounding, "0"), (plain, "1")),
            *((plain, "2"), (grounding, "1"), (plain, "3")),
        ]


class TestModel(ContrastiveCaptionerSuite):
    model_class, limit = HfvlmMaMMUTModel, 16

    def config(self):
        return HfvlmMaMMUTConfig(vision_config=VISION, text_config=TEXT)

    def test_both_passes_share_their_weights(self, model, batch):
        output = model(**batch, return_loss=True)
        written = model.text_model(IDS, None, model.read(batch["pixel_values"])).logits
        close(output.logits, written, 1e-6, "logits")
        with torch.no_grad():
            model.text_model.layers[0].attention.v_proj.weight.neg_()
        changed = model(**batch, return_loss=True)
        assert (changed.text_embeds - output.text_embeds).abs().max() > 1e-3
        assert (changed.logits - output.logits).abs().max() > 1e-3

    def test_the_papers_loss_is_an_option(self, model, batch):
        model.config.pair_loss = "focal"
        output = model(**batch, return_loss=True)
        words = captioning_loss(output.logits[:, :-1], IDS.masked_fill(IDS == PAD, -100)[:, 1:])
        pairs = focal_contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
        close(output.loss, pairs + 2 * words, 1e-6, "loss")
        with pytest.raises(StrictDataclassClassValidationError, match="softmax or focal, not 'triplet'"):
            HfvlmMaMMUTConfig(vision_config=VISION, text_config=TEXT, pair_loss="triplet")

    def test_other_auto_classes_find_it(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for auto in (AutoModel, AutoModelForImageTextToText):
            assert type(auto.from_pretrained(tmp_path)) is HfvlmMaMMUTModel

    def test_widths_must_agree(self):
        with pytest.raises(StrictDataclassClassValidationError, match="projection_dim 16 must be"):
            HfvlmMaMMUTConfig(vision_config=VISION | {"projection_dim": 16}, text_config=TEXT)

    def test_recipes_adapt_both_kinds_of_attention(self, model, batch):
        expected = model(**batch, return_loss=True).loss
        tuned = hfvlm.lora(model, "vision+text", quiet=True)
        close(tuned(**batch, return_loss=True).loss, expected, 1e-6, "at the start")
        tuned(**batch, return_loss=True).loss.backward()
        adapters = {name: p.grad for name, p in tuned.named_parameters() if "lora_B" in name}
        assert any("grounding_layers" in name for name in adapters)
        assert all(grad.abs().max() > 0 for grad in adapters.values())
        assert all("lora" in name for name, p in tuned.named_parameters() if p.requires_grad)


# Files, texts, pipelines


SAMPLES = files("hfvlm.samples") / "clip-tiny"
ORIGINAL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "head_width": 32,
        "output_tokens": True,
        "pool_type": "avg_all",
        "final_ln_after_pool": True,
    },
    "text_cfg": {
        "heads": 2,
        "output_tokens": True,
        "cross_attn_ratio": 2,
        "does_full_decoding": True,
        "has_mlp": True,
    },
    "custom_text": True,
}
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("L", (20, 50), 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file as openMaMMUT's training writes it, converted; and the model it came from."""
    torch.manual_seed(0)
    source = tmp_path_factory.mktemp("openmammut") / "epoch_latest.pt"
    model = HfvlmMaMMUTModel(hfvlm.load_preset("mammut/tiny").make_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = restore_keys(model.state_dict(), mammut.keys_for(model.config))
    torch.save({"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, source)
    (source.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": ORIGINAL}))
    vocabulary = SAMPLES / "bpe_simple_vocab.txt.gz"
    output = tmp_path_factory.mktemp("ours") / "mammut"
    return hfvlm.convert(source, "mammut", output, vocabulary=vocabulary), model


def test_released_files_become_folders(folder):
    path, model = folder
    again = AutoModel.from_pretrained(path)
    assert type(again) is HfvlmMaMMUTModel
    same(again.state_dict(), model.state_dict(), exact=True)
    assert all(check.passed for check in hfvlm.verify(path))
    ids = AutoProcessor.from_pretrained(path)(text=["a red circle"])["input_ids"]
    alone = HfvlmMaMMUTTextModel.from_pretrained(path).eval()
    same(tensors(alone(ids)), tensors(model.text_model(ids)), 1e-6)


def test_a_layout_without_mlps_goes_both_ways():
    """Also where each layer is grounded, so that none has an MLP of its own."""
    for interval in (1, 2):
        config = HfvlmMaMMUTConfig(
            vision_config=VISION, text_config=TEXT | {"grounded_mlp": False, "grounding_interval": interval}
        )
        model = HfvlmMaMMUTModel(config)
        state = restore_keys(model.state_dict(), mammut.keys_for(config))
        options = {"has_mlp": False, "cross_attn_ratio": interval}
        again = mammut.config_from_original(changed("text_cfg", **options), state)
        assert (again.text_config.grounding_interval, again.text_config.grounded_mlp) == (interval, False)
        converted = convert_keys(state, mammut.keys_for(again), model.state_dict())
        same(converted, model.state_dict(), exact=True)


def changed(part, **options):
    return ORIGINAL | {part: ORIGINAL[part] | options}


def test_what_no_release_has_is_refused():
    for original, words in (
        (changed("vision_cfg", pool_type="tok"), "pool_type avg_all"),
        (changed("text_cfg", does_full_decoding=False), "does_full_decoding"),
        (changed("text_cfg", ls_init_value=0.1), "text_cfg: hfvlm does not implement ls_init_value"),
        (ORIGINAL | {"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
    ):
        with pytest.raises(UnsupportedOriginalError, match=words):
            mammut.config_from_original(original, {})
    with pytest.raises(UnsupportedOriginalError, match="transformers has no MaMMUT"):
        mammut.keys_for(HfvlmMaMMUTConfig(), "transformers")


def test_questions_are_prompts(folder):
    """Answering needs no head: the answer is what comes next."""
    path, model = folder
    processor = AutoProcessor.from_pretrained(path)
    questions, answers = ["a red square or", "a"], ["a blue circle", "red"]
    inputs = processor.captions([RED, BLUE], answers, questions)
    whole = processor(text=["a red square or a blue circle", "a red"])["input_ids"]
    assert torch.equal(inputs["input_ids"], whole)
    counted = [ids[labels != -100].tolist() for ids, labels in zip(whole, inputs["labels"], strict=True)]
    spoken = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in counted]
    assert spoken == answers
    assert all(ids[-1] == processor.tokenizer.eos_token_id for ids in counted)
    assert model(**inputs).text_lengths.tolist() == [len(ids) for ids in counted]
    prompts = processor(images=[RED, BLUE], text=questions)
    written = model.generate(**prompts, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    texts = processor.decode_captions(written)
    rest = processor.decode_captions(written, questions)
    assert [f"{questions[i // 2]} {text}".strip() for i, text in enumerate(rest)] == texts
    assert processor.decode_captions(whole, questions) == answers


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
    assert processor.decode_captions(ids, ["a red"])[0] == text.strip()
