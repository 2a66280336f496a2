"""FLAVA's files: the authors', OpenAI's codebook, transformers' folders and the way back."""

import json
import runpy
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertTokenizer,
    FlavaConfig,
    FlavaForPreTraining,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    FlavaModel,
    FlavaProcessor,
    pipeline,
)
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.flava import config_from_original, keys_for
from hfvlm.conversion.interop.flava import config_to_transformers
from hfvlm.models.flava import HfvlmFLAVAImageProcessor
from hfvlm.presets.cards import write_card
from tests.support.paths import EXAMPLES
from tests.support.suite import close

EXAMPLE = str(EXAMPLES / "fill_gaps_with_flava.py")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CODEBOOK = {"hidden_size": 8, "vocab_size": 30, "num_blocks_per_group": 1}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "##s", "dog"]
IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 10, 6, 3], [2, 5, 6, 10, 3]])
HIDDEN_IDS = IDS.masked_fill((IDS == 8) | (IDS == 10), 4)
HIDDEN = torch.tensor([[[1, 1, 0], [0, 0, 0], [0, 0, 1]]] * 3)


def native_config(**fields):
    return FlavaConfig(
        image_config=SIZES | {"image_size": 24, "patch_size": 8, "vocab_size": 30},
        text_config=SIZES | {"vocab_size": len(PIECES), "max_position_embeddings": 16},
        multimodal_config=dict(SIZES),
        image_codebook_config=dict(CODEBOOK),
        hidden_size=32,
        projection_dim=16,
        **fields,
    )


def randomised(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, mean=float("norm" in name.lower() and "weight" in name), std=0.2)
    return model.eval()


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return tmp_path / "vocab.txt"


def same_weights(left, right):
    assert left.state_dict().keys() == right.state_dict().keys()
    for key, value in left.state_dict().items():
        assert torch.equal(right.state_dict()[key], value), key


def there_and_back(native, vocabulary, tmp_path):
    """Ours, and transformers' class of what ours was exported to."""
    native.save_pretrained(tmp_path / "native")
    hfvlm.convert(tmp_path / "native", "flava", tmp_path / "ours", vocabulary=vocabulary)
    hfvlm.export(tmp_path / "ours", tmp_path / "back")
    back, info = type(native).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    same_weights(native, back)
    return AutoModel.from_pretrained(tmp_path / "ours").eval(), back.eval()


def test_the_encoders_go_both_ways(vocabulary, tmp_path):
    native = randomised(FlavaModel(native_config()))
    ours, back = there_and_back(native, vocabulary, tmp_path)
    assert type(ours) is hfvlm.HfvlmFLAVAModel
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        for model in (native, back):
            expected = model(input_ids=IDS, pixel_values=pixels, output_hidden_states=True)
            both = ours.get_multimodal_features(IDS, pixels)
            close(both.last_hidden_state, expected.multimodal_embeddings, 1e-5, "multimodal")
            for kind, mine in (("image", ours.vision_model(pixels)), ("text", ours.text_model(IDS))):
                close(mine.last_hidden_state, expected[f"{kind}_embeddings"], 1e-5, kind)
                close(mine.pooler_output, expected[f"{kind}_output"].pooler_output, 1e-5, f"{kind} summary")
        image = native.get_image_features(pixels).pooler_output
        close(ours.get_image_features(pixels).pooler_output, image[:, 0] if image.ndim == 3 else image, 1e-5, "joint")
        close(ours.logit_scale.scale, native.logit_scale.reshape(1), 0.0, "temperature")
    saved = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert saved["processor_class"] == "FlavaProcessor"
    processor = FlavaProcessor(
        FlavaImageProcessorPil(**saved["image_processor"]), BertTokenizer.from_pretrained(tmp_path / "back")
    )
    mine = AutoProcessor.from_pretrained(tmp_path / "ours")
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 24, 3), dtype=np.uint8))
    left = processor(images=picture, text="a cats dog", return_codebook_pixels=True, return_tensors="pt")
    right = mine(images=picture, text="a cats dog", return_codebook_pixels=True, padding=False)
    assert torch.equal(left["input_ids"], right["input_ids"])
    for name in ("pixel_values", "codebook_pixel_values"):
        close(right[name], left[name].float(), 1e-5, name)
    masks = processor(images=picture, text="a", return_image_mask=True, return_tensors="pt")["bool_masked_pos"]
    assert masks.shape == (1, 3, 3)


