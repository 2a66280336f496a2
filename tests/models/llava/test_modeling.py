import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from hfvlm.models.llava import (
    HfvlmLLaVAConfig,
    HfvlmLLaVAForConditionalGeneration,
    HfvlmLLaVAForSequenceClassification,
)
from tests.support.generation import GenerationSuite
from tests.support.suite import ModelSuite, close

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "projection_dim": None}
TEXT = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
IMAGE = 60
GRID = [[28, 56], [56, 28], [56, 56]]


def row(start, count, *rest):
    return [1, *start, *[IMAGE] * count, *rest]


class TestLLaVA(GenerationSuite, ModelSuite):
    model_class, auto_class = HfvlmLLaVAForConditionalGeneration, AutoModelForImageTextToText
    # The layers after the one that is read have no part in anything.
    lora_layers = [f"layers.{i}.{part}_proj" for i in (0, 1) for part in ("attention.q", "self_attn.q", "self_attn.v")]

    def config(self):
        return HfvlmLLaVAConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE)

    def inputs(self):
        ids = [row([5], 4, 7, 8, 9), row([6], 4, 3, 2, 4), row([9], 4, 9, 8, 7)]
        return {
            "input_ids": torch.tensor(ids),
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones(3, len(ids[0]), dtype=torch.long),
        }

    def loss_inputs(self):
        return {"labels": torch.tensor([[-100] * 6 + [7, 8, 9], [-100] * 6 + [3, 2, 4], [-100] * 6 + [9, 8, 7]])}

    def test_unused_layers_are_not_computed(self, model, batch):
        seen = []
        for i, layer in enumerate(model.vision_model.layers):
            layer.register_forward_hook(lambda *_, i=i: seen.append(i))
        model(**batch)
        assert seen == [0, 1]
        assert not any(p.requires_grad for p in model.vision_model.layers[2].parameters())
        assert model.unused_modules == ["vision_model.layers.2", "vision_model.post_norm", "vision_model.projection"]

    @torch.no_grad()
    def test_all_layers_are_computed_for_those_who_look(self, model, batch):
        pixels = batch["pixel_values"]
        model.set_attn_implementation("eager")
        seen = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
        assert (len(seen.hidden_states), len(seen.attentions)) == (4, 3)
        assert torch.equal(seen.last_hidden_state, seen.hidden_states[model.config.vision_feature_layer])
        whole = model.vision_model(pixels)
        close(seen.hidden_states[-1], whole.last_hidden_state, 1e-6, "the last layer")
        plain = model.get_image_features(pixels)
        assert plain.hidden_states is None
        close(torch.stack(plain.pooler_output), torch.stack(seen.pooler_output), 1e-6, "features")

    def test_the_class_token_may_be_projected(self, batch):
        config = self.config()
        config.keep_class_token = True
        model = HfvlmLLaVAForConditionalGeneration(config)
        assert config.count_tokens() == 5
        assert [len(f) for f in model.get_image_features(batch["pixel_values"]).pooler_output] == [5, 5, 5]


class TestReward(ModelSuite):
    model_class, auto_class = HfvlmLLaVAForSequenceClassification, AutoModelForSequenceClassification
    lora_layers = TestLLaVA.lora_layers
    implementations = ("sdpa",)
    inputs = TestLLaVA.inputs

    def config(self):
        return HfvlmLLaVAConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, num_labels=1)

    def loss_inputs(self):
        return {"labels": torch.tensor([1.0, -2.0, 0.5])}

    def test_save_and_load_is_bit_equal(self, model, batch, tmp_path):
        """A product with one column is rounded by where in memory its factors begin, which a file decides, too."""
        expected = self.run(model, batch)
        model.save_pretrained(tmp_path)
        loaded, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        close(self.run(loaded.eval(), batch)["logits"], expected["logits"], 1e-6, "logits")
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(self.run(loaded, batch)["logits"], expected["logits"])

    @pytest.mark.integration
    def test_compiles_as_one_graph(self, shallow, batch):
        """All but a row of the last layer is traced in `TestLLaVA`."""
        super().test_compiles_as_one_graph(shallow, batch)

    @pytest.mark.integration
    def test_exports(self, shallow, batch):
        super().test_exports(shallow, batch)

    def test_parallel_plans_have_no_rule_for_an_output_layer(self, model):
        whole = HfvlmLLaVAForConditionalGeneration(self.config())
        assert set(whole.tp_plan) - set(model.tp_plan) == {"language_model.lm_head"}
        assert not any(name.endswith("lm_head") for name in (*model.tp_plan, *model.pp_plan))

    def test_the_loss_of_labels_is_the_square_of_the_error(self, model, batch):
        with torch.no_grad():
            output = model(**batch, **self.loss_inputs())
        error = output.logits[:, 0] - self.loss_inputs()["labels"]
        assert output.loss == pytest.approx(error.square().mean().item(), rel=1e-5)


