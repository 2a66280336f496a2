import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

import hfvlm
from hfvlm.losses import late_interaction_loss
from hfvlm.models.wukong import (
    HfvlmWukongCLIPConfig,
    HfvlmWukongCLIPForImageClassification,
    HfvlmWukongCLIPModel,
    HfvlmWukongCLIPTextConfig,
    HfvlmWukongCLIPTextModel,
    HfvlmWukongConfig,
    HfvlmWukongForImageClassification,
    HfvlmWukongModel,
    HfvlmWukongTextConfig,
    HfvlmWukongTextModel,
    HfvlmWukongTrunkConfig,
    HfvlmWukongVisionConfig,
    HfvlmWukongVisionModel,
)
from tests.models.clip.test_trunks import SWIN
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 28, "patch_size": 7, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16}
WHOLE = {"vision_config": VISION, "text_config": TEXT}
# A text may hold the separator that ends texts, here 3.
IDS = torch.tensor([[2, 7, 3, 0, 0], [2, 3, 4, 9, 3], [2, 8, 9, 3, 0]])
MASK = (IDS != 0).long()


class TestVision(PartSuite):
    model_class, auto_class = HfvlmWukongVisionModel, AutoModel

    def config(self):
        return HfvlmWukongVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_any_size_with_interpolated_positions(self, model, batch):
        plain = model(**batch).embeds
        assert plain.shape == (3, 16, 16)
        close(model(**batch, interpolate_pos_encoding=True).embeds, plain, 1e-5, "the size it was made for")
        assert model(torch.randn(1, 3, 14, 35), interpolate_pos_encoding=True).embeds.shape == (1, 10, 16)


class TestText(PartSuite):
    model_class, auto_class = HfvlmWukongTextModel, AutoModel

    def config(self):
        return HfvlmWukongTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS}

    def test_pools_the_last_token_before_the_padding(self, model):
        """Not the first separator, which a text may hold; the same with a mask, and with padding before it."""
        output = model(IDS)
        for row, end in enumerate((2, 4, 3)):
            close(output.pooler_output[row], output.last_hidden_state[row, end], 0.0, "pooled")
        close(model(IDS, MASK).pooler_output, output.pooler_output, 1e-6, "with a mask")
        left = [torch.stack([rows[0].roll(2), rows[1], rows[2].roll(1)]) for rows in (IDS, MASK)]
        close(model(*left).pooler_output, output.pooler_output, 1e-5, "padded on the left")


class TestPooledText(TestText):
    model_class = HfvlmWukongCLIPTextModel

    def config(self):
        return HfvlmWukongCLIPTextConfig(**TEXT)

    def test_the_pooled_token_alone_is_the_same(self, model):
        expected = model(IDS)
        for mask in (None, MASK):
            found = model(IDS, mask, pooled_only=True)
            close(found.pooler_output, expected.pooler_output, 1e-5, "pooled")
            close(found.embeds, expected.embeds, 1e-5, "embeds")


class TestWukong(ModelSuite):
    model_class, auto_class = HfvlmWukongModel, AutoModelForZeroShotImageClassification
    tokens = 5

    def config(self):
        return HfvlmWukongConfig(**WHOLE, num_image_tokens=self.tokens)

    def inputs(self):
        # Those after the first: no score of theirs is a sum that cancels to nearly zero.
        return {"input_ids": IDS, "pixel_values": torch.randn(4, 3, 28, 28)[1:]}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_scores_are_means_of_best_matches(self, model, batch):
        """An image's token may match padding, whose cosine is zero; a text's padding has no part in its own score."""
        output = model(**batch)
        assert output.image_embeds.shape == (3, self.tokens or 16, 16)
        assert output.text_embeds.shape == (3, 8, 16)
        for i in range(3):
            for t in range(3):
                cosine = output.image_embeds[i] @ output.text_embeds[t][: MASK[t].sum()].t()
                scale = output.logit_scale
                best = cosine.amax(1).clamp_min(0)
                close(output.logits_per_image[i, t], (scale * best.mean())[0], 1e-5, "image to text")
                close(output.logits_per_text[t, i], (scale * cosine.amax(0).mean())[0], 1e-5, "text to image")

    def test_scores_do_not_depend_on_how_a_text_is_padded(self, model, batch):
        expected = model(**batch)
        longer = F.pad(IDS, (0, 3))
        masked = IDS.masked_fill(MASK == 0, 11)
        for ids, mask in ((longer, None), (longer, F.pad(MASK, (0, 3))), (IDS, MASK), (masked, MASK)):
            found = model(ids, batch["pixel_values"], mask)
            close(found.logits_per_image, expected.logits_per_image, 1e-5, "image to text")
            close(found.logits_per_text, expected.logits_per_text, 1e-5, "text to image")
        alone = model(IDS[:1, :3], batch["pixel_values"])
        close(alone.logits_per_image, expected.logits_per_image[:, :1], 1e-5, "without padding")

    def test_padding_has_no_part_in_the_loss(self, model, batch):
        output = model(**batch, return_loss=True)
        texts = F.pad(MASK, (0, 3)).bool()
        expected = late_interaction_loss(output.image_embeds, output.text_embeds, output.logit_scale, b_mask=texts)
        close(output.loss, expected, 1e-6, "loss")


