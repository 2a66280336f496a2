"""MERLOT Reserve (https://arxiv.org/abs/2201.02639): frames, text and audio of a video's segments in one encoder.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/modeling.py. It is longer than other
architectures by its pretraining and by the two models that choose answers, in files of their own.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.models.merlot_reserve.configuration_merlot_reserve import (
    HfvlmMERLOTReserveAudioConfig,
    HfvlmMERLOTReserveConfig,
    HfvlmMERLOTReserveVisionConfig,
)
from hfvlm.models.merlot_reserve.encoders import (
    ClassTokenEncoder,
    Encoder,
    GroupPool,
    RotaryAttention,
    centred,
    grid_coordinates,
)
from hfvlm.modules.embeddings import PatchEmbedding, padded_positions
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import PreNormLayer

# One folder serves several heads and towers; each leaves unused what it has no part for.
PARTS = [r"^(vision_model|audio_model|embeddings|joint|span|head|classifier|(image|audio|span)_logit_scale)\."]
# What segments and positions of tokens are divided by.
MOST_SEGMENTS, MOST_TOKENS = 16.0, 1024.0
# Of texts that are compared: their positions are divided by it.
SPAN_UNIT = 16.0
# Under the root of a length.
LENGTH_EPS = 1e-5
# The temperature that the authors' demonstrations score labels with; it was not learned.
LABEL_SCALE = 100.0


def unit(x: Tensor) -> Tensor:
    """Normalise `(..., D)` to length one, or a little less."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.square().sum(dim=-1, keepdim=True) + LENGTH_EPS).sqrt()).to(x.dtype)


