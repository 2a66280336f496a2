"""Texts that are padded on the left are embedded as they are alone, or refused by name."""

import pytest
import torch

from hfvlm.presets import load_preset
from hfvlm.registry import architectures

# Text towers that were trained on padding and read it: alone means padded on the right to full length.
FULL = ("siglip", "coca", "mammut")
LENGTH, SHORT = 12, 7


def dual_encoders():
    return [name for name, found in architectures().items() if hasattr(model_class(found), "get_text_features")]


def model_class(architecture):
    return getattr(architecture, architecture.models["AutoModel"][0])


def tiny(name):
    architecture = architectures()[name]
    config = load_preset(f"{name}/tiny").make_config()
    torch.manual_seed(0)
    model = model_class(architecture)._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough to matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, getattr(config, "text_config", config)


def texts(config, pad):
    """A text and another of full length, padded on the right."""
    ids = torch.randint(5, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    end = config.eos_token_id if getattr(config, "eos_token_id", None) is not None else 61
    ids[0, SHORT - 1], ids[1, -1] = end, end
    mask = torch.ones_like(ids)
    mask[0, SHORT:] = 0
    return ids.masked_fill(mask == 0, pad), mask


def test_there_are_dual_encoders():
    known = {"clip", "siglip", "align", "filip", "wukong", "flava", "imagebind", "languagebind", "coca"}
    assert known <= {*dual_encoders()}


@pytest.mark.parametrize("name", dual_encoders())
@torch.no_grad()
def test_padding_on_the_left_is_as_none(name):
    model, config = tiny(name)
    pad = getattr(config, "pad_token_id", None)
    ids, mask = texts(config, 0 if pad is None else pad)
    left = [torch.stack([rows[0].roll(LENGTH - SHORT), rows[1]]) for rows in (ids, mask)]
    found = model.get_text_features(left[0], attention_mask=left[1]).pooler_output
    expected = model.get_text_features(ids, attention_mask=mask).pooler_output
    if found.ndim == 3:  # an embedding for each token, perhaps with zeros up to the tower's length
        found, expected = found[0, LENGTH - SHORT : LENGTH], expected[0, :SHORT]
    assert torch.allclose(found, expected, atol=1e-5)
    if name not in FULL:
        alone = model.get_text_features(ids[:1, :SHORT], attention_mask=mask[:1, :SHORT]).pooler_output[0]
        alone = alone[:SHORT] if alone.ndim == 2 else alone
        assert torch.allclose(found if found.ndim == 1 or found.shape == alone.shape else found[0], alone, atol=1e-5)
    other = model.get_text_features(ids[:1].flip(1), attention_mask=torch.ones_like(mask[:1])).pooler_output[0]
    assert not torch.allclose(other[:SHORT] if other.ndim == 2 else other, expected[0], atol=1e-2)


@pytest.mark.parametrize("name", ["clip", "align"])
@torch.no_grad()
def test_nothing_depends_on_the_data_where_a_graph_is_traced(name):
    model, config = tiny(name)
    ids, mask = texts(config, config.pad_token_id or 0)
    tower = model.text_model
    program = torch.export.export(tower, (ids,), {"attention_mask": mask})
    left = [rows.roll(LENGTH - SHORT, dims=1) for rows in (ids[:1].repeat(2, 1), mask[:1].repeat(2, 1))]
    expected = tower(left[0], attention_mask=left[1]).pooler_output
    assert torch.allclose(program.module()(left[0], attention_mask=left[1]).pooler_output, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["coca", "mammut"])
def test_captions_padded_on_the_left_train_as_on_the_right(name):
    model, config = tiny(name)
    ids, mask = texts(config, config.pad_token_id)
    pixels = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2)
    left = [torch.stack([rows[0].roll(LENGTH - SHORT), rows[1]]) for rows in (ids, mask)]
    right = model(ids, pixels, attention_mask=mask, return_loss=True)
    found = model(left[0], pixels, attention_mask=left[1], return_loss=True)
    assert torch.allclose(found.loss, right.loss, atol=1e-5)
    assert torch.allclose(found.logits[0].roll(SHORT - LENGTH, dims=0), right.logits[0], atol=1e-5)
