"""Videos go through a tower a part at a time, and come out as they would at once."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modules import parts
from hfvlm.modules.parts import in_parts


def tower(sizes):
    def run(values, scale=1.0):
        sizes.append(len(values))
        return TowerOutput(
            last_hidden_state=values * scale, pooler_output=values.sum(1), hidden_states=(values, -values)
        )

    return run


def test_parts_are_joined_to_the_output_of_the_whole():
    values, sizes = torch.randn(70, 3), []
    with torch.no_grad():
        output = in_parts(tower(sizes), values, scale=2.0)
    assert sizes == [32, 32, 6]
    assert torch.equal(output.last_hidden_state, values * 2)
    assert torch.equal(output.pooler_output, values.sum(1))
    assert torch.equal(output.hidden_states[1], -values)
    assert output.embeds is None
    sizes.clear()
    in_parts(tower(sizes), values)  # gradients need all of it at once
    assert sizes == [70]
    with torch.no_grad():
        in_parts(tower(sizes), values[:9], frames=16)
    assert sizes[1:] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("most", [2, 4, 8])
def test_a_models_videos_are_embedded_alike(imagebind_folder, monkeypatch, most):
    model, processor = (
        AutoModel.from_pretrained(imagebind_folder).eval(),
        AutoProcessor.from_pretrained(imagebind_folder),
    )
    video = np.random.RandomState(0).randint(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    inputs = processor(videos=[(video, 4.0), (video[::-1].copy(), 4.0)])
    with torch.no_grad():
        expected = model.get_video_features(**inputs).pooler_output
        monkeypatch.setattr(parts, "FRAMES", most)
        seen = []
        model.vision_model.register_forward_hook(lambda *a: seen.append(len(a[2].pooler_output)))
        found = model.get_video_features(**inputs).pooler_output
    assert max(seen) == max(most // 2, 1)
    assert torch.allclose(found, expected, atol=1e-6)
