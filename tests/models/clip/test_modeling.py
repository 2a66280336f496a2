import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

from hfvlm.conversion.clip import special_tokens
from hfvlm.models.clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPForImageClassification,
    HfvlmCLIPModel,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPResNetModel,
    HfvlmCLIPTextConfig,
    HfvlmCLIPTextModel,
    HfvlmCLIPVisionConfig,
    HfvlmCLIPVisionModel,
)
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close, same

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 14, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16} | special_tokens(50)
RESNET = {
    "model_type": "hfvlm_clip_resnet",
    "image_size": 64,
    "stem_size": 8,
    "depths": [1, 2, 1, 1],
    "projection_dim": 16,
    "num_attention_heads": 4,
}
IDS = torch.tensor([[48, 2, 49, 49, 49], [48, 2, 3, 4, 49], [48, 7, 7, 49, 49]])


class TestVision(PartSuite):
    model_class, auto_class = HfvlmCLIPVisionModel, AutoModel

    def config(self):
        return HfvlmCLIPVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_any_size_with_interpolated_positions(self, model, batch):
        plain = model(**batch).pooler_output
        same_size = model(**batch, interpolate_pos_encoding=True).pooler_output
        close(same_size, plain, 1e-6, "the size it was made for")
        assert model(torch.randn(1, 3, 42, 70), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 16, 32)
        with pytest.raises(ValueError, match=r"pixel_values are \(42, 70\).*interpolate_pos_encoding"):
            model(torch.randn(1, 3, 42, 70))

    def test_residual_branches_begin_small(self, model):
        """As in the paper's code."""
        width, depth = VISION["hidden_size"], VISION["num_hidden_layers"]
        for layer in model.layers:
            assert layer.attention.q_proj.weight.std().item() == pytest.approx(width**-0.5, rel=0.1)
            assert layer.attention.out_proj.weight.std().item() == pytest.approx((2 * width * depth) ** -0.5, rel=0.1)

    def test_without_projection_the_summary_is_the_embedding(self, batch):
        model = HfvlmCLIPVisionModel(HfvlmCLIPVisionConfig(**VISION | {"projection_dim": None})).eval()
        output = model(**batch)
        assert torch.equal(output.embeds, output.pooler_output)


class TestResNet(PartSuite):
    model_class, auto_class = HfvlmCLIPResNetModel, AutoModel
    records = ("hidden_states",)

    def config(self):
        return HfvlmCLIPResNetConfig(**RESNET)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 64, 64)}

    def test_each_block_begins_as_its_shortcut(self, model):
        assert not model.stage1[0].conv3.norm.weight.any()

    def test_any_size_with_interpolated_positions(self, model):
        assert model(torch.randn(1, 3, 96, 64), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 6, 256)
        with pytest.raises(ValueError, match="image_size 64"):
            model(torch.randn(1, 3, 96, 64))

    def test_bad_sizes_are_refused(self):
        with pytest.raises(StrictDataclassClassValidationError, match="not a multiple of 32"):
            HfvlmCLIPResNetConfig(image_size=100)
        with pytest.raises(StrictDataclassClassValidationError, match="four stages"):
            HfvlmCLIPResNetConfig(depths=[1, 2])


class TestText(PartSuite):
    model_class, auto_class = HfvlmCLIPTextModel, AutoModel

    def config(self):
        return HfvlmCLIPTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def test_what_follows_the_end_is_never_read(self, model):
        changed = IDS.clone()
        changed[0, 3:] = 7
        longer = torch.nn.functional.pad(IDS, (0, 3), value=3)
        for ids in (changed, longer):
            close(model(ids).pooler_output[0], model(IDS).pooler_output[0], 1e-6, "pooled")

    def test_a_padding_mask_changes_nothing(self, model):
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
        close(model(IDS, mask).pooler_output, model(IDS).pooler_output, 1e-6, "pooled")

    def test_added_tokens_do_not_attract_the_pooling(self, model):
        model.resize_token_embeddings(60)
        ids = torch.tensor([[48, 55, 49, 3]])
        close(model(ids).pooler_output, model.post_norm(hidden(model, ids))[:, 2], 1e-6, "pooled")

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match="9 tokens.*positions for 8"):
            model(torch.zeros(1, 9, dtype=torch.long))


def hidden(model, ids):
    return model(ids, output_hidden_states=True).hidden_states[-1]


class TestCLIP(ModelSuite):
    model_class, auto_class = HfvlmCLIPModel, AutoModelForZeroShotImageClassification

    def config(self):
        return HfvlmCLIPConfig(vision_config=dict(VISION), text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 28, 28)}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_is_the_auto_model_too(self):
        assert type(AutoModel.from_config(self.config())) is HfvlmCLIPModel

    def test_padding_is_not_computed_and_changes_nothing(self, model):
        """Columns after the batch's last end-of-text are cut before the tower; asking for hidden states keeps them."""
        padded = torch.nn.functional.pad(IDS, (0, 3), value=49)
        lengths = []
        model.text_model.embeddings.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        short, full = model.get_text_features(padded), model.get_text_features(padded, output_hidden_states=True)
        assert lengths == [5, 8]
        close(short.pooler_output, full.pooler_output, 1e-6, "pooled")
        assert short.last_hidden_state.shape == full.last_hidden_state.shape
        assert len(full.hidden_states) == 3

    def test_loss_needs_pairs(self, model, batch):
        with pytest.raises(ValueError, match="compares row i with row i"):
            model(IDS[:2], batch["pixel_values"], return_loss=True)

    def test_resized_positions_are_used(self, model, tmp_path):
        model.resize_positions(image_size=(28, 56), context_length=6)
        model.save_pretrained(tmp_path)
        again = HfvlmCLIPModel.from_pretrained(tmp_path)
        assert again.config.vision_config.grid == (2, 4)
        images, ids = torch.randn(2, 3, 28, 56), IDS[:2]
        same(
            self.run(again, {"input_ids": ids, "pixel_values": images}),
            self.run(model.eval(), {"input_ids": ids, "pixel_values": images}),
            1e-6,
        )
        with pytest.raises(ValueError, match="positions for 6"):
            again.text_model(torch.zeros(1, 7, dtype=torch.long))

    def test_widths_must_agree(self):
        with pytest.raises(
            StrictDataclassClassValidationError, match="projection_dim differs: 16 in vision_config, 8 in text_config"
        ):
            HfvlmCLIPConfig(vision_config=VISION, text_config=TEXT | {"projection_dim": 8})


class TestCLIPWithResNet(TestCLIP):
    records = ("hidden_states",)

    def config(self):
        return HfvlmCLIPConfig(vision_config=dict(RESNET), text_config=dict(TEXT))

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 64, 64)}

    def test_resized_positions_are_used(self, model):
        """Texts may become longer; images of another size need nothing for good."""
        model.resize_positions(context_length=6)
        assert model(IDS[:2], torch.randn(2, 3, 64, 64)).logits_per_image.shape == (2, 2)
        with pytest.raises(ValueError, match="ResNet.*interpolate_pos_encoding=True"):
            model.resize_positions(image_size=96)


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmCLIPForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmCLIPModel
    test_compiles_as_one_graph, test_exports = ModelSuite.test_compiles_as_one_graph, ModelSuite.test_exports

    def config(self):
        return HfvlmCLIPConfig(vision_config=dict(VISION), text_config=dict(TEXT), num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}
