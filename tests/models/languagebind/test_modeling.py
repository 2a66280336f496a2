import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel

import hfvlm
from hfvlm.models.clip import HfvlmCLIPConfig, HfvlmCLIPModel, HfvlmCLIPVisionConfig, HfvlmCLIPVisionModel
from hfvlm.models.languagebind import (
    HfvlmLanguageBindAudioConfig,
    HfvlmLanguageBindAudioModel,
    HfvlmLanguageBindDepthConfig,
    HfvlmLanguageBindDepthModel,
    HfvlmLanguageBindModel,
    HfvlmLanguageBindTextConfig,
    HfvlmLanguageBindTextModel,
    HfvlmLanguageBindThermalConfig,
    HfvlmLanguageBindThermalModel,
    HfvlmLanguageBindVideoConfig,
    HfvlmLanguageBindVideoModel,
    HfvlmLanguageBindVisionConfig,
    HfvlmLanguageBindVisionModel,
)
from tests.support.multi_encoder import MultiEncoderSuite
from tests.support.suite import PartSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"projection_dim": 16}
IMAGE = SIZES | {"image_size": 24, "patch_size": 8}
VIDEO = IMAGE | {"num_frames": 3}
AUDIO = SIZES | {"image_size": [16, 40], "patch_size": 8}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 6, "bos_token_id": 48, "eos_token_id": 49}
TEXT |= {"pad_token_id": 49}
TOWERS = {
    "vision": IMAGE, "video": VIDEO, "text": TEXT, "audio": AUDIO, "depth": IMAGE, "thermal": IMAGE,
}  # fmt: skip
IDS = torch.tensor([[48, 7, 49, 49, 49, 49], [48, 3, 9, 2, 4, 49], [48, 5, 6, 49, 49, 49]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


class TestVision(PartSuite):
    model_class, auto_class = HfvlmLanguageBindVisionModel, AutoModel

    def config(self):
        return HfvlmLanguageBindVisionConfig(**IMAGE)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 24, 24)}


class TestDepth(PartSuite):
    model_class, auto_class = HfvlmLanguageBindDepthModel, AutoModel

    def config(self):
        return HfvlmLanguageBindDepthConfig(**IMAGE)

    def inputs(self):
        return {"depth_values": torch.randn(3, 3, 24, 24)}

    def test_other_sizes_are_refused_by_their_name(self, model):
        with pytest.raises(ValueError, match="depth_values are .*image_size 24"):
            model(torch.randn(1, 3, 32, 32))


class TestThermal(PartSuite):
    model_class, auto_class = HfvlmLanguageBindThermalModel, AutoModel

    def config(self):
        return HfvlmLanguageBindThermalConfig(**IMAGE)

    def inputs(self):
        return {"thermal_values": torch.randn(3, 3, 24, 24)}


class TestAudio(PartSuite):
    model_class, auto_class = HfvlmLanguageBindAudioModel, AutoModel

    def config(self):
        return HfvlmLanguageBindAudioConfig(**AUDIO)

    def inputs(self):
        return {"input_features": torch.randn(3, 3, 16, 40)}

    def test_it_begins_with_the_positions_of_images(self, model):
        before = model.position.clone()
        model.take_positions(HfvlmLanguageBindVisionModel(HfvlmLanguageBindVisionConfig(**IMAGE)).position)
        assert model.position.shape == before.shape == (1 + 2 * 5, 32)
        assert not torch.equal(model.position, before)
        assert model.position.requires_grad


class TestText(PartSuite):
    model_class, auto_class = HfvlmLanguageBindTextModel, AutoModel

    def config(self):
        return HfvlmLanguageBindTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK}

    def objective(self, model, batch):
        return model(**batch).embeds.square().mean() + model.embeddings.token.weight.square().mean()

    def test_padding_does_not_matter(self, model):
        close(model(IDS).embeds, model(IDS, MASK).embeds, 1e-6, "without a mask")