class TestFILIP(TestWukong):
    test_compiles_as_one_graph = None  # its parts are in the graph above
    tokens = None


class TestWukongOnSwin(TestWukong):
    records = ("hidden_states",)
    implementations = ("eager", "sdpa")
    test_compiles_as_one_graph = test_exports = None

    def config(self):
        return HfvlmWukongConfig(vision_config=dict(SWIN), text_config=TEXT, num_image_tokens=self.tokens)

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": torch.randn(3, 3, 32, 32)}

    def test_tokens_of_the_last_stage_are_the_embedding(self, model, batch):
        output = model.vision_model(batch["pixel_values"])
        assert type(model.config.vision_config) is HfvlmWukongTrunkConfig
        close(output.embeds, model.vision_model.projection(output.last_hidden_state), 1e-6, "tokens")
        close(output.pooler_output, output.last_hidden_state.mean(dim=1), 1e-6, "mean")


class TestCLIP(ModelSuite):
    test_compiles_as_one_graph = test_exports = None  # its parts are in the graph above
    model_class, auto_class = HfvlmWukongCLIPModel, AutoModelForZeroShotImageClassification
    inputs, loss_inputs = TestWukong.inputs, TestWukong.loss_inputs

    def config(self):
        return HfvlmWukongCLIPConfig(**WHOLE)

    def test_pooled_tokens_are_the_embeddings(self, model, batch):
        output = model(**batch)
        text = model.text_model(IDS).embeds
        close(output.text_embeds, F.normalize(text, dim=-1), 1e-5, "texts")
        assert output.logits_per_image.shape == (3, 3)


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmWukongForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmWukongModel

    def config(self):
        return HfvlmWukongConfig(**WHOLE, num_image_tokens=5, num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}


class TestImageClassificationOfCLIP(TestImageClassification):
    model_class, whole_class = HfvlmWukongCLIPForImageClassification, HfvlmWukongCLIPModel

    def config(self):
        return HfvlmWukongCLIPConfig(**WHOLE, num_labels=4)


def test_bad_sizes_are_refused():
    narrow = {"vision_config": VISION | {"projection_dim": 12}, "text_config": TEXT | {"projection_dim": 12}}
    with pytest.raises(StrictDataclassClassValidationError, match="projection_dim is 12: with num_image_tokens"):
        HfvlmWukongConfig(**narrow)
    assert HfvlmWukongConfig(**narrow, num_image_tokens=None).vision_config.projection_dim == 12
    with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs: 16"):
        HfvlmWukongConfig(vision_config=VISION, text_config=TEXT | {"projection_dim": 8})


def test_recipes():
    tuned = hfvlm.lora(HfvlmWukongModel(HfvlmWukongConfig(**WHOLE)), "text+projection+scale", quiet=True)
    trained = [n.replace("base_model.model.", "") for n, p in tuned.named_parameters() if p.requires_grad]
    adapted = {name.split(".")[4] for name in trained if "lora_" in name}
    whole = {name.split(".modules_to_save")[0] for name in trained if "lora_" not in name}
    assert adapted == {"q_proj", "v_proj"}
    assert whole == {"vision_model.projection", "text_model.projection", "token_reduction", "logit_scale"}
