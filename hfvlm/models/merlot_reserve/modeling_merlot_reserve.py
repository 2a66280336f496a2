"""MERLOT Reserve (https://arxiv.org/abs/2201.02639): frames, text and audio of a video's segments in one encoder.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/modeling.py. It is longer than other
architectures by its pretraining, by the two models that choose answers and by its towers, in files of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.merlot_reserve.configuration_merlot_reserve import HfvlmMERLOTReserveConfig
from hfvlm.models.merlot_reserve.encoders import ClassTokenEncoder, Encoder, RotaryAttention
from hfvlm.models.merlot_reserve.modeling_merlot_reserve_towers import (
    HfvlmMERLOTReserveAudioModel,
    HfvlmMERLOTReservePreTrainedModel,
    HfvlmMERLOTReserveVisionModel,
)
from hfvlm.models.merlot_reserve.segments import ReserveSegment
from hfvlm.models.merlot_reserve.sequences import JointInputs, arranged, with_audio
from hfvlm.modules.embeddings import padded_positions, present
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import PreNormLayer

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


def sample_segments(processor: Any, samples: Callable[[str], list[Any]]) -> list[tuple[Any, str, Tensor]]:
    """Return a frame, a text and clips of audio of each sample."""
    clips = [processor.feature_extractor(each, return_tensors="pt")["input_features"] for each in samples("audio")]
    return list(zip(samples("image"), samples("text"), clips, strict=True))


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
    # Losses are means over a batch, and not over its counted tokens.
    accepts_loss_kwargs = False
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
        x, valid = self.embeddings(input_ids), present(input_ids, self.config.pad_token_id, attention_mask)
        if audio_tokens is not None:
            x = with_audio(x, input_ids == self.config.audio_token_id, audio_tokens, audio_ids)
        media = segment_ids, image_tokens, video_ids
        return arranged(x, valid, self.config.vision_config, *media, first_segment=first_segment, grid=grid)

    def encode(self, inputs: JointInputs, **kwargs: Any) -> Tensor:
        """Run the joint encoder -> `(B, N, D)`; that of padding means nothing."""
        return self.joint(inputs.x, inputs.coordinates, inputs.mask(self.config), **kwargs)


class HfvlmMERLOTReserveModel(JointModel):
    """Frames, text and audio in one encoder, whose masks are compared with texts and with audio: the pretrained
    model."""

    further_towers = ("joint", "span")
    _keep_in_fp32_modules_strict = ["image_logit_scale", "audio_logit_scale", "span_logit_scale"]

    def build_heads(self, config: HfvlmMERLOTReserveConfig) -> None:
        self.span = ClassTokenEncoder(config, config.num_span_layers)
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.image_logit_scale = LogitScale(1.0)
        self.audio_logit_scale = LogitScale(1.0)
        self.span_logit_scale = LogitScale(1.0)

    def sample_inputs(self, processor: Any, samples: Callable[[str], list[Any]]) -> dict[str, Tensor]:
        """Lay out samples of each modality as rows, a segment with a text and one with audio each."""
        rows = [
            processor.join([ReserveSegment(frame, text), ReserveSegment(frame, clips=clips)])
            for frame, text, clips in sample_segments(processor, samples)
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def encode_spans(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Embed short texts `(B, N)` -> `(B, D)`, not normalised."""
        return self.span.projection(self.span_tokens(input_ids, attention_mask, **kwargs)[:, 0])

    def span_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Encode short texts `(B, N)` -> `(B, 1 + N, D)`, a class token first.

        Raises:
            ValueError: they are longer than `max_span_length`.
        """
        rows, length = input_ids.shape
        if length > self.config.max_span_length:
            raise ValueError(
                f"Texts of {length} tokens; the span encoder takes {self.config.max_span_length} (max_span_length): "
                "cut them, as the processor's tokenizer does."
            )
        valid = present(input_ids, self.config.pad_token_id, attention_mask)
        x = self.embeddings(input_ids)
        like = x.new_empty(rows, 1 + length, 1)
        places, valid = padded_positions(valid), F.pad(valid, (1, 0), value=True).long()
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=like, attention_mask=valid)
        coordinates = (1 + places).unsqueeze(-1) / SPAN_UNIT
        return self.span(x, coordinates, mask, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Short texts `(B, N)` -> an output whose `pooler_output`, `(B, D)`, are their embeddings, not normalised, and
        whose `last_hidden_state`, `(B, 1 + N, D)`, begins with the class token that they are projections of.

        Raises:
            ValueError: hidden states or attention weights are asked for, which the joint encoder alone records.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name}: the encoder of short texts records nothing; the model's forward does.")
        tokens: Any = self.span_tokens(input_ids, attention_mask, **kwargs)
        embeds: Any = self.span.projection(tokens[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=embeds)

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
