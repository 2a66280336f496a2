import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

from hfvlm.models.siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPForImageClassification,
    HfvlmSigLIPModel,
    HfvlmSigLIPNaFlexVisionConfig,
    HfvlmSigLIPNaFlexVisionModel,
    HfvlmSigLIPTextConfig,
    HfvlmSigLIPTextModel,
    HfvlmSigLIPVisionConfig,
    HfvlmSigLIPVisionModel,
)
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 14}
NAFLEX = SIZES | {"model_type": "hfvlm_siglip_naflex_vision", "patch_size": 4, "num_patches": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 6, "projection_dim": 32}
IDS = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def patches():
    """Three images of 2 x 5, 2 x 3 and 3 x 3 patches, padded to ten."""
    shapes = torch.tensor([[2, 5], [2, 3], [3, 3]])
    mask = (torch.arange(10) < shapes.prod(dim=1, keepdim=True)).long()
    return {"pixel_values": torch.randn(3, 10, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}


class TestVision(PartSuite):
    model_class, auto_class = HfvlmSigLIPVisionModel, AutoModel

    def config(self):
        return HfvlmSigLIPVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_any_size_with_interpolated_positions(self, model, batch):
        close(
            model(**batch, interpolate_pos_encoding=True).pooler_output,
            model(**batch).pooler_output,
            1e-6,
            "same size",
        )
        assert model(torch.randn(1, 3, 42, 70), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 15, 32)
        with pytest.raises(ValueError, match="image_size 28"):
            model(torch.randn(1, 3, 42, 70))


class TestNaFlexVision(PartSuite):
    model_class, auto_class = HfvlmSigLIPNaFlexVisionModel, AutoModel

    def config(self):
        return HfvlmSigLIPNaFlexVisionConfig(**NAFLEX)

    def inputs(self):
        return patches()

    def test_padding_changes_nothing(self, model):
        batch = patches()
        short = {k: v[1:2, :6] if v.shape[-1] != 2 else v[1:2] for k, v in batch.items()}
        close(model(**short).pooler_output, model(**batch).pooler_output[1:2], 1e-5, "pooled")
        other = dict(batch) | {"pixel_values": batch["pixel_values"].clone()}
        other["pixel_values"][1, 6:] = 9.0
        close(model(**other).pooler_output, model(**batch).pooler_output, 1e-6, "pooled")

    def test_a_table_must_be_square(self):
        with pytest.raises(StrictDataclassClassValidationError, match="not the square of an integer"):
            HfvlmSigLIPNaFlexVisionConfig(num_patches=15)


class TestText(PartSuite):
    model_class, auto_class = HfvlmSigLIPTextModel, AutoModel

    def config(self):
        return HfvlmSigLIPTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def test_a_mask_is_ignored_as_in_training(self, model):
        mask = (torch.arange(6) < 3).long().expand(3, -1)
        close(model(IDS, mask).pooler_output, model(IDS).pooler_output, 0.0, "pooled")

    def test_short_texts_are_warned_about(self, model, caplog):
        logging.getLogger("transformers").propagate = True
        from transformers.utils import logging as host

        host.enable_propagation()
        host.warning_once.cache_clear()
        model(IDS[:, :4])
        assert "trained on texts padded to 6" in caplog.text


class TestTextWithoutHead(TestText):
    def config(self):
        return HfvlmSigLIPTextConfig(**TEXT | {"projection_dim": None})


class TestSigLIP(ModelSuite):
    model_class, auto_class = HfvlmSigLIPModel, AutoModelForZeroShotImageClassification

    def config(self):
        return HfvlmSigLIPConfig(vision_config=dict(VISION), text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 28, 28)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_pipelines_take_it_for_a_siglip(self):
        """transformers chooses sigmoid and padding to 64 by this word in the type."""
        assert "siglip" in self.config().model_type

    def test_widths_must_agree(self):
        with pytest.raises(
            StrictDataclassClassValidationError, match="hidden_size 32 in vision_config.* 16 in text_config"
        ):
            HfvlmSigLIPConfig(vision_config=dict(VISION), text_config=TEXT | {"projection_dim": 16})


class TestSigLIPNaFlex(TestSigLIP):
    def config(self):
        return HfvlmSigLIPConfig(vision_config=dict(NAFLEX), text_config=dict(TEXT))

    def inputs(self):
        return patches() | {"input_ids": IDS}


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmSigLIPForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmSigLIPModel

    def config(self):
        return HfvlmSigLIPConfig(vision_config=dict(VISION), text_config=dict(TEXT), num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}