class TestTiles(GenerationSuite, ModelSuite):
    """v1.6: the whole image and its tiles, here of three images with equally many."""

    model_class, auto_class = HfvlmLLaVAForConditionalGeneration, AutoModelForImageTextToText
    lora_layers = TestLLaVA.lora_layers
    implementations = ("sdpa",)
    sizes = ((20, 60), (40, 120), (60, 180))
    test_decoding_compiles_as_one_graph = None  # after the first step it is as above

    def config(self):
        tiles = {"grid_pinpoints": GRID, "patch_merge": "spatial_unpad"}
        return HfvlmLLaVAConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, **tiles)

    def inputs(self):
        (count,) = {self.config().count_tokens(size) for size in self.sizes}
        ids = torch.tensor([row([5 + i], count, 7, 8, 9) for i in range(3)])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 3, 28, 28),
            "image_sizes": torch.tensor(self.sizes),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids == IMAGE, -100)}

    def test_compiles_as_one_graph(self, shallow, batch):
        """Sizes decide shapes, and so are numbers of the graph."""
        super().test_compiles_as_one_graph(shallow, batch | {"image_sizes": self.sizes})

    def test_exports(self, shallow, batch):
        super().test_exports(shallow, batch | {"image_sizes": self.sizes})

    def test_padded_joined_and_listed_views_have_equal_features(self, model):
        sizes = ((20, 60), (60, 20), (400, 400))
        counts = [1 + rows * columns for rows, columns in map(model.config.tiling.tiles, sizes)]
        assert counts == [3, 3, 5]
        padded = torch.randn(3, 5, 3, 28, 28)
        listed = [views[:count] for views, count in zip(padded, counts, strict=True)]
        expected = model.get_image_features(padded, sizes).pooler_output
        assert [len(features) for features in expected] == [model.config.count_tokens(size) for size in sizes]
        for given in (listed, torch.cat(listed)):
            for left, right in zip(model.get_image_features(given, sizes).pooler_output, expected, strict=True):
                close(left, right, 1e-6, "views")

    def test_a_wrong_number_of_views_is_an_error(self, model, batch):
        with pytest.raises(ValueError, match="pixel_values hold 2 views, but images of the sizes.*grid_pinpoints"):
            model.get_image_features(batch["pixel_values"].flatten(0, 1)[:2], batch["image_sizes"])


class TestProjectors:
    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_the_projector_may_have_any_depth(self, depth):
        config = HfvlmLLaVAConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, projector_depth=depth)
        model = HfvlmLLaVAForConditionalGeneration(config)
        assert len(model.projector.layers) == depth
        assert model.get_image_features(torch.randn(2, 3, 28, 28)).pooler_output[1].shape == (4, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_depth": 0, "text_config": TEXT | {"hidden_size": 64}}, "projector_depth is 0"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 is no hidden state of a tower of 3 layers"),
        ({"grid_pinpoints": [[28, 30]]}, "multiple of vision_config.image_size 28"),
        ({"keep_class_token": True, "patch_merge": "spatial_unpad"}, "keep_class_token needs 'flat'"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        HfvlmLLaVAConfig(**{"vision_config": VISION, "text_config": TEXT, "image_token_id": IMAGE} | changes)
