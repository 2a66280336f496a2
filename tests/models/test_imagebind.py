from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from torch import nn
from transformers import AutoModel

import hfvlm
from hfvlm.losses import contrastive_loss
from hfvlm.models.imagebind import (
    HfvlmImageBindAudioConfig,
    HfvlmImageBindAudioModel,
    HfvlmImageBindConfig,
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
from hfvlm.training import ContrastiveTrainer, ContrastiveTrainingArguments
from hfvlm.training.gradient_cache import cached_backward
from tests.suite import ModelSuite, close

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


def config(**changes):
    return HfvlmImageBindConfig(**{f"{name}_config": sizes for name, sizes in TOWERS.items()} | changes)


def everything():
    return {
        "input_ids": IDS,
        "pixel_values": torch.randn(3, 3, 24, 24),
        "input_features": torch.randn(3, 2, 1, 20, 26),
        "depth_values": torch.randn(3, 1, 24, 24),
        "thermal_values": torch.rand(3, 1, 24, 24),
        "imu_values": torch.randn(3, 6, 32),
    }


class TestVision(ModelSuite):
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


class TestText(ModelSuite):
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


class SensorSuite(ModelSuite):
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


class TestImageBind(ModelSuite):
    model_class, auto_class = HfvlmImageBindModel, AutoModel

    def config(self):
        return config()

    def inputs(self):
        return everything()

    def loss_inputs(self):
        return {"return_loss": True}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HfvlmImageBindModel(config()).eval()


def test_it_says_what_it_embeds(model):
    assert model.modalities == ("image", "video", "text", "audio", "depth", "thermal", "imu")
    names = {"text": "input_ids", "image": "pixel_values", "audio": "input_features"}
    for modality, values in everything().items():
        name = next((m for m, argument in names.items() if argument == modality), modality.removesuffix("_values"))
        features = getattr(model, f"get_{name}_features")(values).pooler_output
        assert features.shape == (3, 16)
        if name != "audio":  # a mean over clips is shorter
            close(features.norm(dim=-1), model.scale(name).expand(3), 1e-5, name)


def test_scales_are_the_originals(model):
    expected = {"image": 1.0, "video": 1.0, "text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    for modality, value in expected.items():
        assert model.scale(modality).item() == pytest.approx(value, rel=1e-5)
    assert [name for name, _ in model.logit_scales.named_parameters()] == ["text.scale"]
    with torch.no_grad():
        model.logit_scales["text"].scale.fill_(9.0)
    assert model.scale("text").item() == 100.0


def test_clips_are_averaged(model):
    for name, shape in {"audio": (1, 20, 26), "video": (3, 2, 24, 24), "imu": (6, 32), "depth": (1, 24, 24)}.items():
        encode, clips = getattr(model, f"get_{name}_features"), torch.randn(2, 3, *shape)
        each = torch.stack([encode(clip).pooler_output for clip in clips.unbind(dim=1)])
        close(encode(clips).pooler_output, each.mean(dim=0), 1e-5, name)


def test_logits_of_any_pair(model):
    inputs = everything()
    output = model(**inputs)
    features = {
        m: getattr(model, f"get_{m}_features")(v).pooler_output
        for m, v in {"audio": inputs["input_features"], "depth": inputs["depth_values"]}.items()
    }
    close(output.logits("audio", "depth"), features["audio"] @ features["depth"].t(), 1e-5, "audio and depth")
    close(output.logits_per_depth, output.logits("depth", "text"), 0.0, "depth")
    close(output.logits_per_text, output.logits_per_image.t(), 0.0, "text")
    with pytest.raises(ValueError, match="No video was given"):
        output.logits("audio", "video")
    with pytest.raises(ValueError, match="nothing to embed"):
        model()


def info_nce(a, b, scale):
    logits, target = scale * a @ b.t(), torch.arange(len(a))
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.t(), target)) / 2


def test_the_loss_binds_everything_to_images(model):
    output = model(**everything(), return_loss=True)
    scales = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    losses = [info_nce(output.image_embeds, output[f"{m}_embeds"], scale) for m, scale in scales.items()]
    close(output.loss, torch.stack(losses).mean(), 1e-5, "loss")
    # Without images, every pair; at the larger temperature of the two.
    inputs = everything()
    pair = model(input_features=inputs["input_features"], depth_values=inputs["depth_values"], return_loss=True)
    close(pair.loss, info_nce(pair.audio_embeds, pair.depth_embeds, 20.0), 1e-5, "audio and depth")
    assert model.contrast(pair, partial(contrastive_loss, label_smoothing=0.1)) > pair.loss
    with pytest.raises(ValueError, match="two modalities"):
        model(pixel_values=inputs["pixel_values"], pixel_values_videos=torch.randn(3, 3, 2, 24, 24), return_loss=True)


