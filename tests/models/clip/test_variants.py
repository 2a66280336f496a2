"""The towers of CLIPA, MetaCLIP 2 and MobileCLIP 2."""

import pytest
import torch
from transformers import AutoModel

from hfvlm.models.clip import (
    HfvlmCLIPATextConfig,
    HfvlmCLIPATextModel,
    HfvlmCLIPAVisionConfig,
    HfvlmCLIPAVisionModel,
    HfvlmCLIPBidirectionalTextConfig,
    HfvlmCLIPBidirectionalTextModel,
    HfvlmCLIPConfig,
    HfvlmCLIPModel,
    HfvlmMetaCLIP2TextConfig,
    HfvlmMetaCLIP2TextModel,
)
from tests.models.clip.test_modeling import IDS, TEXT, VISION
from tests.support.suite import ModelSuite, PartSuite, close

CLIPA = TEXT | {"bos_token_id": 3, "eos_token_id": None, "pad_token_id": 0}
METACLIP2 = TEXT | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
PADDED = torch.tensor([[3, 9, 8, 0, 0, 0, 0, 0], [3, 9, 8, 7, 6, 5, 4, 11], [3, 0, 0, 0, 0, 0, 0, 0]])


class TestCLIPA(ModelSuite):
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


class TestCLIPAVision(PartSuite):
    model_class, auto_class = HfvlmCLIPAVisionModel, AutoModel

    def config(self):
        return HfvlmCLIPAVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_patches_are_pooled_and_then_normed(self, model, batch):
        output = model(**batch)
        close(output.pooler_output, model.post_norm(output.last_hidden_state[:, 1:].mean(1)), 1e-6, "pooled")
        assert not any(name.startswith("pre_norm") for name in model.state_dict())


class TestBidirectionalText(PartSuite):
    model_class, auto_class = HfvlmCLIPBidirectionalTextModel, AutoModel

    def config(self):
        return HfvlmCLIPBidirectionalTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": torch.nn.functional.pad(IDS, (0, 3))}

    def test_the_end_token_is_pooled_and_padding_is_read(self, model, batch):
        ids, ends = batch["input_ids"], [2, 4, 3]
        output = model(ids)
        close(output.pooler_output, output.last_hidden_state[range(3), ends], 1e-6, "pooled")
        changed = ids.clone()
        changed[:, -1] = 5
        assert not torch.allclose(model(changed).pooler_output, output.pooler_output)
        close(model(ids, pooled_only=True).pooler_output, output.pooler_output, 1e-6, "pooled alone")


class TestMetaCLIP2Text(PartSuite):
    model_class, auto_class = HfvlmMetaCLIP2TextModel, AutoModel

    def config(self):
        return HfvlmMetaCLIP2TextConfig(**METACLIP2)

    def inputs(self):
        return {"input_ids": torch.tensor([[0, 9, 2, 1, 1], [0, 40, 41, 2, 2], [0, 8, 9, 10, 11]])}

    def test_the_first_end_is_pooled_or_the_first_token(self, model, batch):
        output = model(**batch)
        close(output.pooler_output, output.last_hidden_state[range(3), [2, 3, 0]], 1e-6, "pooled")
        close(model(**batch, pooled_only=True).pooler_output, output.pooler_output, 1e-6, "pooled alone")

    def test_padding_may_come_first(self, model, batch):
        ids = torch.tensor([[1, 1, 0, 9, 2], [0, 40, 41, 2, 2], [1, 0, 8, 9, 10]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
        close(model(ids, mask).pooler_output, model(**batch).pooler_output, 1e-5, "pooled")


def test_clipa_warns_of_short_texts():
    model = HfvlmCLIPATextModel(HfvlmCLIPATextConfig(**CLIPA)).eval()
    close(model(PADDED).embeds[1:2], model(PADDED[1:2]).embeds, 1e-5, "alone")
    with pytest.raises(ValueError, match="9 tokens.*positions for 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
