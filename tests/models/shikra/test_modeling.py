import pytest
import torch
from transformers import AutoModelForImageTextToText

from hfvlm.models.shikra import HfvlmShikraConfig, HfvlmShikraForConditionalGeneration
from tests.support.generation import GenerationSuite
from tests.support.suite import ModelSuite, close

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "projection_dim": None}
TEXT = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
PATCH, START, END = 57, 58, 59
IMAGE = [START, *[PATCH] * 4, END]


class TestShikra(GenerationSuite, ModelSuite):
    test_compiles_as_one_graph = test_decoding_compiles_as_one_graph = None  # its parts are LLaVA's
    model_class, auto_class = HfvlmShikraForConditionalGeneration, AutoModelForImageTextToText
    # The layers after the one that is read have no part in anything.
    lora_layers = [f"layers.{i}.{part}_proj" for i in (0, 1) for part in ("attention.q", "self_attn.q", "self_attn.v")]

    def config(self):
        return HfvlmShikraConfig(vision_config=VISION, text_config=TEXT, image_token_id=PATCH)

    def inputs(self):
        ids = torch.tensor([[1, 5, *IMAGE, 7, 8, 9], [1, 6, *IMAGE, 3, 2, 4], [1, 9, *IMAGE, 9, 8, 7]])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids >= PATCH, -100)}

    def test_every_image_of_a_text_changes_the_output(self, model, batch):
        """The original uses the last alone."""
        ids = torch.tensor([[1, *IMAGE, 7, *IMAGE, 8]])
        with torch.no_grad():
            embeds = model.embed(ids, model.encode_media({"pixel_values": batch["pixel_values"][:2]}))
            first, second = model.get_image_features(batch["pixel_values"][:2]).pooler_output
        close(embeds[0, 2:6], first, 0.0, "first")
        close(embeds[0, 9:13], second, 0.0, "second")

    def test_unused_layers_are_not_computed(self, model, batch):
        seen = []
        for i, layer in enumerate(model.vision_model.layers):
            layer.register_forward_hook(lambda *_, i=i: seen.append(i))
        model(**batch)
        assert seen == [0, 1]

    def test_a_layer_that_does_not_exist_is_refused(self):
        with pytest.raises(Exception, match="vision_feature_layer -9 is no hidden state of a tower of 3 layers"):
            HfvlmShikraConfig(vision_config=VISION, text_config=TEXT, vision_feature_layer=-9)

    def test_an_image_has_a_placeholder_for_each_patch(self):
        assert self.config().count_tokens() == 4
        assert HfvlmShikraConfig().count_tokens() == 256
