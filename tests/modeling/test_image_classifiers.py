"""A linear layer on the tower of images of every architecture that has one to compare or to caption with."""

import pytest
import torch
from transformers import AutoModelForImageClassification

import hfvlm
from hfvlm.registry import architectures
from tests.support.suite import ImageClassifierSuite, close

# Chat models have the towers of others.
CHAT = {"flamingo", "llava", "pali", "pg_video_llava", "shikra", "video_chatgpt"}
# They read no image by itself: regions, or pairs; or draw it.
WITHOUT = CHAT | {"dalle_mini", "painter", "vilbert"}


class OnTiny(ImageClassifierSuite):
    """Sizes of the tiny preset."""

    auto_class = AutoModelForImageClassification
    # The towers are in the graphs of the models that have them.
    test_compiles_as_one_graph = test_exports = None
    architecture: str

    def config(self):
        config = hfvlm.load_preset(f"{self.architecture}/tiny").make_config()
        config.num_labels = 4
        config.architectures = [self.model_class.__name__]
        return config

    def inputs(self):
        edge = self.config().vision_config.image_size
        return {"pixel_values": torch.randn(3, 3, edge, edge)}


class TestCoCa(OnTiny):
    model_class, whole_class = hfvlm.HfvlmCoCaForImageClassification, hfvlm.HfvlmCoCaModel
    architecture = "coca"


class TestMaMMUT(OnTiny):
    model_class, whole_class = hfvlm.HfvlmMaMMUTForImageClassification, hfvlm.HfvlmMaMMUTModel
    architecture = "mammut"


class TestBLIP(OnTiny):
    model_class, whole_class = hfvlm.HfvlmBLIPForImageClassification, hfvlm.HfvlmBLIPModel
    architecture = "blip"


class TestBLIP2(OnTiny):
    model_class, whole_class = hfvlm.HfvlmBLIP2ForImageClassification, hfvlm.HfvlmBLIP2ForImageTextRetrieval
    architecture = "blip2"


class TestImageBind(OnTiny):
    model_class, whole_class = hfvlm.HfvlmImageBindForImageClassification, hfvlm.HfvlmImageBindModel
    architecture = "imagebind"


class TestLanguageBind(OnTiny):
    model_class, whole_class = hfvlm.HfvlmLanguageBindForImageClassification, hfvlm.HfvlmLanguageBindModel
    architecture = "languagebind"


class TestMERLOTReserve(OnTiny):
    model_class = hfvlm.HfvlmMERLOTReserveForImageClassification
    whole_class = hfvlm.HfvlmMERLOTReserveModel
    architecture = "merlot_reserve"

    def inputs(self):
        return {"pixel_values": torch.rand(3, 3, *self.config().vision_config.image_size)}

    def test_towers_alone_equal_those_inside(self, model, batch, tmp_path):
        """The classifier has neither the projection nor the pooled tokens."""
        model.save_pretrained(tmp_path)
        alone, info = type(model.vision_model).from_pretrained(tmp_path, output_loading_info=True)
        assert all(key.startswith(("encoder.projection.", "pool.")) for key in info.pop("missing_keys"))
        assert not any(info.values()), info
        with torch.no_grad():
            found, expected = (tower.eval()(**batch).pooler_output for tower in (alone, model.vision_model))
        close(found, expected, 1e-6, "summary")


def test_every_architecture_with_images_has_a_classifier():
    found = {name for name, known in architectures().items() if "AutoModelForImageClassification" in known.models}
    assert found == set(architectures()) - WITHOUT


def test_a_model_without_images_is_refused():
    config = hfvlm.load_preset("languagebind/tiny").make_config()
    config.vision_config = None
    with pytest.raises(ValueError, match="the model has no tower of images"):
        hfvlm.HfvlmLanguageBindForImageClassification(config)
