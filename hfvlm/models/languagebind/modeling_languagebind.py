"""LanguageBind (https://arxiv.org/abs/2310.01852; https://github.com/PKU-YuanGroup/LanguageBind at 7070c53)."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.checks.keywords import check_keywords
from hfvlm.configuration import config_of
from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import DepthScaledModel, other_towers
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.multi_encoder import MultiEncoder
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.clip.modeling_clip import HfvlmCLIPModel, HfvlmCLIPTextModel, HfvlmCLIPVisionModel
from hfvlm.models.languagebind.configuration_languagebind import (
    HfvlmLanguageBindAudioConfig,
    HfvlmLanguageBindConfig,
    HfvlmLanguageBindDepthConfig,
    HfvlmLanguageBindTextConfig,
    HfvlmLanguageBindThermalConfig,
    HfvlmLanguageBindVideoConfig,
    HfvlmLanguageBindVisionConfig,
)
from hfvlm.modules.positions import BICUBIC, resize_grid
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import Attention, PreNormLayer, Stack


class HfvlmLanguageBindTextModel(HfvlmCLIPTextModel):
    """CLIP's causal transformer. It was never trained: every other tower learned to meet it."""

    config: HfvlmLanguageBindTextConfig


class HfvlmLanguageBindVisionModel(HfvlmCLIPVisionModel):
    """CLIP's vision transformer."""

    config: HfvlmLanguageBindVisionConfig


class HfvlmLanguageBindDepthModel(HfvlmCLIPVisionModel):
    """CLIP's vision transformer, trained on depth maps."""

    config: HfvlmLanguageBindDepthConfig
    base_model_prefix = "depth_model"
    _keys_to_ignore_on_load_unexpected = other_towers("depth_model")
    main_input_name = "depth_values"

    def forward(self, depth_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 3, H, W)`, normalised, near to far -> as `HfvlmCLIPVisionModel`."""
        return super().forward(depth_values, **kwargs)


class HfvlmLanguageBindThermalModel(HfvlmCLIPVisionModel):
    """CLIP's vision transformer, trained on thermal images."""

    config: HfvlmLanguageBindThermalConfig
    base_model_prefix = "thermal_model"
    _keys_to_ignore_on_load_unexpected = other_towers("thermal_model")
    main_input_name = "thermal_values"

    def forward(self, thermal_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 3, H, W)`, normalised, cold to hot -> as `HfvlmCLIPVisionModel`."""
        return super().forward(thermal_values, **kwargs)


class HfvlmLanguageBindAudioModel(HfvlmCLIPVisionModel):
    """CLIP's vision transformer, trained on spectrograms."""

    config: HfvlmLanguageBindAudioConfig
    base_model_prefix = "audio_model"
    _keys_to_ignore_on_load_unexpected = other_towers("audio_model")
    main_input_name = "input_features"
    input_modalities = ["audio"]

    def forward(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, 3, bins, frames)`, normalised; a channel a piece of the clip -> as `HfvlmCLIPVisionModel`."""
        return super().forward(input_features, **kwargs)

    @torch.no_grad()
    def take_positions(self, table: Tensor) -> None:
        """Begin with the positions of a tower of square images, `(1 + n * n, D)`, as the authors begin with CLIP's.

        Where both have as many, they are taken as they are, though the grids differ: that is how the authors' were.
        """
        edge = int((table.shape[0] - 1) ** 0.5)
        fits = table.shape == self.position.shape
        self.position.copy_(table if fits else resize_grid(table, (edge, edge), self.config.grid, **BICUBIC))


class HfvlmLanguageBindVideoModel(ClassTokenTower, DepthScaledModel):
    """CLIP's vision transformer on each frame, whose layers begin with attention across time; the frames' mean."""

    config: HfvlmLanguageBindVideoConfig
    base_model_prefix = "video_model"
    _keys_to_ignore_on_load_unexpected = other_towers("video_model")
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]
    patch_bias = False
    pools_one_token = True
    _no_split_modules = ["TemporalLayer"]
    # The weights of attention within frames; those across time are left out.
    _can_record_outputs = {
        "hidden_states": PreNormLayer,
        "attentions": OutputRecorder(Attention, index=1, layer_name=".attention"),
    }

    def __init__(self, config: HfvlmLanguageBindVideoConfig):
        super().__init__(config)
        self.class_token = nn.Parameter(torch.zeros(config.num_class_tokens, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(TemporalLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config)
        self.post_init()

    def with_prefix(self, patches: Tensor) -> Tensor:
        frames = self.config.num_frames
        class_token = self.class_token.expand(frames, -1).repeat(patches.shape[0] // frames, 1).unsqueeze(1)
        return torch.cat([class_token, patches], dim=1)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values_videos: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, T, H, W)`, normalised -> all tokens before the last norm, `(B, T, N, D)`, each frame's class token
        first, and the pooled output.

        With `interpolate_pos_encoding`, frames may have any size; the position table is resized to it.
        """
        videos, frames = pixel_values_videos.shape[0], pixel_values_videos.shape[2]
        if frames != self.config.num_frames:
            raise ValueError(
                f"pixel_values_videos have {frames} frames, the tower takes num_frames {self.config.num_frames}: "
                "use the processor, which samples as many."
            )
        x = self.patches(pixel_values_videos.transpose(1, 2).flatten(0, 1))
        x = self.with_positions(x, pixel_values_videos, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(self.patch_dropout(x, frames)), **kwargs).unflatten(0, (videos, frames))
        pooled = self.post_norm(x[:, :, 0]).mean(dim=1)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class TemporalLayer(PreNormLayer):
    """A pre-norm layer within frames, `(B * T, N, D)`, after attention of each position to itself in the others."""

    def __init__(self, config: HfvlmLanguageBindVideoConfig):
        super().__init__(config)
        self.temporal_position = nn.Parameter(torch.zeros(config.num_frames, config.hidden_size))
        self.temporal_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attention = Attention(config)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.temporal_position, std=self.temporal_position.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        context = None if context is None else self.across_time(context, **kwargs)
        return super().forward(self.across_time(x, **kwargs), mask, context, **kwargs)

    def across_time(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Attend to the same position in the other frames: `(B * T, N, D)` -> `(B * T, N, D)`."""
        frames, tokens = self.temporal_position.shape[0], x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if frames > 1:  # the original has positions for one frame too, and leaves them out
            x = x + self.temporal_position
        x = x + self.temporal_attention(self.temporal_norm(x), **kwargs)[0]
        return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def begin_tower(tower: Any, vision: HfvlmCLIPVisionModel) -> None:
    """Let a tower begin with the weights of CLIP's. Positions are resized to its grid
    (https://github.com/PKU-YuanGroup/ LanguageBind at 7070c53, model/process_clip.py); embeddings of times stay
    random."""
    weights = dict(vision.state_dict())
    table = weights.pop("position")
    if isinstance(tower, HfvlmLanguageBindVideoModel):
        for name in [key for key in weights if key.startswith("layers.")]:
            for own, temporal in ((".attention.", ".temporal_attention."), (".attention_norm.", ".temporal_norm.")):
                if own in name:
                    weights[name.replace(own, temporal)] = weights[name]
        weights["class_token"] = weights["class_token"].expand_as(tower.class_token)
    edge, grid = vision.config.grid, tower.config.grid
    fits = table.shape == tower.position.shape
    weights["position"] = table if fits else resize_grid(table, edge, grid, **BICUBIC)
    missing, surplus = tower.load_state_dict(weights, strict=False)
    if strange := [*surplus, *(name for name in missing if not name.endswith("temporal_position"))]:
        raise ValueError(f"{type(vision).__name__}: not the tower of {type(tower).__name__}, for its {strange[0]}.")


