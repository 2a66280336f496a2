"""ALIGN, transformers' own ALIGN, and the way between the two."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AlignConfig,
    AlignModel,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    BertTokenizer,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.align import EFFICIENTNETS, config_from_original, keys_for
from hfvlm.conversion.interop.align import config_to_transformers
from hfvlm.models.align import (
    HfvlmALIGNConfig,
    HfvlmALIGNForImageClassification,
    HfvlmALIGNImageProcessor,
    HfvlmALIGNModel,
    HfvlmALIGNTextConfig,
    HfvlmALIGNTextModel,
    HfvlmALIGNTokenizer,
    HfvlmALIGNVisionConfig,
    HfvlmALIGNVisionModel,
)
from hfvlm.presets import load_preset
from hfvlm.release.plans import empty_model
from tests.conftest import SHIPPED
from tests.support.paths import EXAMPLES, OURS
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close

STAGES = {
    "kernel_sizes": [3, 3, 5],
    "out_channels": [16, 24, 40],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 1],
    "expand_ratios": [1, 6, 6],
}
VISION = STAGES | {"width_coefficient": 0.5, "depth_coefficient": 1.0, "drop_connect_rate": 0.0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "projection_dim": 24,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
IDS = torch.tensor([[2, 7, 3, 0, 0], [2, 9, 8, 7, 3], [2, 9, 9, 3, 0]])
MASK = (IDS > 0).long()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "##s", "dog", ",", "1", "2"]


class EfficientNetSuite(ModelSuite):
    """Batch norms that have seen a batch: before, an EfficientNet's output is next to nothing."""

    records = ("hidden_states",)

    @pytest.fixture
    def shallow(self, model):
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        torch.manual_seed(1)
        batch = cls().inputs()
        model = cls.model_class(cls().config()).train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(**batch)
        for norm in norms:
            norm.momentum = 0.01
        return model.eval()

    def test_every_weight_is_initialised_from_nothing(self):
        super().test_every_weight_is_initialised_from_nothing(self.model_class(self.config()).eval())


class TestVision(EfficientNetSuite):
    model_class, auto_class = HfvlmALIGNVisionModel, AutoModel
    lora_layers = ["excite.fc1", "excite.fc2"]
    test_compiles_as_one_graph = test_exports = None  # the whole holds its graph

    def config(self):
        return HfvlmALIGNVisionConfig(**VISION, projection_dim=16)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 33, 47)}

    def test_hidden_states_are_those_of_every_block(self, model, batch):
        states = model(**batch, output_hidden_states=True).hidden_states
        assert len(states) == len(model.layers) + 1
        assert [state.shape[1] for state in states] == [16, 8, 16, 16, 24]

    def test_stochastic_depth_grows_and_drops_whole_rows(self):
        model = HfvlmALIGNVisionModel(HfvlmALIGNVisionConfig(**VISION | {"drop_connect_rate": 0.8}))
        assert [round(layer.drop_path.rate, 6) for layer in model.layers] == [0, 0.2, 0.4, 0.6]
        second = model.layers[2].train()
        torch.nn.init.ones_(second.project.norm.bias)
        changed = (second(x := torch.randn(64, 16, 5, 5)) - x).flatten(1).abs().amax(dim=1) > 0
        assert 0 < changed.sum() < 64

    def test_lists_must_agree(self):
        with pytest.raises(StrictDataclassClassValidationError, match="'strides': 2"):
            HfvlmALIGNVisionConfig(**VISION | {"strides": [1, 2]})