def test_the_loss_comes_from_the_outputs_fields(model):
    """A trainer that embeds in small batches puts the fields together and asks for the loss of all."""
    inputs = everything()
    whole = model(**inputs, return_loss=True)
    parts = [model(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(3)]
    joined = type(whole)(
        **{
            name: torch.cat([part[name] for part in parts]) if name.endswith("_embeds") else parts[0][name]
            for name in parts[0]
            if name.endswith(("_embeds", "_scale"))
        }
    )
    close(model.contrast(joined), whole.loss, 1e-5, "loss")


class SafeOpenSpy:
    """transformers' view of a safetensors file, which notes what is read of it."""

    read: list[str] = []

    def __init__(self, *args, **options):
        self.file = safe_open(*args, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_slice(self, key):
        return SliceSpy(key, self.file.get_slice(key))


class SliceSpy:
    def __init__(self, key, inner):
        self.key, self.inner = key, inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, index):
        SafeOpenSpy.read.append(self.key)
        return self.inner[index]


def test_batches_larger_than_memory_have_the_same_gradients(model):
    inputs = everything()
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    expected = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    model.zero_grad()
    close(cached_backward(model, model.contrast, inputs, 2), loss.detach(), 1e-5, "loss")
    close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-5, "gradients")


def test_the_trainer_takes_any_pair(model, tmp_path):
    """Sounds with depth maps, without an image in sight; learned from rows that collators make."""
    torch.manual_seed(0)
    rows = [{"input_features": torch.randn(1, 20, 26), "depth_values": torch.randn(1, 24, 24)} for _ in range(8)]

    def collate(batch):
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}

    arguments = ContrastiveTrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=8, mini_batch_size=4, learning_rate=3e-3, report_to=[],
        frozen_towers=["vision", "text", "thermal", "imu"], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = model(**collate(rows), return_loss=True).loss.item()
    ContrastiveTrainer(model, arguments, collate, train_dataset=rows).train()
    assert model.eval()(**collate(rows), return_loss=True).loss.item() < before / 2


def test_patches_are_left_out_in_training():
    model = HfvlmImageBindModel(config(vision_config=VISION | {"patch_dropout": 0.5}))
    model.train()
    assert model.vision_model(torch.randn(1, 3, 24, 24)).last_hidden_state.shape[1] == 1 + 4
    model.eval()
    assert model.vision_model(torch.randn(1, 3, 24, 24)).last_hidden_state.shape[1] == 1 + 9


def test_only_the_chosen_towers_are_built_and_read(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", SafeOpenSpy)
    SafeOpenSpy.read.clear()
    part, info = AutoModel.from_pretrained(tmp_path, modalities=["audio", "depth"], output_loading_info=True)
    assert not any(info.values()), info
    assert part.modalities == ("audio", "depth")
    assert {key.split(".")[0] for key in part.state_dict()} == {"audio_model", "depth_model", "logit_scales"}
    assert set(SafeOpenSpy.read) == set(part.state_dict())
    values = torch.randn(2, 1, 20, 26)
    close(part.get_audio_features(values).pooler_output, model.get_audio_features(values).pooler_output, 0.0, "audio")
    with pytest.raises(ValueError, match="embeds audio, depth, not image: name it among the modalities"):
        part.get_image_features(torch.randn(1, 3, 24, 24))
    with pytest.raises(ValueError, match="embeds no smell"):
        AutoModel.from_pretrained(tmp_path, modalities=["smell"])


def test_what_is_saved_of_some_towers_has_those_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path, modalities=["audio", "depth"]).save_pretrained(tmp_path / "part")
    again, info = AutoModel.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not any(info.values()), info
    assert again.modalities == ("audio", "depth")
    assert again.config.vision_config is None
    with pytest.raises(ValueError, match="embeds no text; modalities may name audio, depth"):
        AutoModel.from_pretrained(tmp_path / "part", modalities=["text"])


def test_towers_share_one_space():
    with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs"):
        config(imu_config=IMU | {"projection_dim": 8})
    with pytest.raises(ValueError, match="has no tower"):
        HfvlmImageBindModel(config(**{f"{name}_config": None for name in TOWERS}))


@pytest.mark.parametrize("tower", list(TOWERS))
def test_lora_of_one_tower_leaves_the_others(model, tower):
    tuned = hfvlm.lora(model, tower, quiet=True)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    assert all(f".{tower}_model." in name and "lora" in name for name in trained)
    assert len(trained) == 2 * 2 * 2  # layers, queries and values, two matrices each


def test_lora_with_the_learned_scale(model):
    tuned = hfvlm.lora(model, "audio+scale", quiet=True)
    trained = {name.split(".")[2] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"audio_model", "logit_scales"}