def test_pretraining_goes_both_ways(vocabulary, tmp_path):
    native = randomised(FlavaForPreTraining(native_config(mlm_weight=2.0, itm_weight=0.5)))
    ours, back = there_and_back(native, vocabulary, tmp_path)
    assert type(ours) is hfvlm.HfvlmFLAVAForPreTraining
    labels = torch.where(HIDDEN_IDS != IDS, IDS, -100)
    image = {"pixel_values": torch.randn(3, 3, 24, 24), "codebook_pixel_values": torch.rand(3, 3, 24, 24)}
    image["bool_masked_pos"] = HIDDEN
    text = {"input_ids_masked": HIDDEN_IDS, "mlm_labels": labels}
    pairs = image | text | {"input_ids": IDS, "itm_labels": torch.tensor([1, 0, 1])}
    losses = {
        "mim": (image, "mim_loss"),
        "mlm": (text, "mlm_loss"),
        "itm": (pairs, "itm_loss"),
        "mmm_image": (pairs, "mmm_image_loss"),
        "mmm_text": (pairs, "mmm_text_loss"),
        "global_contrastive": (pairs, "contrastive_loss"),
    }
    with torch.no_grad():
        for model in (native, back):
            for theirs, (given, name) in losses.items():
                close(ours(**given)[name], model(**given, return_loss=True).loss_info[theirs], 1e-5, name)


def test_the_codebook_goes_both_ways(tmp_path):
    native = randomised(FlavaImageCodebook(FlavaImageCodebookConfig(**CODEBOOK)))
    ours, back = there_and_back(native, None, tmp_path)
    assert type(ours) is hfvlm.HfvlmFLAVACodebookModel
    pixels = HfvlmFLAVAImageProcessor.from_pretrained(tmp_path / "ours")(
        Image.new("RGB", (50, 40), "red"), return_codebook_pixels=True, return_tensors="pt"
    )
    with torch.no_grad():
        close(ours(pixels["codebook_pixel_values"]).logits, native(pixels["codebook_pixel_values"]), 1e-5, "logits")
        assert torch.equal(
            ours(pixels["codebook_pixel_values"]).codes, back.get_codebook_indices(pixels["codebook_pixel_values"])
        )
    with pytest.raises(ValueError, match="no processor of texts and images"):
        hfvlm.verify(tmp_path / "ours")
    card = write_card(tmp_path / "ours").read_text()
    assert "FLAVA" in card


def test_what_transformers_lacks_is_refused():
    config = hfvlm.load_preset("flava/tiny").make_config()
    config.architectures = ["HfvlmFLAVAForClassification"]
    for refused in (lambda: config_to_transformers(config), lambda: keys_for(config, "transformers")):
        with pytest.raises(UnsupportedOriginalError, match="no FLAVA like HfvlmFLAVAForClassification"):
            refused()
    odd = native_config().to_dict()
    with pytest.raises(UnsupportedOriginalError, match="qkv_bias"):
        config_from_original(odd | {"text_config": odd["text_config"] | {"qkv_bias": False}}, {})
    with pytest.raises(UnsupportedOriginalError, match="class token"):
        config_from_original(odd | {"multimodal_config": odd["multimodal_config"] | {"use_cls_token": False}}, {})
    with pytest.raises(UnsupportedOriginalError, match="colour_jitter"):
        config_from_original({"arguments": {"colour_jitter": 1}}, {})
    originals = authors_file(hfvlm.load_preset("flava/tiny").make_config())
    with pytest.raises(UnsupportedOriginalError, match="no activation torch.nn.Softshrink"):
        config_from_original({"arguments": {"image_intermediate_activation": "torch.nn.Softshrink"}}, originals)


# The authors' files


def authors_file(config):
    """The tiny preset's tensors by torchmultimodal's names, the biases that are there twice included."""
    model = randomised(AutoModel.from_config(config))
    tensors = restore_keys(model.state_dict(), keys_for(config))
    heads = [key.removesuffix(".decoder.bias") for key in tensors if key.endswith(".cls.decoder.bias")]
    return tensors | {f"{head}.bias": tensors[f"{head}.decoder.bias"] for head in heads}