# Channels of the stem and of the last block, and the number of blocks, as the paper's code gives them.
@pytest.mark.parametrize(
    ("name", "stem", "last", "blocks"),
    [
        ("efficientnet-b0", 32, 320, 16),
        ("efficientnet-b1", 32, 320, 23),
        ("efficientnet-b2", 32, 352, 23),
        ("efficientnet-b3", 40, 384, 26),
        ("efficientnet-b4", 48, 448, 32),
        ("efficientnet-b5", 48, 512, 39),
        ("efficientnet-b6", 56, 576, 45),
        ("efficientnet-b7", 64, 640, 55),
    ],
)
def test_every_efficientnet(name, stem, last, blocks):
    """Their sizes; and they are known again by the shapes of their tensors."""
    width, depth = EFFICIENTNETS[name]
    dim = None if name == "efficientnet-b7" else 640
    vision = HfvlmALIGNVisionConfig(width_coefficient=width, depth_coefficient=depth, projection_dim=dim)
    assert (vision.stem_size, vision.hidden_size, len(vision.blocks)) == (stem, last, blocks)
    text = TEXT | {"hidden_size": 128, "projection_dim": 640, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    config = HfvlmALIGNConfig(vision_config=vision, text_config=text)
    state = empty_model(config).state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    originals = restore_tensorflow(state, config)
    found = config_from_original({}, originals)
    assert found.to_dict() == config.to_dict()
    named = config_from_original({"arguments": {"img_encoder_name": name}}, originals)
    assert named.to_dict() == config.to_dict()


def restore_tensorflow(state, config):
    """The table for TensorFlow has no way back for norms, whose shape it does not know; here (C,) will do."""
    names = ["dense/kernel", "dense_1/kernel"][: 1 if config.vision_config.projection_dim is None else 2]
    rows = [row for row in keys_for(config, "tensorflow", names) if row.source != "temperature"]
    return restore_keys(state, [row._replace(change=None) if "_bn/" in row.source else row for row in rows])


def test_an_unknown_efficientnet_is_named():
    shapes = {
        "dense/kernel": (64, 64),
        "tf_bert_model/bert/embeddings/word_embeddings/weight": (10, 64),
        "tf_bert_model/bert/embeddings/position_embeddings/embeddings": (8, 64),
        "tf_bert_model/bert/encoder/layer_._0/intermediate/dense/bias": (128,),
    }
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with pytest.raises(UnsupportedOriginalError, match="in the file is none of efficientnet-b0"):
        config_from_original({}, state)
    with pytest.raises(UnsupportedOriginalError, match="efficientnet-l2 is none of efficientnet-b0"):
        config_from_original({"arguments": {"img_encoder_name": "EfficientNet-L2"}}, state)


class TestText(PartSuite):
    model_class, auto_class = HfvlmALIGNTextModel, AutoModel

    def config(self):
        return HfvlmALIGNTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK}

    def test_padding_is_never_read(self, model, batch):
        changed = IDS.masked_fill(IDS == 0, 11)
        close(model(changed, MASK).pooler_output, model(**batch).pooler_output, 1e-6, "pooled")
        short = model(IDS[:1, :3]).pooler_output
        close(short, model(**batch).pooler_output[:1], 1e-5, "without its padding")

    def test_token_types_count(self, model, batch):
        types = torch.ones_like(IDS)
        assert not torch.allclose(model(**batch, token_type_ids=types).pooler_output, model(**batch).pooler_output)

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match="9 tokens.*positions for 8"):
            model(torch.zeros(1, 9, dtype=torch.long))


class TestALIGN(EfficientNetSuite):
    model_class, auto_class = HfvlmALIGNModel, AutoModelForZeroShotImageClassification

    def config(self):
        return HfvlmALIGNConfig(vision_config=VISION | {"projection_dim": 24}, text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "pixel_values": torch.randn(3, 3, 32, 32)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_loss_is_that_of_the_original(self, model, batch):
        output = model(**batch, return_loss=True)
        target = torch.arange(3)
        expected = [
            F.cross_entropy(m, target, label_smoothing=0.1) for m in (output.logits_per_image, output.logits_per_text)
        ]
        close(output.loss, sum(expected), 1e-6, "loss")
        close(model.contrast(output), output.loss, 0.0, "from the output alone")

    def test_similarities_are_divided_by_the_temperature(self, model, batch):
        torch.nn.init.constant_(model.logit_scale.scale, 0.05)
        output = model(**batch)
        close(output.logits_per_image, output.image_embeds @ output.text_embeds.t() / 0.05, 1e-6, "logits")

    def test_widths_must_agree(self):
        with pytest.raises(StrictDataclassClassValidationError, match="24 dimensions.*images have 20"):
            HfvlmALIGNConfig(vision_config=VISION | {"projection_dim": 20}, text_config=TEXT)


class TestImageClassification(EfficientNetSuite, ImageClassifierSuite):
    model_class, auto_class = HfvlmALIGNForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmALIGNModel
    lora_layers = ["excite.fc1", "excite.fc2"]

    def config(self):
        return HfvlmALIGNConfig(vision_config=dict(VISION), text_config=TEXT | {"projection_dim": 24}, num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 32, 32)}


