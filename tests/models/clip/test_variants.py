"""The towers of CLIPA, MetaCLIP 2 and MobileCLIP 2."""

import pytest
import torch
from transformers import AutoModel

from hfvlm.models.clip import (
    HfvlmCLIPBidirectionalTextConfig,
    HfvlmCLIPBidirectionalTextModel,
    HfvlmCLIPConfig,
    HfvlmCLIPModel,
    HfvlmMetaCLIP2TextConfig,
    HfvlmMetaCLIP2TextModel,
)
from tests.models.clip.test_modeling import IDS, TEXT, VISION
from tests.support.suite import PartSuite, close

CLIPA = TEXT | {"bos_token_id": 3, "eos_token_id": None, "pad_token_id": 0}
METACLIP2 = TEXT | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
PADDED = torch.tensor([[3, 9, 8, 0, 0, 0, 0, 0], [3, 9, 8, 7, 6, 5, 4, 11], [3, 0, 0, 0, 0, 0, 0, 0]])


class TestCLIPA(PartSuite):
    model_class, auto_class = HfvlmCLIPModel, AutoModel

    def config(self):
        vision, text = VISION | {"model_type": "hfvlm_clipa_vision"}, CLIPA | {"model_type": "hfvlm_clipa_text"}
        return HfvlmCLIPConfig(vision_config=vision, text_config=text)

    def inputs(self):
        return {"input_ids": PADDED, "pixel_values": torch.randn(3, 3, 28, 28)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_padding_is_read_and_pooled(self, model):
        changed = PADDED.clone()
        changed[0, -1] = 9
        first, second = (model.get_text_features(ids).pooler_output for ids in (PADDED, changed))
        assert not torch.allclose(first[0], second[0])
        close(first[1:], second[1:], 1e-6, "other texts")
        x = model.text_model(PADDED)
        assert torch.equal(x.pooler_output, x.last_hidden_state[:, -1])

    def test_patches_are_pooled_and_then_normed(self, model, batch):
        tower = model.vision_model
        output = tower(batch["pixel_values"])
        close(output.pooler_output, tower.post_norm(output.last_hidden_state[:, 1:].mean(1)), 1e-6, "pooled")
        assert not any(name.startswith("pre_norm") for name in tower.state_dict())

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match="9 tokens.*positions for 8"):
            model.text_model(torch.zeros(1, 9, dtype=torch.long))


def pooled_alone(model, ids, expected):
    close(model(ids, pooled_only=True).pooler_output, expected, 1e-6, "pooled alone")


def test_a_bidirectional_tower_pools_the_end_token_and_reads_padding():
    model = HfvlmCLIPBidirectionalTextModel(HfvlmCLIPBidirectionalTextConfig(**TEXT)).eval()
    ids = torch.nn.functional.pad(IDS, (0, 3))
    output = model(ids)
    close(output.pooler_output, output.last_hidden_state[range(3), [2, 4, 3]], 1e-6, "pooled")
    pooled_alone(model, ids, output.pooler_output)
    changed = ids.clone()
    changed[:, -1] = 5
    assert not torch.allclose(model(changed).pooler_output, output.pooler_output)


def test_metaclip2_pools_the_first_end_or_the_first_token():
    model = HfvlmMetaCLIP2TextModel(HfvlmMetaCLIP2TextConfig(**METACLIP2)).eval()
    ids = torch.tensor([[0, 9, 2, 1, 1], [0, 40, 41, 2, 2], [0, 8, 9, 10, 11]])
    output = model(ids)
    close(output.pooler_output, output.last_hidden_state[range(3), [2, 3, 0]], 1e-6, "pooled")
    pooled_alone(model, ids, output.pooler_output)
    padded = torch.tensor([[1, 1, 0, 9, 2], [0, 40, 41, 2, 2], [1, 0, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    close(model(padded, mask).pooler_output, output.pooler_output, 1e-5, "padded before the text")
