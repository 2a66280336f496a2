from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoModel

import hfvlm
from hfvlm.losses import contrastive_loss
from hfvlm.models.imagebind import (
    HfvlmImageBindAudioConfig,
    HfvlmImageBindAudioModel,
    HfvlmImageBindDepthConfig,
    HfvlmImageBindDepthModel,
    HfvlmImageBindIMUConfig,
    HfvlmImageBindIMUModel,
    HfvlmImageBindModel,
    HfvlmImageBindTextConfig,
    HfvlmImageBindTextModel,
    HfvlmImageBindThermalConfig,
    HfvlmImageBindThermalModel,
    HfvlmImageBindVisionConfig,
    HfvlmImageBindVisionModel,
)
from tests.support.multi_encoder import MultiEncoderSuite, info_nce
from tests.support.suite import PartSuite, close

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"projection_dim": 16}
# What is random in training is switched off: the suite compares one run with another.
SENSOR = SIZES | {"drop_path_rate": 0.0}
VISION = SIZES | {"image_size": 24, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 6, "bos_token_id": 48, "eos_token_id": 49}
AUDIO = SENSOR | {"num_mel_bins": 20, "num_frames": 26, "patch_size": 8, "stride": 6}
DEPTH = SENSOR | {"image_size": 24, "patch_size": 8}
IMU = SENSOR | {"num_samples": 32, "patch_size": 8, "projection_dropout": 0.0}
TOWERS = {"vision": VISION, "text": TEXT, "audio": AUDIO, "depth": DEPTH, "thermal": DEPTH, "imu": IMU}
IDS = torch.tensor([[48, 7, 49, 0, 0, 0], [48, 3, 9, 2, 4, 49], [48, 5, 6, 49, 0, 0]])


class TestVision(PartSuite):
    model_class, auto_class = HfvlmImageBindVisionModel, AutoModel

    def config(self):
        return HfvlmImageBindVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 2, 24, 24)}

    def test_an_image_is_a_clip_that_stands_still(self, model):
        image = torch.randn(2, 3, 24, 24)
        close(model(image).embeds, model(image.unsqueeze(2).expand(-1, -1, 2, -1, -1)).embeds, 1e-6, "image")
        close(model(image).embeds, model(image.unsqueeze(2)).embeds, 0.0, "one frame")

    def test_any_size_with_interpolated_positions(self, model):
        assert model(torch.randn(1, 3, 32, 40), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 21, 32)
        with pytest.raises(ValueError, match="image_size 24"):
            model(torch.randn(1, 3, 32, 40))

    def test_longer_clips_have_positions_of_their_own(self):
        model = HfvlmImageBindVisionModel(HfvlmImageBindVisionConfig(**VISION | {"num_frames": 4})).eval()
        assert len(model.position) == 1 + 2 * 9
        assert model(torch.randn(1, 3, 4, 24, 24)).last_hidden_state.shape == (1, 19, 32)
        image = torch.randn(1, 3, 24, 24)
        before = model(image).embeds
        with torch.no_grad():
            model.position[10:] += 1
        close(model(image).embeds, before, 0.0, "an image stands at the first moment")
        with pytest.raises(ValueError, match="image_size"):
            model(torch.randn(1, 3, 6, 24, 24))
        with pytest.raises(StrictDataclassClassValidationError, match="num_frames 1 is less"):
            HfvlmImageBindVisionConfig(**VISION | {"num_frames": 1})


class TestText(PartSuite):
    model_class, auto_class = HfvlmImageBindTextModel, AutoModel

    def config(self):
        return HfvlmImageBindTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": (torch.cumsum(IDS == 49, dim=1) <= (IDS == 49).int()).long()}

    def objective(self, model, batch):
        return model(**batch).embeds.square().mean() + model.embeddings.token.weight.square().mean()

    def test_what_follows_the_end_of_a_text_is_not_read(self, model):
        other = IDS.clone()
        other[0, 3:] = 11
        close(model(other).embeds, model(IDS).embeds, 1e-6, "padding")


class SensorSuite(PartSuite):
    def test_other_sizes_are_refused(self, model, batch):
        values = next(iter(batch.values()))
        with pytest.raises(ValueError, match=rf"{model.main_input_name} of .* cannot be interpolated"):
            model(torch.cat([values, values], dim=-1))

    def test_the_learned_key_and_value_are_attended_to(self, model, batch):
        model.set_attn_implementation("eager")
        tokens = len(model.position)
        assert model(**batch, output_attentions=True).attentions[0].shape[-2:] == (tokens, tokens + 1)

    def test_attention_is_pytorchs_with_a_learned_key_and_value(self, model):
        ours = model.layers[0].attention
        theirs = nn.MultiheadAttention(32, 2, add_bias_kv=True, batch_first=True)
        with torch.no_grad():
            for name in ("weight", "bias"):
                parts = [getattr(getattr(ours, f"{part}_proj"), name) for part in "qkv"]
                getattr(theirs, f"in_proj_{name}").copy_(torch.cat(parts))
                getattr(theirs.out_proj, name).copy_(getattr(ours.out_proj, name))
            theirs.bias_k.copy_(ours.bias_k.view(1, 1, -1))
            theirs.bias_v.copy_(ours.bias_v.view(1, 1, -1))
        x = torch.randn(2, 5, 32)
        close(ours(x)[0], theirs(x, x, x)[0], 1e-5, "attention")

    def test_layers_are_left_out_more_and_more_in_training(self):
        config = self.config()
        config.drop_path_rate, config.num_hidden_layers = 0.6, 3
        model = self.model_class(config)
        assert [layer.drop_path.rate for layer in model.layers] == [0.0, 0.3, 0.6]