def present(config: HfvlmMERLOTReserveConfig, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return where ids `(B, N)` are no padding."""
    if attention_mask is not None:
        return attention_mask.bool()
    pad = config.pad_token_id
    return torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids.ne(pad)


@dataclass
class ReserveTowerOutput(TowerOutput):
    """The output of a tower.

    Args:
        tokens: `(B, T, D)`, pooled groups of its tokens, the joint encoder's inputs.
    """

    tokens: Tensor | None = None


@dataclass
class ReserveOutput(ModelOutput):
    """Frames, text and audio, encoded together.

    Args:
        last_hidden_state: `(B, N + image tokens, D)`, text and audio first.
        embeds: `(B, N, D)`, the projections of text and audio, of unit length; those of masks are compared with
            `get_text_features` and `get_audio_features`, those of pooling tokens with `get_image_features`.
        hidden_states: of the joint encoder.
        attentions: of the joint encoder.
    """

    last_hidden_state: Tensor | None = None
    embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HfvlmMERLOTReservePreTrainedModel(HfvlmPreTrainedModel):
    """Base of all classes."""

    _keys_to_ignore_on_load_unexpected = PARTS
    _can_record_outputs = {
        "hidden_states": PreNormLayer,
        "attentions": OutputRecorder(RotaryAttention, index=1, layer_name="layers"),
    }
    _keep_in_fp32_modules_strict = ["image_logit_scale", "audio_logit_scale", "span_logit_scale"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the original: wide layers by their inputs, and less than others, for the depth."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            std = min(18.0 / module.weight[0].numel(), self.config.initializer_range) / 2**0.5
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, GroupPool):
            for part in (module.attention.q_proj, module.attention.k_proj, module.attention.v_proj):
                init.normal_(part.weight, std=part.in_features**-0.5)
            init.normal_(module.attention.out_proj.weight, std=module.attention.out_proj.in_features**-0.5)


class HfvlmMERLOTReserveVisionModel(HfvlmMERLOTReservePreTrainedModel):
    """The vision transformer of single frames."""

    config: HfvlmMERLOTReserveVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: HfvlmMERLOTReserveVisionConfig):
        super().__init__(config)
        self.patches = PatchEmbedding(config)
        self.encoder = ClassTokenEncoder(config, config.num_hidden_layers)
        self.pool = GroupPool(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> ReserveTowerOutput:
        """`(B, C, H, W)` pixels in 0..1, of any even grid of patches -> all tokens, class token first, that token, its
        projection, and the pooled tokens."""
        pool = self.config.pool_size
        rows, columns = (edge * pool for edge in self.config.pooled_grid(pixel_values))
        coordinates = grid_coordinates(rows, columns, pixel_values.device).unsqueeze(0)
        x = self.encoder(self.patches(pixel_values), coordinates, **kwargs)
        grid = x[:, 1:].unflatten(1, (rows // pool, pool, columns // pool, pool)).transpose(2, 3)
        return ReserveTowerOutput(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            embeds=self.encoder.projection(x[:, 0]),
            tokens=self.pool(grid.flatten(3, 4).flatten(1, 2)),
        )


class HfvlmMERLOTReserveAudioModel(HfvlmMERLOTReservePreTrainedModel):
    """The transformer of clips of audio, three of which a segment of 5 s has."""

    config: HfvlmMERLOTReserveAudioConfig
    base_model_prefix = "audio_model"
    main_input_name = "input_features"
    input_modalities = ["audio"]

    def __init__(self, config: HfvlmMERLOTReserveAudioConfig):
        super().__init__(config)
        patch = config.patch_size
        self.patches = nn.Conv1d(config.num_channels, config.hidden_size, patch, stride=patch)
        self.encoder = ClassTokenEncoder(config, config.num_hidden_layers)
        self.pool = GroupPool(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> ReserveTowerOutput:
        """`(B, num_frames, num_channels)` log mel spectrograms, the playback speed as their last channel -> as the
        vision tower."""
        config = self.config
        if tuple(input_features.shape[1:]) != (config.num_frames, config.num_channels):
            raise ValueError(
                f"input_features are {tuple(input_features.shape)}; clips of (num_frames {config.num_frames}, "
                f"num_channels {config.num_channels}) are needed: use the processor."
            )
        x = self.patches(input_features.to(self.patches.weight.dtype).transpose(1, 2)).transpose(1, 2)
        coordinates = centred(x.shape[1], x.device)[None, :, None] / x.shape[1]
        x = self.encoder(x, coordinates, **kwargs)
        return ReserveTowerOutput(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            embeds=self.encoder.projection(x[:, 0]),
            tokens=self.pool(x[:, 1:].unflatten(1, (config.num_tokens, -1))),
        )


@dataclass
class JointInputs:
    """Rows of the joint encoder.

    Args:
        x: `(B, N, D)`.
        coordinates: `(B, N, 4)`, row and column in a frame, segment, position in the text.
        valid: `(B, N)`, False for padding.
        videos: `(B, N)`, the video that each token is of, where a row has several; tokens attend to their own alone.
    """

    x: Tensor
    coordinates: Tensor
    valid: Tensor
    videos: Tensor | None = None

    def padded(self, length: int) -> "JointInputs":
        """Return the rows with padding up to a length."""
        more = length - self.x.shape[1]
        videos = self.valid.new_zeros(self.valid.shape, dtype=torch.long) if self.videos is None else self.videos
        x, coordinates = (F.pad(each, (0, 0, 0, more)) for each in (self.x, self.coordinates))
        return JointInputs(x, coordinates, F.pad(self.valid, (0, more)), F.pad(videos, (0, more), value=-1))


def concatenated(parts: list[JointInputs]) -> JointInputs:
    """Put rows of several lengths into one batch."""
    longest = max(part.x.shape[1] for part in parts)
    rows = [part.padded(longest) for part in parts]
    videos = None
    if any(part.videos is not None for part in parts):
        videos = torch.cat([row.videos for row in rows if row.videos is not None])
    x, coordinates, valid = (torch.cat([getattr(r, name) for r in rows]) for name in ("x", "coordinates", "valid"))
    return JointInputs(x, coordinates, valid, videos)


class JointModel(HfvlmMERLOTReservePreTrainedModel):
    """Base of the models with the joint encoder; without an `audio_config`, there is no audio tower."""

    config: HfvlmMERLOTReserveConfig
    base_model_prefix = "merlot_reserve"
    input_modalities = ["image", "text", "audio"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(PreNormLayer, layer_name="joint.layers"),
        "attentions": OutputRecorder(RotaryAttention, index=1, layer_name="joint.layers"),
    }
    further_towers: tuple[str, ...] = ("joint",)
    has_audio = True

    def __init__(self, config: HfvlmMERLOTReserveConfig):
        super().__init__(config)
        self.vision_model = HfvlmMERLOTReserveVisionModel._from_config(config.vision_config)
        if self.has_audio:
            self.audio_model = HfvlmMERLOTReserveAudioModel._from_config(config.audio_config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.joint = Encoder(config, config.num_hidden_layers)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmMERLOTReserveConfig) -> None:
        """Build what a class has next to the joint encoder."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode frames `(B, S, C, H, W)` -> `(B, S, T, D)`, to be given as `image_tokens`."""
        return self.vision_model(pixel_values.flatten(0, 1)).tokens.unflatten(0, pixel_values.shape[:2])

    def encode_audio(self, input_features: Tensor) -> Tensor:
        """Encode clips `(B, A, F, M)` -> `(B, A, K, D)`, to be given as `audio_tokens`."""
        return self.audio_model(input_features.flatten(0, 1)).tokens.unflatten(0, input_features.shape[:2])

    def arrange(  # noqa: PLR0913 (what a row may hold)
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        image_tokens: Tensor | None = None,
        audio_tokens: Tensor | None = None,
        audio_ids: Tensor | None = None,
        video_ids: Tensor | None = None,
        *,
        first_segment: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> JointInputs:
        """Put text, with audio in its place, before the frames. Arguments are those of `HfvlmMERLOTReserveModel`;
        frames are of the segments from `first_segment` on, and of a `grid` of tokens, by default that of
        `image_size`."""
        config, rows = self.config, len(input_ids)
        x = self.embeddings(input_ids)
        valid = present(config, input_ids, attention_mask)
        if audio_tokens is not None:
            x = self.with_audio(x, input_ids, audio_tokens, audio_ids)
        segments = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
        place = (1 + padded_positions(valid)) / MOST_TOKENS
        zero = torch.zeros_like(place)
        coordinates = torch.stack([zero, zero, segments / MOST_SEGMENTS, place], dim=-1)
        if image_tokens is not None:
            number, size = image_tokens.shape[1:3]
            shown = torch.arange(number, device=x.device).repeat_interleave(size)
            image = self.image_coordinates(size, grid, x.device).repeat(number, 1)
            image = F.pad(image, (0, 2))
            image[:, 2] = (shown + first_segment) / MOST_SEGMENTS
            x = torch.cat([x, image_tokens.flatten(1, 2).to(x.dtype)], dim=1)
            coordinates = torch.cat([coordinates, image.expand(rows, -1, -1)], dim=1)
            valid = F.pad(valid, (0, number * size), value=True)
            segments = torch.cat([segments, shown.expand(rows, -1)], dim=1)
        videos = None if video_ids is None else video_ids.gather(1, segments.clamp_min(0))
        return JointInputs(x, coordinates, valid, videos)

    def image_coordinates(self, size: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Return the coordinates of a frame's tokens.

        Raises:
            ValueError: there is another number of them.
        """
        vision = self.config.vision_config
        rows, columns = grid or tuple(edge // vision.pool_size for edge in vision.grid)
        if rows * columns != size:
            raise ValueError(
                f"Frames have {size} tokens, a grid of {rows} x {columns} has {rows * columns}: prepare them at "
                f"image_size {vision.image_size}."
            )
        return grid_coordinates(rows, columns, device)

    def with_audio(self, x: Tensor, input_ids: Tensor, audio_tokens: Tensor, audio_ids: Tensor | None) -> Tensor:
        """Put tokens of audio, `(B, A, K, D)`, where ids are `audio_token_id`, by default K of each clip in order."""
        here = input_ids == self.config.audio_token_id
        count, clips = here.long().cumsum(dim=1) - 1, audio_tokens.shape[1]
        size = audio_tokens.shape[2]
        which = count.div(size, rounding_mode="floor") % clips if audio_ids is None else audio_ids
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        # The original counts on through the whole row: a clip's tokens are expected in one piece.
        audio = audio_tokens[rows, which.clamp(0, clips - 1), count.clamp_min(0) % size]
        return torch.where(here.unsqueeze(-1), audio.to(x.dtype), x)

    def encode(self, inputs: JointInputs, **kwargs: Any) -> Tensor:
        """Run the joint encoder -> `(B, N, D)`; that of padding means nothing."""
        videos, own = inputs.videos, None
        if videos is not None:

            def own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return videos[batch, query] == videos[batch, key]

        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs.x,
            attention_mask=inputs.valid.long(),
            and_mask_function=own,
        )
        return self.joint(inputs.x, inputs.coordinates, mask, **kwargs)


class HfvlmMERLOTReserveModel(JointModel):
    """Frames, text and audio in one encoder, whose masks are compared with texts and with audio: the pretrained
    model."""

    further_towers = ("joint", "span")

    def build_heads(self, config: HfvlmMERLOTReserveConfig) -> None:
        self.span = ClassTokenEncoder(config, config.num_span_layers)
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.image_logit_scale = LogitScale(1.0)
        self.audio_logit_scale = LogitScale(1.0)
        self.span_logit_scale = LogitScale(1.0)

    def encode_spans(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Embed short texts `(B, N)` -> `(B, D)`, not normalised.

        Raises:
            ValueError: they are longer than `max_span_length`.
        """
        rows, length = input_ids.shape
        if length > self.config.max_span_length:
            raise ValueError(
                f"Texts of {length} tokens; the span encoder takes {self.config.max_span_length} (max_span_length): "
                "cut them, as the processor's tokenizer does."
            )
        valid = present(self.config, input_ids, attention_mask)
        x = self.embeddings(input_ids)
        like = x.new_empty(rows, 1 + length, 1)
        places, valid = padded_positions(valid), F.pad(valid, (1, 0), value=True).long()
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=like, attention_mask=valid)
        coordinates = (1 + places).unsqueeze(-1) / SPAN_UNIT
        return self.span.projection(self.span(x, coordinates, mask, **kwargs)[:, 0])

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Short texts `(B, N)` -> an output whose `pooler_output`, `(B, D)`, are their embeddings, not normalised."""
        embeds: Any = self.encode_spans(input_ids, attention_mask)
        return BaseModelOutputWithPooling(pooler_output=embeds)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Frames `(B, C, H, W)` -> an output whose `pooler_output`, `(B, D)`, are embeddings, not normalised."""
        return self.vision_model.features(pixel_values, **kwargs)

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Clips `(B, F, M)` -> an output whose `pooler_output`, `(B, D)`, are embeddings, not normalised."""
        return self.audio_model.features(input_features, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # noqa: PLR0913 (what a row may hold)
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        audio_ids: Tensor | None = None,
        video_ids: Tensor | None = None,
        image_tokens: Tensor | None = None,
        audio_tokens: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ReserveOutput:
        """Encode segments of videos together.

        Args:
            input_ids: `(B, N)`, texts of the segments, with `audio_token_id` where there is audio.
            pixel_values: `(B, S, C, H, W)`, a frame of each segment, in 0..1.
            input_features: `(B, A, F, M)`, clips of audio.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            segment_ids: `(B, N)`, the segment of each token; by default 0.
            audio_ids: `(B, N)`, the clip that each token of audio is of; by default they are in the clips' order.
            video_ids: `(B, S)`, the video of each segment, where rows hold several.
            image_tokens: `(B, S', T, D)`, of `encode_images`; before those of `pixel_values`, if both are given.
            audio_tokens: `(B, A, K, D)`, of `encode_audio`, in place of `input_features`.
        """
        grid = None
        if pixel_values is not None:
            grid = self.config.vision_config.pooled_grid(pixel_values)
            encoded = self.encode_images(pixel_values)
            image_tokens = encoded if image_tokens is None else torch.cat([image_tokens, encoded], dim=1)
        if input_features is not None:
            audio_tokens = self.encode_audio(input_features)
        inputs = self.arrange(
            input_ids, attention_mask, segment_ids, image_tokens, audio_tokens, audio_ids, video_ids, grid=grid
        )
        x = self.encode(inputs, **kwargs)
        return ReserveOutput(last_hidden_state=x, embeds=unit(self.head(x[:, : input_ids.shape[1]])))

    def label_logits(self, embeds: Tensor, input_ids: Tensor, label_embeds: Tensor) -> Tensor:
        """Score labels at the masks of rows, in order: embeds `(B, N, D)` and ids `(B, N)` of a forward, labels
        `(L, D)` of `get_text_features` -> `(masks, L)`."""
        return LABEL_SCALE * embeds[input_ids == self.config.mask_token_id] @ unit(label_embeds).t()