# LoRA


def trained(model):
    return {name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad}


def test_recipes():
    def fresh():
        return HfvlmALIGNModel(load_preset("align/tiny").make_config())

    vision = trained(hfvlm.lora(fresh(), "vision", quiet=True))
    assert {name.split(".lora_")[0].split(".", 3)[-1] for name in vision} == {"excite.fc1", "excite.fc2"}
    text = trained(hfvlm.lora(fresh(), "text+scale", quiet=True))
    assert {name.split(".")[-4] for name in text if "lora_" in name} == {"q_proj", "v_proj"}
    assert {name for name in text if "lora_" not in name} == {"logit_scale.modules_to_save.default.scale"}
    convolutions = hfvlm.lora(fresh(), "vision", layers=["expand.conv", "project.conv"], quiet=True)
    assert all("expand.conv" in name or "project.conv" in name for name in trained(convolutions))


# Processor


def test_pixels_are_those_of_transformers_with_antialias():
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    native = EfficientNetImageProcessorPil(
        do_center_crop=True,
        resample=2,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (375, 500, 3), dtype=np.uint8))
    expected = native(image, return_tensors="pt")["pixel_values"].float()
    close(
        HfvlmALIGNImageProcessor(antialias=True)(image, return_tensors="pt")["pixel_values"],
        expected,
        1e-5,
        "pixels",
    )
    exact = HfvlmALIGNImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert (exact - expected).abs().max() > 0.1


def test_settings_of_the_image_processor():
    processor = HfvlmALIGNImageProcessor(size=20, resized=24)
    image = Image.new("RGB", (50, 30), "white")
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 20)
    as_it_is = processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    assert as_it_is.shape == (1, 3, 30, 50)
    assert (as_it_is == 1).all()
    with pytest.raises(ValueError, match="no shorter than size"):
        HfvlmALIGNImageProcessor(size=20, resized=19)


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


def test_files_of_others_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint of align.*clip \(openai\) knows"):
        hfvlm.convert(SHIPPED / "clip-tiny.pt", "align", tmp_path / "out", vocabulary="none")


def test_texts_are_folded(vocabulary, tmp_path):
    tokenizer = HfvlmALIGNTokenizer.from_vocabulary(vocabulary)
    for text, pieces in (
        ("A  Photo\tof CÁTS, ½", "a photo of cat ##s , [UNK]"),
        ("\uff11 \ufb00 d\u200bog\u00ad", "1 [UNK] dog"),
        ("[SEP] cat[MASK]", "[UNK] [UNK] [UNK] cat [UNK] [UNK] [UNK]"),
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *pieces.split(), "[SEP]"], text
    batch = tokenizer(["a cat", "a photo of a dog " * 30], return_tensors="pt")
    assert batch["input_ids"].shape == (2, 64)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 64]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = HfvlmALIGNTokenizer.from_pretrained(tmp_path / "saved")
    assert again("Cáts")["input_ids"] == tokenizer("cats")["input_ids"]
    assert HfvlmALIGNTokenizer.from_vocabulary(tmp_path / "saved" / "tokenizer.json")("cats") == tokenizer("cats")


def test_other_vocabularies_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"not BERT's vocabulary, it has no \[CLS\], \[MASK\]"):
        HfvlmALIGNTokenizer.from_vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not the tokenizer.json of a BERT"):
        HfvlmALIGNTokenizer.from_vocabulary(tmp_path / "tokenizer.json")


# transformers


@pytest.fixture
def native():
    vision = VISION | {"in_channels": [32, 16, 24], "hidden_dim": 64}
    config = AlignConfig(
        vision_config=vision,
        text_config=SIZES | {"vocab_size": len(PIECES), "max_position_embeddings": 64},
        projection_dim=24,
        temperature_init_value=0.5,
    )
    model = AlignModel(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.ndim and tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1) if "norm" in name or "bn" in name else torch.nn.init.normal_(
                tensor, std=0.2
            )
    return model


