import pytest
import torch
from transformers import AutoModelForImageTextToText

from hfvlm.models.pg_video_llava import HfvlmPGVideoLLaVAConfig, HfvlmPGVideoLLaVAForConditionalGeneration
from hfvlm.models.video_chatgpt import HfvlmVideoChatGPTConfig, HfvlmVideoChatGPTForConditionalGeneration
from hfvlm.models.video_chatgpt.modeling_video_chatgpt import average
from tests.support.generation import GenerationSuite
from tests.support.suite import ModelSuite, close, relative

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "projection_dim": None}
TEXT = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
VIDEO, START, END = 57, 58, 59
SIZES = {"vision_config": VISION, "text_config": TEXT, "video_token_id": VIDEO, "temporal_tokens": 5}


class VideoSuite(GenerationSuite, ModelSuite):
    model_class, auto_class = HfvlmVideoChatGPTForConditionalGeneration, AutoModelForImageTextToText
    modality, pixels = "video", "pixel_values_videos"
    test_decoding_compiles_as_one_graph = None  # after the first step it is LLaMA, as LLaVA is
    # The layers after the one that is read have no part in anything.
    lora_layers = [f"layers.{i}.{part}_proj" for i in (0, 1) for part in ("attention.q", "self_attn.q", "self_attn.v")]

    def config(self):
        return HfvlmVideoChatGPTConfig(**SIZES)

    def inputs(self):
        starts, rests = ([5], [6], [9]), ([7, 8, 9], [3, 2, 4], [9, 8, 7])
        video = [START, *[VIDEO] * self.config().count_tokens(3), END]
        ids = torch.tensor([[1, *start, *video, *rest] for start, rest in zip(starts, rests, strict=True)])
        return {
            "input_ids": ids,
            "pixel_values_videos": torch.randn(3, 3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids >= VIDEO, -100)}


class TestVideoChatGPT(VideoSuite):
    def test_the_order_of_frames_changes_the_output(self, model, batch):
        with torch.no_grad():
            before = model(**batch).logits
            after = model(**batch | {self.pixels: batch[self.pixels].flip(1)}).logits
        assert relative(after[:, -1], before[:, -1]) > 1e-3

    def test_padding_of_shorter_videos_is_ignored(self, model, batch):
        """Padded, or in a list: padding changes nothing."""
        videos, counts = batch[self.pixels], (1, 3, 2)
        shorter = [video[:count] for video, count in zip(videos, counts, strict=True)]
        expected = [model.get_video_features(video[None]).pooler_output[0] for video in shorter]
        padded = model.get_video_features(videos, num_frames=torch.tensor(counts)).pooler_output
        listed = model.get_video_features(shorter).pooler_output
        for given in (padded, listed):
            for left, right in zip(given, expected, strict=True):
                assert len(left) == model.config.count_tokens(3) == 9
                close(left, right, 1e-6, "video")
        with torch.no_grad():
            logits = model(**batch, num_frames=torch.tensor(counts)).logits
            alone = self.one(batch, 0)
            close(model(**alone | {self.pixels: videos[:1, :1]}).logits, logits[:1], 1e-5, "row")

    def test_longer_videos_have_a_token_for_each_frame(self, model):
        features = model.get_video_features(torch.randn(1, 8, 3, 28, 28)).pooler_output
        assert len(features[0]) == model.config.count_tokens(8) == 12

    def test_a_text_may_have_two_videos(self, model, batch):
        videos, count = batch[self.pixels][:2], model.config.count_tokens(3)
        ids = torch.tensor([[1, 5, *[VIDEO] * count, 6, *[VIDEO] * count, 7]])
        with torch.no_grad():
            before, after = (model(input_ids=ids, pixel_values_videos=f).logits for f in (videos, videos.flip(0)))
        assert relative(after[:, -1], before[:, -1]) > 1e-3

    def test_unused_layers_are_not_computed(self, model, batch):
        seen = []
        for i, layer in enumerate(model.vision_model.layers):
            layer.register_forward_hook(lambda *_, i=i: seen.append(i))
        model(**batch)
        assert seen == [0, 1]
        assert not any(p.requires_grad for p in model.vision_model.layers[2].parameters())


class TestPaddedVideos(VideoSuite):
    """With the number of frames of each, as the processor gives them."""

    implementations = ("sdpa",)

    def inputs(self):
        return super().inputs() | {"num_frames": torch.tensor([3, 2, 1])}

    def test_compiles_as_one_graph(self, shallow, batch):
        """Lengths decide shapes, and so are numbers of the graph."""
        super().test_compiles_as_one_graph(shallow, batch | {"num_frames": (3, 2, 1)})

    def test_exports(self, shallow, batch):
        super().test_exports(shallow, batch | {"num_frames": (3, 2, 1)})


class TestPGVideoLLaVA(VideoSuite):
    test_compiles_as_one_graph = None  # its parts are in the graphs above
    model_class = HfvlmPGVideoLLaVAForConditionalGeneration
    implementations = ("sdpa",)

    def config(self):
        return HfvlmPGVideoLLaVAConfig(**SIZES)

    def test_the_projector_has_two_layers(self, model):
        assert len(model.projector.layers) == 2


def test_averages_equal_an_independent_formulation():
    patches = torch.arange(24.0).reshape(2, 3, 4)
    rows = average(patches, 4)
    assert rows.shape == (4 + 3, 4)
    assert torch.equal(rows[:2], patches.mean(dim=1))
    assert not rows[2:4].any()
    assert torch.equal(rows[4:], patches.mean(dim=0))
    assert torch.equal(average(patches, 0), torch.cat([rows[:2], rows[4:]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_depth": 0, "text_config": TEXT | {"hidden_size": 64}}, "projector_depth is 0"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 is no hidden state of a tower of 3 layers"),
        ({"temporal_tokens": -1}, "temporal_tokens -1 is no number"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        HfvlmVideoChatGPTConfig(**SIZES | changes)