class TestVideo(PartSuite):
    model_class, auto_class = HfvlmLanguageBindVideoModel, AutoModel

    def config(self):
        return HfvlmLanguageBindVideoConfig(**VIDEO)

    def inputs(self):
        return {"pixel_values_videos": torch.randn(3, 3, 3, 24, 24)}

    def test_the_order_of_frames_matters(self, model, batch):
        film = batch["pixel_values_videos"]
        assert (model(film).embeds - model(film.flip(2)).embeds).abs().max() > 1e-4
        with torch.no_grad():
            for layer in model.layers:
                layer.temporal_position.zero_()
        close(model(film.flip(2)).embeds, model(film).embeds, 1e-5, "without positions in time")

    def test_without_time_it_is_a_mean_over_images(self, model, batch):
        picture = HfvlmCLIPVisionModel(HfvlmCLIPVisionConfig(**IMAGE, hidden_act="gelu")).eval()
        own = {k: v for k, v in model.state_dict().items() if "temporal" not in k}
        picture.load_state_dict(own | {"class_token": own["class_token"][0]})
        with torch.no_grad():
            for layer in model.layers:
                layer.temporal_position.zero_()
                layer.temporal_attention.out_proj.weight.zero_()
                layer.temporal_attention.out_proj.bias.zero_()
        film = batch["pixel_values_videos"]
        pooled = torch.stack([picture(frame).pooler_output for frame in film.unbind(2)]).mean(dim=0)
        close(model(film).pooler_output, pooled, 1e-5, "summary")

    def test_a_layer_looks_across_time_place_by_place(self, model):
        layer, x = model.layers[0], torch.randn(2 * 3, 5, 32)
        by_place = x.reshape(2, 3, 5, 32)
        expected = torch.empty_like(by_place)
        for film in range(2):
            for place in range(5):
                line = by_place[film, :, place] + layer.temporal_position
                expected[film, :, place] = line + layer.temporal_attention(layer.temporal_norm(line)[None])[0][0]
        rest = super(type(layer), layer).forward
        close(layer(x), rest(expected.flatten(0, 1)), 1e-5, "layer")

    def test_weights_within_frames_are_recorded(self, model, batch):
        model.set_attn_implementation("eager")
        attentions = model(**batch, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(9, 2, 10, 10)] * 2

    def test_each_frame_may_have_a_class_token(self, batch):
        model = HfvlmLanguageBindVideoModel(HfvlmLanguageBindVideoConfig(**VIDEO, num_class_tokens=3)).eval()
        before, film = model(**batch).last_hidden_state, batch["pixel_values_videos"]
        shared = HfvlmLanguageBindVideoModel(HfvlmLanguageBindVideoConfig(**VIDEO)).eval()
        with torch.no_grad():
            model.class_token[1:] = model.class_token[0]
            shared.load_state_dict(model.state_dict() | {"class_token": model.class_token[:1]})
        assert not torch.equal(model(film).last_hidden_state, before)
        close(shared(film).embeds, model(film).embeds, 0.0, "equal tokens")
        with pytest.raises(StrictDataclassClassValidationError, match="must be 1 or num_frames, 3"):
            HfvlmLanguageBindVideoConfig(**VIDEO, num_class_tokens=2)

    def test_videos_have_the_models_length_and_any_size(self, model):
        with pytest.raises(ValueError, match="have 4 frames, the tower takes num_frames 3"):
            model(torch.randn(1, 3, 4, 24, 24))
        with pytest.raises(ValueError, match="image_size 24"):
            model(torch.randn(1, 3, 3, 32, 24))
        wide = model(torch.randn(1, 3, 3, 32, 24), interpolate_pos_encoding=True)
        assert wide.last_hidden_state.shape == (1, 3, 13, 32)

    def test_a_video_of_one_frame_has_no_time(self):
        model = HfvlmLanguageBindVideoModel(HfvlmLanguageBindVideoConfig(**VIDEO | {"num_frames": 1})).eval()
        film = torch.randn(2, 3, 1, 24, 24)
        before = model(film).embeds
        with torch.no_grad():
            model.layers[0].temporal_position += 1
        close(model(film).embeds, before, 0.0, "positions in time")

    def test_frames_of_a_video_lose_the_same_patches_in_training(self):
        model = HfvlmLanguageBindVideoModel(HfvlmLanguageBindVideoConfig(**VIDEO, patch_dropout=0.5)).train()
        kept = []
        model.patch_dropout.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
        assert model(torch.randn(2, 3, 3, 24, 24)).last_hidden_state.shape == (2, 3, 1 + 4, 32)
        ((whole, part),) = kept
        places = (part.unsqueeze(2) == whole.unsqueeze(1)).all(-1).int().argmax(-1).view(2, 3, 5)
        assert torch.equal(places, places[:, :1].expand(-1, 3, -1))
        assert not torch.equal(places[0, 0], places[1, 0])