def own_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a tower's configuration, without the name of its kind."""
    return {
        name: value for name, value in config.to_dict().items() if name not in ("model_type", "transformers_version")
    }


class HfvlmLanguageBindModel(MultiEncoder):
    """Images, videos, texts, audio, depth maps and thermal images in one space.

    Embeddings of all but texts are multiplied by a learned scale of their modality: that is what the original returns,
    and dot products of them are its logits.
    """

    config: HfvlmLanguageBindConfig
    base_model_prefix = "languagebind"
    input_modalities = ["image", "video", "text", "audio"]
    _no_split_modules = ["PreNormLayer", "TemporalLayer"]
    anchor = "text"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0

    @classmethod
    def from_clip(
        cls, clip: HfvlmCLIPModel, modalities: Sequence[str], **towers: Mapping[str, Any]
    ) -> "HfvlmLanguageBindModel":
        """Begin towers from a CLIP's, as the authors: each new one is its vision tower, in whose layers attention
        across time, if there is some, is the attention within frames again; texts keep their tower, the temperature
        begins at 0.07. Train them with `examples/recipes/languagebind-lora.yaml`.

        Args:
            clip: with vision and text transformers.
            modalities: of the new towers, among "image", "video", "audio", "depth" and "thermal".
            **towers: of a modality, fields of its tower that are another, as `video={"num_frames": 8}` or
                `audio={"image_size": [126, 1036]}`.

        Raises:
            ValueError: an unknown modality, none, or a CLIP with towers of another kind.
            TypeError: fields of a modality that is not asked for.
        """
        known = [name for name in HfvlmLanguageBindConfig.towers if name != "text"]
        if not modalities or (unknown := sorted(set(modalities) - set(known))):
            raise ValueError(
                f"modalities must be of {', '.join(known)}, not {', '.join(unknown) if modalities else 'none'}."
            )
        check_keywords(f"{cls.__name__}.from_clip", towers, modalities)
        config: Any = clip.config
        if type(clip.vision_model) is not HfvlmCLIPVisionModel or type(clip.text_model) is not HfvlmCLIPTextModel:
            kinds = f"{type(clip.vision_model).__name__} and {type(clip.text_model).__name__}"
            raise ValueError(f"{type(clip).__name__}: its towers, {kinds}, are not CLIP's two transformers.")
        fields: dict[str, Any] = dict.fromkeys(HfvlmLanguageBindConfig.sub_configs)
        fields["text_config"] = own_fields(config.text_config)
        for modality in modalities:
            name = config_of(HfvlmLanguageBindConfig.towers[modality])
            fields[name] = own_fields(config.vision_config) | dict(towers.get(modality, {}))
        model = cls(HfvlmLanguageBindConfig(**fields))
        texts: Any = model.text_model
        texts.load_state_dict(clip.text_model.state_dict())
        for modality in modalities:
            begin_tower(getattr(model, HfvlmLanguageBindConfig.towers[modality]), clip.vision_model)
        return model

    def make_scale(self, modality: str) -> nn.Module | None:
        return None if modality == "text" else LogitScale(self.config.logit_scale_init_value)


class HfvlmLanguageBindForImageClassification(ImageClassifier):
    """A linear layer on the pooled output of the tower of images."""

    config: HfvlmLanguageBindConfig
    base_model_prefix = "languagebind"
