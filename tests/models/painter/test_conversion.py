"""Files as the authors released them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageToImage

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.painter import config_from_original, keys_for
from hfvlm.models.painter import HfvlmPainterConfig, HfvlmPainterModel
from tests.models.painter.test_modeling import CONFIG

# The original's decoder takes four layers of twenty-four.
WHOLE = CONFIG | {
    "num_hidden_layers": 24,
    "merge_index": 2,
    "intermediate_hidden_state_indices": [5, 11, 17, 23],
    "window_indices": [1, 20],
    "drop_path_rate": 0.1,
}


def released(path, **options):
    """A file of a model's weights in the authors' names."""
    torch.manual_seed(0)
    model = HfvlmPainterModel(HfvlmPainterConfig(**WHOLE | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = restore_keys(model.state_dict(), keys_for(model.config))
    torch.save({"model": {key: tensor.clone() for key, tensor in tensors.items()}, "epoch": 14}, path)
    return model


def test_a_checkpoint_to_a_painter(tmp_path):
    """Its shapes say all that there is to say, windows among it."""
    model = released(tmp_path / "painter.pth")
    hfvlm.convert(tmp_path / "painter.pth", "painter", tmp_path / "painter")
    assert [check for check in hfvlm.verify(tmp_path / "painter") if not check.passed] == []
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path / "painter")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert (list(loaded.config.image_size), list(loaded.config.window_indices)) == ([32, 16], [1, 20])
    painter = hfvlm.Painter.from_pretrained(tmp_path / "painter", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    assert painter(image, (image, image)).size == (30, 20)


def test_options_that_shapes_do_not_say(tmp_path):
    released(tmp_path / "painter.pth", use_relative_positions=False, residual_indices=[3])
    tensors = torch.load(tmp_path / "painter.pth")["model"]
    options = {
        "num_heads": 2,
        "img_size": [32, 16],
        "window_size": 3,
        "window_block_indexes": [1, 20],
        "loss_func": "l1",
    }
    config = config_from_original({"config": options}, tensors)
    assert config == HfvlmPainterConfig(
        **WHOLE | {"use_relative_positions": False, "residual_indices": [3], "pixel_loss": "l1"}
    )
    # The release's factory passes lists of indices, which are none.
    nested = config_from_original({"config": options | {"window_block_indexes": [[1], [20]]}}, tensors)
    assert nested.window_indices == []
    for name, value in (("made_up", 1), ("use_abs_pos", False), ("loss_func", "huber")):
        with pytest.raises(UnsupportedOriginalError, match=name):
            config_from_original({"config": options | {name: value}}, tensors)
