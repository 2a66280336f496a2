"""What the bases of vision towers and dual encoders promise."""

import inspect

import pytest
import torch

from hfvlm.models.align import HfvlmALIGNModel
from hfvlm.models.clip import HfvlmCLIPModel
from hfvlm.models.imagebind import (
    HfvlmImageBindAudioConfig,
    HfvlmImageBindAudioModel,
    HfvlmImageBindVisionConfig,
    HfvlmImageBindVisionModel,
)
from hfvlm.models.siglip import HfvlmSigLIPModel, HfvlmSigLIPVisionConfig, HfvlmSigLIPVisionModel
from hfvlm.modules.similarity import LogitScale, Temperature
from hfvlm.presets import load_preset
from tests.support.suite import close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 24, "patch_size": 8}


def test_resizing_positions_for_good_equals_interpolating_them():
    model = HfvlmSigLIPVisionModel(HfvlmSigLIPVisionConfig(**VISION)).eval()
    images = torch.randn(2, 3, 40, 32)
    expected = model(images, interpolate_pos_encoding=True).embeds
    model.resize_positions((40, 32))
    assert model.config.grid == (5, 4)
    close(model(images).embeds, expected, 1e-6, "embeds")


def test_every_moment_of_a_clip_is_resized():
    config = HfvlmImageBindVisionConfig(**VISION, num_frames=4, projection_dim=16)
    model = HfvlmImageBindVisionModel(config).eval()
    with torch.no_grad():
        model.position[1:10], model.position[10:] = 1, 2
    model.resize_positions(40)
    assert model(torch.randn(1, 3, 4, 40, 40)).last_hidden_state.shape == (1, 1 + 2 * 25, 32)
    close(model.position[1:26], torch.ones(25, 32), 1e-6, "first moment")
    close(model.position[26:], torch.full((25, 32), 2.0), 1e-6, "second moment")


def test_positions_of_sensors_are_not_resized():
    sizes = {"num_mel_bins": 20, "num_frames": 26, "patch_size": 8, "stride": 6}
    model = HfvlmImageBindAudioModel(HfvlmImageBindAudioConfig(**SIZES, **sizes, projection_dim=16))
    with pytest.raises(ValueError, match="cannot be interpolated"):
        model.resize_positions(32)


@pytest.mark.parametrize(
    ("model_class", "names"),
    [
        (HfvlmCLIPModel, {"interpolate_pos_encoding"}),
        (HfvlmALIGNModel, {"token_type_ids"}),
        (HfvlmSigLIPModel, {"interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes"}),
    ],
)
def test_the_signature_names_the_inputs_of_single_towers(model_class, names):
    """transformers' Trainer drops the columns of a data set that are not in it."""
    own = {"self", "input_ids", "pixel_values", "attention_mask", "return_loss", "kwargs"}
    assert set(inspect.signature(model_class.forward).parameters) == own | names


def test_an_input_reaches_the_tower_that_it_is_for():
    model = HfvlmALIGNModel(load_preset("align/tiny").make_config()).eval()
    ids, images = torch.tensor([[1, 2, 3]]), torch.rand(1, 3, 32, 32)
    types = torch.ones_like(ids)
    output = model(ids, images, token_type_ids=types)
    close(
        output.text_model_output.pooler_output,
        model.get_text_features(ids, token_type_ids=types).pooler_output,
        1e-6,
        "",
    )
    assert not torch.allclose(output.text_embeds, model(ids, images).text_embeds)
    with pytest.raises(TypeError, match="interpolate_pos_encoding"):
        model(ids, images, interpolate_pos_encoding=True)


@pytest.mark.parametrize("scale_class", [LogitScale, Temperature])
def test_temperatures_are_bounded_on_either_side(scale_class):
    scale = scale_class(1.0)
    for value, bounds, factor in ((9.0, (None, 5.0), 5.0), (0.1, (2.0, None), 2.0), (3.0, (2.0, 5.0), 3.0)):
        scale.scale.data.fill_(torch.tensor(value).log() if scale_class is LogitScale else 1 / value)
        scale.clamp_(*bounds)
        assert scale.exp().item() == pytest.approx(factor)