def test_folders_go_both_ways(native, vocabulary, tmp_path):
    native.save_pretrained(tmp_path / "native")
    (tmp_path / "native" / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 32, "width": 32}, "size": {"height": 40, "width": 40}, "do_rescale": True})
    )
    hfvlm.convert(tmp_path / "native", "align", tmp_path / "ours", vocabulary=vocabulary)
    ours, processor = (
        AutoModel.from_pretrained(tmp_path / "ours").eval(),
        AutoProcessor.from_pretrained(tmp_path / "ours"),
    )
    assert (processor.image_processor.size["height"], processor.image_processor.resized) == (32, 40)
    hfvlm.export(tmp_path / "ours", tmp_path / "back")
    back, info = AlignModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in native.state_dict().items():
        if "text_model.pooler" not in key:
            assert torch.equal(back.state_dict()[key], value), key

    batch = processor(images=[Image.new("RGB", (64, 50), c) for c in ("red", "blue")], text=["a cat", "a dog, cats"])
    theirs = BertTokenizer.from_pretrained(tmp_path / "back")(
        ["a cat", "a dog, cats"], padding=True, return_tensors="pt"
    )
    saved = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert saved["processor_class"] == "AlignProcessor"
    assert saved["image_processor"]["crop_size"] == {"height": 32, "width": 32}
    assert torch.equal(theirs["input_ids"], batch["input_ids"])
    with torch.no_grad():
        actual = ours(**batch, return_loss=True)
        for model in (native, back.eval()):
            expected = model(**batch, return_loss=True)
            for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
                close(actual[name], expected[name], 1e-5, name)
            close(actual.loss, 2 * expected.loss, 1e-5, "loss")


def test_what_transformers_lacks_is_refused(native):
    config = HfvlmALIGNConfig(vision_config=VISION | {"projection_dim": 24}, text_config=dict(TEXT))
    with pytest.raises(UnsupportedOriginalError, match="no image projection"):
        config_to_transformers(config)
    odd = native.config.to_dict()
    odd["vision_config"]["depthwise_padding"] = [1]
    with pytest.raises(UnsupportedOriginalError, match="no depthwise_padding"):
        config_from_original(odd, {})
    odd["vision_config"]["in_channels"] = [32, 16, 16]
    with pytest.raises(UnsupportedOriginalError, match="do not follow"):
        config_from_original(odd, {})


# TensorFlow


@pytest.fixture
def tensorflow_folder(tmp_path):
    """A checkpoint that TensorFlow itself wrote, converted."""
    source = OURS / "align" / "b7-odd-size"
    case = json.loads((source / "case.json").read_text())
    words = PIECES + [f"word{i}" for i in range(case["arguments"]["vocab_size"] - len(PIECES))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    options = {"original": case, "vocabulary": tmp_path / "vocab.txt"}
    return hfvlm.convert(source, "align", tmp_path / "align", **options)


def test_a_tensorflow_checkpoint_to_a_pipeline(tensorflow_folder):
    record = json.loads((tensorflow_folder / "conversion.json").read_text())
    assert record["layout"] == "tensorflow"
    assert len(record["source"]["sha256"]) == 64
    failed = [check for check in hfvlm.verify(tensorflow_folder) if not check.passed]
    assert failed == []
    classify = pipeline("zero-shot-image-classification", model=str(tensorflow_folder))
    answer = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["cat", "dog"])
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)


def test_the_example_ranks_images(tensorflow_folder, tmp_path, monkeypatch, capsys):
    pictures = []
    for colour in ("red", "green", "blue"):
        pictures.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (40, 30), colour).save(pictures[-1])
    example = str(EXAMPLES / "search_with_align.py")
    monkeypatch.setattr(sys, "argv", [example, str(tensorflow_folder), "a photo of a cat", *map(str, pictures)])
    runpy.run_path(example, run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert {line.split()[-1].rpartition("/")[2] for line in lines} == {"red.png", "green.png", "blue.png"}
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