class TestLanguageBind(MultiEncoderSuite):
    model_class, towers, anchor, chosen = HfvlmLanguageBindModel, TOWERS, "text", ("video", "text")
    modalities = ("image", "video", "text", "audio", "depth", "thermal")
    attentions = {"video": 2}
    implementations = ("sdpa",)

    def inputs(self):
        return {
            "input_ids": IDS,
            "attention_mask": MASK,
            "pixel_values": torch.randn(3, 3, 24, 24),
            "pixel_values_videos": torch.randn(3, 3, 3, 24, 24),
            "input_features": torch.randn(3, 3, 16, 40),
            "depth_values": torch.randn(3, 3, 24, 24),
            "thermal_values": torch.randn(3, 3, 24, 24),
        }

    def test_each_modality_but_text_has_a_learned_scale(self, model):
        assert sorted(name for name, _ in model.logit_scales.named_parameters()) == sorted(
            f"{m}.scale" for m in model.modalities if m != "text"
        )
        assert model.scale("text").item() == 1
        assert model.scale("depth").item() == pytest.approx(1 / 0.07, rel=1e-4)

    def test_the_trainer_binds_videos_to_texts(self, model, tmp_path):
        """As the authors train: the texts' tower stays as it is, and patches are left out."""
        rows = [
            {"pixel_values_videos": torch.randn(3, 3, 24, 24), "input_ids": torch.tensor([48, i + 1, 49])}
            for i in range(8)
        ]
        text = model.text_model.embeddings.token.weight.clone()
        frozen = ["vision", "text", "audio", "depth", "thermal"]
        before, after = self.learn(model, rows, tmp_path, frozen_towers=frozen, patch_dropout=0.3)
        assert after < before / 2
        assert model.video_model.patch_dropout.rate == 0.3
        assert torch.equal(model.text_model.embeddings.token.weight, text)

    def test_lora_across_time_alone(self, model):
        """As the authors' adapter on videos."""
        layers = [rf"temporal_attention\.{part}_proj" for part in ("q", "k", "v", "out")]
        tuned = hfvlm.lora(model, "video+scale", layers=layers, r=4, alpha=4, quiet=True)
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert sum("lora" in name for name in trained) == 2 * 4 * 2
        assert all("temporal_attention" in name or "logit_scales" in name for name in trained)


def test_towers_begin_from_clip():
    torch.manual_seed(0)
    clip = HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=IMAGE, text_config=TEXT)).eval()
    towers = {"video": {"num_frames": 2}, "audio": {"image_size": [16, 40]}}
    model = HfvlmLanguageBindModel.from_clip(clip, ["depth", "video", "audio"], **towers).eval()
    assert set(model.modalities) == {"text", "depth", "video", "audio"}
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        image = clip.vision_model(pixels).embeds
        close(model.depth_model(pixels).embeds, image, 0.0, "depth")
        close(model.text_model(IDS, MASK).embeds, clip.text_model(IDS, MASK).embeds, 0.0, "texts")
    for layer, other in zip(model.video_model.layers, clip.vision_model.layers, strict=True):
        for own, temporal in (
            (layer.attention, layer.temporal_attention),
            (layer.attention_norm, layer.temporal_norm),
        ):
            for name, value in own.state_dict().items():
                close(temporal.state_dict()[name], value, 0.0, name)
        close(layer.attention.q_proj.weight, other.attention.q_proj.weight, 0.0, "within frames")
        assert layer.temporal_position.abs().max() > 0
    expected = HfvlmLanguageBindAudioModel(HfvlmLanguageBindAudioConfig(**AUDIO))
    expected.take_positions(clip.vision_model.position)
    close(model.audio_model.position, expected.position, 0.0, "positions")
    assert model.logit_scales["depth"].scale.item() == pytest.approx(2.6592)
    with pytest.raises(ValueError, match="modalities must be of image, video, audio, depth, thermal, not smell"):
        HfvlmLanguageBindModel.from_clip(clip, ["smell"])
    with pytest.raises(TypeError, match="video"):
        HfvlmLanguageBindModel.from_clip(clip, ["depth"], video={"num_frames": 2})
