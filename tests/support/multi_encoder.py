"""What holds for every model that puts more than two modalities into one space."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModel

import hfvlm
from hfvlm.modeling.multi_encoder import DIMENSIONS
from hfvlm.training import ContrastiveTrainer, ContrastiveTrainingArguments
from hfvlm.training.gradient_cache import cached_backward
from tests.support.suite import ModelSuite, close

INPUTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "text": "input_ids",
    "audio": "input_features",
    "depth": "depth_values",
    "thermal": "thermal_values",
    "imu": "imu_values",
}


def info_nce(a, b, scale, **options):
    logits, target = scale * a @ b.t(), torch.arange(len(a))
    return (F.cross_entropy(logits, target, **options) + F.cross_entropy(logits.t(), target, **options)) / 2


class MultiEncoderSuite(ModelSuite):
    """Subclasses also say `towers`, the sizes of each, `modalities`, `anchor`, and two to load alone in `chosen`."""

    auto_class = AutoModel
    towers: dict[str, dict]
    modalities: tuple[str, ...]
    anchor: str
    chosen: tuple[str, str]
    attentions: dict[str, int] = {}  # in each layer of a tower, where there are several

    def config(self, **changes):
        sizes = {f"{name}_config": sizes for name, sizes in self.towers.items()}
        return self.model_class.config_class(**sizes | changes)

    def loss_inputs(self):
        return {"return_loss": True}

    def given(self, batch):
        """Its modalities, with their inputs."""
        return {modality: batch[name] for modality, name in INPUTS.items() if name in batch}

    # Embedding

    def test_modalities_are_those_that_are_embedded(self, model, batch):
        assert model.modalities == self.modalities
        for modality, values in self.given(batch).items():
            features = getattr(model, f"get_{modality}_features")(values).pooler_output
            assert features.shape == (3, 16)
            if values.ndim == DIMENSIONS[modality]:  # a mean over clips is shorter
                close(features.norm(dim=-1), model.scale(modality).expand(3), 1e-5, modality)

    def test_clips_are_averaged(self, model, batch):
        for modality, values in self.given(batch).items():
            if modality != "text":
                one = values.shape[1 - DIMENSIONS[modality] :]
                encode, clips = getattr(model, f"get_{modality}_features"), torch.randn(2, 3, *one)
                each = torch.stack([encode(clip).pooler_output for clip in clips.unbind(dim=1)])
                close(encode(clips).pooler_output, each.mean(dim=0), 1e-5, modality)

    def test_logits_of_any_pair(self, model, batch):
        output, given = model(**batch), self.given(batch)
        features = {m: getattr(model, f"get_{m}_features")(given[m]).pooler_output for m in ("audio", "depth")}
        close(output.logits("audio", "depth"), features["audio"] @ features["depth"].t(), 1e-5, "audio and depth")
        close(output.logits_per_depth, output.logits("depth", "text"), 0.0, "depth")
        close(output.logits_per_text, output.logits_per_image.t(), 0.0, "text")
        with pytest.raises(ValueError, match="No video was given"):
            model(given["text"]).logits("text", "video")
        with pytest.raises(ValueError, match="nothing to embed"):
            model()

    # Training

    def test_the_loss_binds_everything_to_the_anchor(self, model, batch):
        """Each at the larger temperature of the two."""
        with torch.no_grad():
            for i, scale in enumerate(model.logit_scales.parameters()):
                scale.fill_(1 + i / 2)
        output = model(**batch, return_loss=True)
        embeds = {modality: output[f"{modality}_embeds"] for modality in self.given(batch)}
        anchor = embeds.pop(self.anchor)
        losses = [
            info_nce(anchor, other, torch.maximum(model.scale(self.anchor), model.scale(modality)))
            for modality, other in embeds.items()
        ]
        close(output.loss, torch.stack(losses).mean(), 1e-5, "loss")

    def test_the_loss_comes_from_the_outputs_fields(self, model, batch):
        """A trainer that embeds in small batches puts the fields together and asks for the loss of all."""
        whole = model(**batch, return_loss=True)
        parts = [model(**{name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
        joined = type(whole)(
            **{
                name: torch.cat([part[name] for part in parts]) if name.endswith("_embeds") else parts[0][name]
                for name in parts[0]
                if name.endswith(("_embeds", "_scale"))
            }
        )
        close(model.contrast(joined), whole.loss, 1e-5, "loss")

    def test_batches_larger_than_memory_have_the_same_gradients(self, model, batch):
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        expected = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        model.zero_grad()
        close(cached_backward(model, model.contrast, batch, 2), loss.detach(), 1e-5, "loss")
        close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-5, "gradients")

    def learn(self, model, rows, folder, **options):
        """The losses before and after a few steps on rows that a collator puts together."""

        def collate(batch):
            return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}

        arguments = ContrastiveTrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=8, mini_batch_size=4, learning_rate=3e-3, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        before = model(**collate(rows), return_loss=True).loss.item()
        ContrastiveTrainer(model, arguments, collate, train_dataset=rows).train()
        return before, model.eval()(**collate(rows), return_loss=True).loss.item()

    def test_lora_of_one_tower_leaves_the_others(self):
        for tower in self.towers:
            tuned = hfvlm.lora(self.model_class(self.config()), tower, quiet=True)
            trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
            assert all(f".{tower}_model." in name and "lora" in name for name in trained)
            # Layers, queries and values, two matrices each.
            assert len(trained) == self.attentions.get(tower, 1) * 2 * 2 * 2

    # Some of the towers

    def test_only_the_chosen_towers_are_built_and_read(self, model, batch, tmp_path, monkeypatch):
        model.save_pretrained(tmp_path)
        monkeypatch.setattr("transformers.modeling_utils.safe_open", SafeOpenSpy)
        SafeOpenSpy.read.clear()
        part, info = AutoModel.from_pretrained(tmp_path, modalities=list(self.chosen), output_loading_info=True)
        assert not any(info.values()), info
        assert part.modalities == self.chosen
        towers = {f"{modality}_model" for modality in self.chosen}
        assert {key.split(".")[0] for key in part.state_dict()} == towers | {"logit_scales"}
        assert set(SafeOpenSpy.read) == set(part.state_dict())
        for modality in self.chosen:
            name = f"get_{modality}_features"
            found, expected = (getattr(one, name)(self.given(batch)[modality]).pooler_output for one in (part, model))
            close(found, expected, 0.0, modality)
        message = f"embeds {', '.join(self.chosen)}, not image: name it among the modalities"
        with pytest.raises(ValueError, match=message):
            part.get_image_features(batch["pixel_values"])
        with pytest.raises(ValueError, match="embeds no smell"):
            AutoModel.from_pretrained(tmp_path, modalities=["smell"])

    def test_what_is_saved_of_some_towers_has_those_alone(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        AutoModel.from_pretrained(tmp_path, modalities=list(self.chosen)).save_pretrained(tmp_path / "part")
        again, info = AutoModel.from_pretrained(tmp_path / "part", output_loading_info=True)
        assert not any(info.values()), info
        assert again.modalities == self.chosen
        assert again.config.vision_config is None
        with pytest.raises(ValueError, match=f"embeds no image; modalities may name {', '.join(self.chosen)}"):
            AutoModel.from_pretrained(tmp_path / "part", modalities=["image"])

    def test_towers_share_one_space(self):
        with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs"):
            self.config(depth_config=self.towers["depth"] | {"projection_dim": 8})
        with pytest.raises(ValueError, match="has no tower"):
            self.model_class(self.config(**{f"{name}_config": None for name in self.towers}))


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
