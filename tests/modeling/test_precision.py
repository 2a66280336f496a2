"""Models in half precision: temperatures stay exact, and similarities are compared in float32."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hfvlm.presets import load_preset
from hfvlm.samples import scenes

ARCHITECTURES = (
    "align", "blip", "blip2", "clip", "coca", "filip", "flava", "imagebind", "languagebind", "mammut", "siglip",
    "wukong",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_temperatures_of_new_models_are_exact(architecture, dtype):
    config = load_preset(f"{architecture}/tiny").make_config()
    model, expected = AutoModel.from_config(config, dtype=dtype), AutoModel.from_config(config, dtype=torch.float32)
    assert model.dtype == dtype
    scales = {name: p for name, p in model.named_parameters() if "logit_scale" in name or "summary_scale" in name}
    assert bool(scales) == (architecture != "blip2")
    for name, scale in scales.items():
        assert scale.dtype == torch.float32, name
        assert torch.equal(scale, expected.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_modalities_are_compared_in_single_precision(dtype, imagebind_folder):
    model = AutoModel.from_pretrained(imagebind_folder, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(imagebind_folder)
    random = np.random.RandomState(0)
    images = [Image.fromarray(random.randint(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    inputs = processor(images=images, text=["a", "b c", "d"], depth=[random.rand(40, 40) * 4 + 1] * 3, padding=True)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    for name in ("image", "depth"):
        logits, scale = output[f"logits_per_{name}"], output.text_scale.float() * output[f"{name}_scale"].float()
        assert logits.dtype == torch.float32
        expected = output[f"{name}_embeds"].float() @ output.text_embeds.float().t() * scale
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert output.logits("image", "depth").dtype == torch.float32
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_towers_are_compared_in_single_precision(dtype, clip_folder):
    model = AutoModel.from_pretrained(clip_folder, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(clip_folder)
    images = [kind.render(np.random.RandomState(0)) for kind in scenes.all_scenes()[:3]]
    inputs = processor(images=images, text=["a", "b"], padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        output = model(**inputs)
        expected = output.image_embeds.float() @ output.text_embeds.float().t() * model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model.float()(**inputs | {"pixel_values": inputs["pixel_values"].float()})
        expected = output.image_embeds.float(), output.text_embeds.float()
    torch.testing.assert_close(output.logits_per_image, expected[0] @ expected[1].t() * model.logit_scale.exp())


def test_the_shipped_imagebind_classifies_in_half_precision():
    folder = str(files("hfvlm.samples") / "imagebind-tiny")
    image = scenes.all_scenes()[0].render(np.random.RandomState(0))
    labels = ["circle", "square", "cross"]
    found = {
        dtype: pipeline("zero-shot-image-classification", folder, dtype=dtype)(image, candidate_labels=labels)
        for dtype in (torch.float16, torch.float32)
    }
    one, two = ({row["label"]: row["score"] for row in rows} for rows in found.values())
    assert one == pytest.approx(two, abs=5e-3)