def test_the_authors_file_converts_and_is_verified(tmp_path):
    config = hfvlm.load_preset("flava/tiny").make_config()
    config.text_config.vocab_size = len(PIECES)
    tensors = authors_file(config)
    torch.save(tensors, tmp_path / "flava.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    heads = {f"{name}_num_attention_heads": 2 for name in ("image", "text", "multimodal")}
    folder = hfvlm.convert(tmp_path / "flava.pt", "flava", tmp_path / "out", original={"arguments": heads})
    failed = [check for check in hfvlm.verify(folder) if not check.passed]
    assert failed == []
    model = AutoModel.from_pretrained(folder)
    assert type(model) is hfvlm.HfvlmFLAVAForPreTraining
    assert model.config.text_config.num_attention_heads == 2
    assert torch.equal(model.itm_head.classifier.weight, tensors["loss.itm_loss.cls.seq_relationship.weight"])
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    answer = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["cat", "dog"])
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)
    encoders = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    torch.save(encoders, tmp_path / "encoders.pt")
    folder = hfvlm.convert(tmp_path / "encoders.pt", "flava", tmp_path / "encoders", original={"arguments": heads})
    alone = AutoModel.from_pretrained(folder)
    assert type(alone) is hfvlm.HfvlmFLAVAModel
    pixels = torch.randn(2, 3, 32, 32)
    close(alone.get_image_features(pixels).pooler_output, model.get_image_features(pixels).pooler_output, 0.0, "image")
    assert alone.logit_scale.exp() == 1
    hfvlm.export(folder, tmp_path / "native")
    assert FlavaModel.from_pretrained(tmp_path / "native").logit_scale.exp() == 1


class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n_out, n_in, kw, kw)), nn.Parameter(torch.randn(n_out))
        self.kw, self.device = kw, torch.device("cpu")


class EncoderBlock(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = [(n_in, n_out // 4, 3), *[(n_out // 4, n_out // 4, 3)] * 2, (n_out // 4, n_out, 1)]
        convs = {f"conv_{i + 1}": Conv2d(*size) for i, size in enumerate(sizes)}
        self.res_path, self.post_gain = nn.Sequential(OrderedDict(relu_1=nn.ReLU(), **convs)), 1 / 64


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [8, 8, 16, 32, 64]
        groups = {
            f"group_{i}": nn.Sequential(
                OrderedDict(block_1=EncoderBlock(widths[i - 1], widths[i]), block_2=EncoderBlock(widths[i], widths[i]))
            )
            for i in range(1, 5)
        }
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(64, 20, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(3, 8, 7), **groups, output=output))


def test_the_codebook_as_openai_released_it(tmp_path, monkeypatch):
    """A whole pickled module, whose classes are not loaded."""
    package = types.ModuleType("dall_e.encoder")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        patch.setitem(sys.modules, "dall_e.encoder", package)
        for kind in (Conv2d, EncoderBlock, Encoder):
            patch.setattr(kind, "__module__", "dall_e.encoder")
            setattr(package, kind.__name__, kind)
        encoder = Encoder()
        torch.save(encoder, tmp_path / "encoder.pkl")
    hfvlm.convert(tmp_path / "encoder.pkl", "flava", tmp_path / "codebook", original={"arguments": {}})
    codebook = hfvlm.HfvlmFLAVACodebookModel.from_pretrained(tmp_path / "codebook")
    tensors = encoder.state_dict()
    assert torch.equal(codebook.groups[2][1].conv3.weight, tensors["blocks.group_3.block_2.res_path.conv_3.w"])
    assert torch.equal(codebook.groups[1][0].shortcut.bias, tensors["blocks.group_2.block_1.id_path.b"])
    config = hfvlm.load_preset("flava/tiny").make_config()
    config.codebook_config = codebook.config
    model = hfvlm.HfvlmFLAVAForPreTraining(config)
    model.codebook_model = codebook
    assert model.codes(torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4)).max() < 20


def test_the_example_fills_gaps(flava_folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    arguments = [str(flava_folder), str(tmp_path / "red.png"), "a [MASK] of [MASK]s", "--best", "2"]
    monkeypatch.setattr(sys, "argv", ["fill_gaps_with_flava.py", *arguments])
    runpy.run_path(EXAMPLE, run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *["text alone"] * 2,
        *["with the image"] * 2,
        "they belong together",
    ]
    assert all(line.count("%") == 2 for line in lines[:-1])
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "no gap"])
    with pytest.raises(SystemExit, match="has no"):
        runpy.run_path(EXAMPLE, run_name="__main__")
