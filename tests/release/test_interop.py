"""transformers' own CLIP and SigLIP: folders go both ways, and outputs, pixels and ids are equal."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import hfvlm
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.models.clip import HfvlmCLIPConfig, HfvlmCLIPImageProcessor, HfvlmCLIPModel
from hfvlm.models.siglip import HfvlmSigLIPImageProcessor, HfvlmSigLIPNaFlexImageProcessor
from hfvlm.release.sources import conversion_of
from tests.support.paths import OURS
from tests.support.suite import close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 14}


def natives() -> list:
    text = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    text |= {"pad_token_id": 49}
    clip = CLIPModel(CLIPConfig(vision_config=dict(VISION), text_config=dict(text), projection_dim=16))
    # Folders released before transformers 4.33 say that end-of-text is 2, and mean the largest id.
    legacy = text | {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    old = CLIPModel(CLIPConfig(vision_config=dict(VISION), text_config=legacy, projection_dim=16))
    siglip = SiglipModel(SiglipConfig(vision_config=dict(VISION), text_config=dict(text)))
    naflex = SIZES | {"num_patches": 16, "patch_size": 4}
    siglip2 = Siglip2Model(Siglip2Config(vision_config=naflex, text_config=dict(text)))
    return [("clip", clip), ("clip", old), ("siglip", siglip), ("siglip", siglip2)]


def inputs_for(native):
    torch.manual_seed(1)
    ids = torch.randint(3, 48, (3, 8))
    ids[0, 4:] = ids[1, -1] = ids[2, 6:] = 49
    if not isinstance(native, Siglip2Model):
        return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 28, 28)}
    shapes = torch.tensor([[2, 5], [2, 3], [3, 3]])
    mask = (torch.arange(10) < shapes.prod(dim=1, keepdim=True)).long()
    pixels = {"pixel_values": torch.randn(3, 10, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"input_ids": ids, **pixels}


@pytest.mark.parametrize(("name", "native"), natives(), ids=["clip", "clip-legacy", "siglip", "siglip2"])
def test_folders_go_both_ways(name, native, tmp_path):
    native = native.eval()
    for parameter in native.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.numel() > 1 else None
    native.save_pretrained(tmp_path / "native")
    hfvlm.convert(tmp_path / "native", name, tmp_path / "ours", vocabulary="none")
    ours = AutoModel.from_pretrained(tmp_path / "ours").eval()
    batch = inputs_for(native)
    with torch.no_grad():
        expected, actual = native(**batch, return_loss=True), ours(**batch, return_loss=True)
        pictures = {k: v for k, v in batch.items() if k != "input_ids"}
        features = native.get_image_features(**pictures), ours.get_image_features(**pictures)
    for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        close(actual[key], expected[key], 1e-5, key)
    close(features[1].pooler_output, features[0].pooler_output, 1e-5, "features")
    if name == "clip":
        close(actual.loss, expected.loss, 1e-5, "loss")
    again = back(ours, name, type(native), tmp_path)
    for key, value in native.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with torch.no_grad():
        close(again(**batch).logits_per_image, expected.logits_per_image, 1e-5, "exported")


def back(ours, name, native_class, tmp_path):
    """`export` without a tokenizer: the weights and the configuration."""
    from hfvlm.checkpoints.key_table import restore_keys
    from hfvlm.release.sources import conversion_of

    conversion = conversion_of(name)
    tensors = restore_keys(ours.state_dict(), conversion.keys_for(ours.config, "transformers"))
    config = conversion.export.config(ours.config)
    config.save_pretrained(tmp_path / "exported")
    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()},
        tmp_path / "exported" / "model.safetensors",
        {"format": "pt"},
    )
    model, info = native_class.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_export_writes_a_folder_that_the_native_classes_load(clip_folder, tmp_path):
    hfvlm.export(clip_folder, tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["architectures"] == ["CLIPModel"]
    native, ours = CLIPModel.from_pretrained(tmp_path / "native").eval(), AutoModel.from_pretrained(clip_folder).eval()
    theirs, mine = CLIPProcessor.from_pretrained(tmp_path / "native"), hfvlm_processor(clip_folder)
    pictures = [Image.new("RGB", (40, 40), "red"), Image.new("RGB", (60, 40), "blue")]
    texts = ["A handwritten THREE", "a small blue circle"]
    left = theirs(images=pictures, text=texts, padding=True, return_tensors="pt")
    right = mine(images=pictures, text=texts)
    assert torch.equal(left["input_ids"], right["input_ids"])
    with torch.no_grad():
        close(ours(**right).logits_per_image, native(**left).logits_per_image, 1e-5, "logits")
    again = hfvlm.convert(tmp_path / "native", "clip", tmp_path / "back")
    stored, original = load_file(again / "model.safetensors"), load_file(clip_folder / "model.safetensors")
    assert all(torch.equal(stored[key], original[key]) for key in original)
    assert torch.equal(hfvlm_processor(again)(text=texts)["input_ids"], right["input_ids"])


def hfvlm_processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def test_a_siglip_folder_exports_with_its_vocabulary(tmp_path):
    native = SiglipModel(
        SiglipConfig(vision_config=dict(VISION), text_config=SIZES | {"vocab_size": 90, "max_position_embeddings": 16})
    )
    native.save_pretrained(tmp_path / "native")
    vocabulary = OURS / "siglip" / "processor-tokenizer-tiny" / "tiny.model"
    hfvlm.convert(tmp_path / "native", "siglip", tmp_path / "ours", vocabulary=vocabulary)
    hfvlm.export(tmp_path / "ours", tmp_path / "exported")
    theirs, mine = SiglipProcessor.from_pretrained(tmp_path / "exported"), hfvlm_processor(tmp_path / "ours")
    texts = ["A Photo, of a CAT!", "don't_stop the_music", "the mountain " * 20]
    left = theirs(text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(left, mine(text=texts)["input_ids"])


def test_resnets_are_not_exported(tmp_path):
    resnet = {
        "model_type": "hfvlm_clip_resnet",
        "image_size": 32,
        "stem_size": 4,
        "depths": [1] * 4,
        "projection_dim": 8,
    }
    text = SIZES | {"vocab_size": 50, "projection_dim": 8, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
    config = HfvlmCLIPConfig(vision_config=resnet | {"num_attention_heads": 2}, text_config=text)
    HfvlmCLIPModel(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(UnsupportedOriginalError, match="no ResNet tower"):
        hfvlm.export(tmp_path / "resnet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="not to 'keras'"):
        hfvlm.export(tmp_path / "resnet", tmp_path / "out", to="keras")


@pytest.mark.parametrize("kind", ["hfvlm_clip_eva02", "hfvlm_clipa_vision"])
def test_towers_of_other_classes_are_not_exported(kind):
    text = SIZES | {"vocab_size": 50, "projection_dim": 8, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
    vision = SIZES | {"model_type": kind, "image_size": 28, "patch_size": 14, "projection_dim": 8}
    config = HfvlmCLIPConfig(vision_config=vision, text_config=text)
    name = type(config.vision_config).__name__
    with pytest.raises(UnsupportedOriginalError, match=f"CLIPModel has no tower of {name}"):
        conversion_of("clip").export.config(config)


@pytest.mark.parametrize("size", [(640, 480), (500, 375), (500, 333), (224, 224), (100, 100), (224, 448)])
def test_pixels_equal_the_native_pil_backend(size):
    """At even margins; at odd ones the native processor crops one pixel off the original (see the goldens)."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for native, ours in (
        (CLIPImageProcessorPil(), HfvlmCLIPImageProcessor()),
        (SiglipImageProcessorPil(), HfvlmSigLIPImageProcessor()),
        (Siglip2ImageProcessorPil(), HfvlmSigLIPNaFlexImageProcessor()),
    ):
        left, right = native(image, return_tensors="pt"), ours(image, return_tensors="pt")
        for key in left:
            close(right[key].float(), left[key].float(), 1e-5, f"{type(ours).__name__} {key}")


@pytest.mark.parametrize("seed", range(5))
def test_naflex_grids_equal_the_native_ones(seed):
    random = np.random.RandomState(seed)
    pictures = [Image.new("RGB", tuple(int(v) for v in random.randint(1, 900, 2))) for _ in range(8)]
    for patch_size, most in ((16, 256), (14, 100), (16, 1)):
        native = Siglip2ImageProcessorPil(patch_size=patch_size, max_num_patches=most)
        ours = HfvlmSigLIPNaFlexImageProcessor(patch_size=patch_size, max_num_patches=most)
        left, right = (p(pictures, return_tensors="pt") for p in (native, ours))
        assert torch.equal(left["spatial_shapes"], right["spatial_shapes"])
        assert torch.equal(left["pixel_attention_mask"].long(), right["pixel_attention_mask"])