class TestAudio(SensorSuite):
    model_class, auto_class = HfvlmImageBindAudioModel, AutoModel

    def config(self):
        return HfvlmImageBindAudioConfig(**AUDIO)

    def inputs(self):
        return {"input_features": torch.randn(3, 1, 20, 26)}


class TestDepth(SensorSuite):
    model_class, auto_class = HfvlmImageBindDepthModel, AutoModel

    def config(self):
        return HfvlmImageBindDepthConfig(**DEPTH)

    def inputs(self):
        return {"depth_values": torch.randn(3, 1, 24, 24)}


class TestThermal(SensorSuite):
    model_class, auto_class = HfvlmImageBindThermalModel, AutoModel

    def config(self):
        return HfvlmImageBindThermalConfig(**DEPTH)

    def inputs(self):
        return {"thermal_values": torch.rand(3, 1, 24, 24)}


class TestIMU(SensorSuite):
    model_class, auto_class = HfvlmImageBindIMUModel, AutoModel

    def config(self):
        return HfvlmImageBindIMUConfig(**IMU)

    def inputs(self):
        return {"imu_values": torch.randn(3, 6, 32)}

    def test_a_token_is_a_few_samples_channel_by_channel(self, model):
        trace = torch.randn(1, 6, 32)
        second = trace[0, :, 8:16].reshape(-1)
        close(model.patches(trace)[0, 1], model.patches.projection(second), 1e-6, "second token")


class TestImageBind(MultiEncoderSuite):
    model_class, towers, anchor, chosen = HfvlmImageBindModel, TOWERS, "image", ("audio", "depth")
    modalities = ("image", "video", "text", "audio", "depth", "thermal", "imu")

    def inputs(self):
        return {
            "input_ids": IDS,
            "pixel_values": torch.randn(3, 3, 24, 24),
            "input_features": torch.randn(3, 2, 1, 20, 26),
            "depth_values": torch.randn(3, 1, 24, 24),
            "thermal_values": torch.rand(3, 1, 24, 24),
            "imu_values": torch.randn(3, 6, 32),
        }

    def test_scales_are_the_originals(self, model):
        expected = {"image": 1.0, "video": 1.0, "text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0}
        for modality, value in (expected | {"imu": 5.0}).items():
            assert model.scale(modality).item() == pytest.approx(value, rel=1e-5)
        assert [name for name, _ in model.logit_scales.named_parameters()] == ["text.scale"]
        with torch.no_grad():
            model.logit_scales["text"].scale.fill_(9.0)
        assert model.scale("text").item() == 100.0

    def test_videos_are_averaged_over_clips(self, model):
        clips = torch.randn(2, 3, 3, 2, 24, 24)
        each = torch.stack([model.get_video_features(clip).pooler_output for clip in clips.unbind(dim=1)])
        close(model.get_video_features(clips).pooler_output, each.mean(dim=0), 1e-5, "films")

    def test_without_images_every_pair_is_compared(self, model, batch):
        sounds, videos = batch["input_features"], torch.randn(3, 3, 2, 24, 24)
        pair = model(input_features=sounds, depth_values=batch["depth_values"], return_loss=True)
        close(pair.loss, info_nce(pair.audio_embeds, pair.depth_embeds, 20.0), 1e-5, "audio and depth")
        smoothed = {"label_smoothing": 0.1}
        expected = info_nce(pair.audio_embeds, pair.depth_embeds, 20.0, **smoothed)
        close(model.contrast(pair, partial(contrastive_loss, **smoothed)), expected, 1e-5, "another loss")
        with pytest.raises(ValueError, match="two modalities"):
            model(pixel_values=batch["pixel_values"], pixel_values_videos=videos, return_loss=True)

    def test_the_trainer_takes_any_pair(self, model, tmp_path):
        """Audio with depth maps, without an image."""
        rows = [{"input_features": torch.randn(1, 20, 26), "depth_values": torch.randn(1, 24, 24)} for _ in range(8)]
        before, after = self.learn(model, rows, tmp_path, frozen_towers=["vision", "text", "thermal", "imu"])
        assert after < before / 2

    def test_patches_are_left_out_in_training(self):
        model = HfvlmImageBindModel(self.config(vision_config=VISION | {"patch_dropout": 0.5}))
        model.train()
        assert model.vision_model(torch.randn(1, 3, 24, 24)).last_hidden_state.shape[1] == 1 + 4
        model.eval()
        assert model.vision_model(torch.randn(1, 3, 24, 24)).last_hidden_state.shape[1] == 1 + 9

    def test_lora_with_the_learned_scale(self, model):
        tuned = hfvlm.lora(model, "audio+scale", quiet=True)
        trained = {name.split(".")[2] for name, p in tuned.named_parameters() if p.requires_grad}
        assert trained == {"audio_model", "logit_scales"}
