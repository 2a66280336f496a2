"""MERLOT Reserve's fine-tuned models, which choose answers: VCR's (https://visualcommonsense.com) and TVQA's
(https://arxiv.org/abs/1809.01696).

Source: https://github.com/rowanz/merlot_reserve at d22c50f, finetune/vcr/qa_qar_joint_finetune.py and
finetune/tvqa/tvqa_finetune.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MultipleChoiceModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.merlot_reserve.configuration_merlot_reserve import HfvlmMERLOTReserveConfig
from hfvlm.models.merlot_reserve.modeling_merlot_reserve import JointModel, sample_segments
from hfvlm.models.merlot_reserve.segments import ReserveSegment
from hfvlm.models.merlot_reserve.sequences import concatenated
from hfvlm.modules.pooling import tokens_at


@dataclass
class ReserveVideoChoiceOutput(MultipleChoiceModelOutput):
    """Scores of answers about a video.

    Args:
        logits: `(B, C)`, logarithms of the mean of both probabilities.
        logits_from_text: `(B, C)`, by the subtitles.
        logits_from_audio: `(B, C)`, by the audio.
        text_loss: of `logits_from_text`; `loss` is the sum of both.
        audio_loss: of `logits_from_audio`.
    """

    logits_from_text: Tensor | None = None
    logits_from_audio: Tensor | None = None
    text_loss: Tensor | None = None
    audio_loss: Tensor | None = None


class Score(nn.Linear):
    """A linear layer with one output, whose sum does not depend on where the weights are in memory."""

    def __init__(self, size: int):
        super().__init__(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B,)."""
        return (x * self.weight).sum(dim=-1)


class ChoiceModel(JointModel):
    """Base of the two: one score at the mask that ends an answer."""

    def build_heads(self, config: HfvlmMERLOTReserveConfig) -> None:
        for tower in (self.vision_model, *([self.audio_model] if self.has_audio else [])):
            tower.encoder.projection = nn.Identity()  # nothing is compared
        self.classifier = Score(config.hidden_size)

    def score(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Score rows by their first mask, or their first token without one: `(B, N, D)`, `(B, N)` -> `(B,)`."""
        first = (input_ids == self.config.mask_token_id).int().argmax(dim=1)
        return self.classifier(tokens_at(x, first))


class HfvlmMERLOTReserveForMultipleChoice(ChoiceModel):
    """A question about an image and its answers, each in a sequence of its own: VCR."""

    input_modalities = ["image", "text"]
    has_audio = False

    def sample_inputs(self, processor: Any, samples: Callable[[str], list[Any]]) -> dict[str, Tensor]:
        """Lay out samples of images and texts as questions, to which the texts are the answers."""
        images, texts = samples("image"), samples("text")
        return dict(processor.questions(images, texts, [texts] * len(images)))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> MultipleChoiceModelOutput:
        """Score answers -> logits `(B, C)`, or of several questions about each image `(B, Q, C)`.

        Args:
            input_ids: `(B, C, N)` or `(B, Q, C, N)`, question, answer and `mask_token_id`. VCR's two questions are
                that for the answer and, with it, that for its reason.
            pixel_values: `(B, C, H, W)`, in 0..1.
            attention_mask: of the shape of `input_ids`, 0 for padding; by default for every `pad_token_id`.
            labels: `(B,)` or `(B, Q)`, the right answers, for the loss.
        """
        shape, ids = input_ids.shape[:-1], input_ids.flatten(0, -2)
        image = self.encode_images(pixel_values.unsqueeze(1)).repeat_interleave(len(ids) // len(pixel_values), dim=0)
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        grid = self.config.vision_config.pooled_grid(pixel_values)
        inputs = self.arrange(ids, mask, image_tokens=image, grid=grid)
        logits = self.score(self.encode(inputs, **kwargs), ids).view(shape)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        return MultipleChoiceModelOutput(loss=loss, logits=logits)


class HfvlmMERLOTReserveForVideoMultipleChoice(ChoiceModel):
    """A question about a video and its answers, each in two sequences, with subtitles and with audio: TVQA."""

    def sample_inputs(self, processor: Any, samples: Callable[[str], list[Any]]) -> dict[str, Tensor]:
        """Lay out samples of each modality as questions about a segment, to which the texts are the answers."""
        rows = [
            processor.video_question([ReserveSegment(frame, text, clips)], text, samples("text"), num_segments=1)
            for frame, text, clips in sample_segments(processor, samples)
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        audio_input_ids: Tensor,
        input_features: Tensor,
        segment_ids: Tensor | None = None,
        audio_segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ReserveVideoChoiceOutput:
        """Score answers, by subtitles and by audio.

        Args:
            input_ids: `(B, C, N)`, question, answer, `mask_token_id`, subtitles.
            pixel_values: `(B, S, C, H, W)`, a frame of each segment, in 0..1.
            audio_input_ids: `(B, C, M)`, question, answer, `mask_token_id`, and `audio_token_id` for each of the
                tokens of the clips, in order.
            input_features: `(B, A, F, M)`, clips of audio.
            segment_ids: `(B, C, N)`, the segment of each token: 0 for question and answer, from 1 on for subtitles,
                as frames count; by default 0.
            audio_segment_ids: `(B, C, M)`, likewise.
            labels: `(B,)`, the right answers, for the loss.
        """
        choices = input_ids.shape[1]
        text_ids, audio_ids = input_ids.flatten(0, 1), audio_input_ids.flatten(0, 1)
        image = self.encode_images(pixel_values).repeat_interleave(choices, dim=0)
        shown: dict[str, Any] = {
            "image_tokens": image,
            "first_segment": 1,
            "grid": self.config.vision_config.pooled_grid(pixel_values),
        }
        heard = self.encode_audio(input_features).repeat_interleave(choices, dim=0)
        parts = [
            self.arrange(
                audio_ids,
                segment_ids=None if audio_segment_ids is None else audio_segment_ids.flatten(0, 1),
                audio_tokens=heard,
                **shown,
            ),
            self.arrange(text_ids, segment_ids=None if segment_ids is None else segment_ids.flatten(0, 1), **shown),
        ]
        audio_states, text_states = self.encode(concatenated(parts), **kwargs).chunk(2)
        by_text = self.score(text_states, text_ids).view(-1, choices)
        by_audio = self.score(audio_states, audio_ids).view(-1, choices)
        both = torch.stack([by_text, by_audio]).float().softmax(dim=-1).mean(dim=0).log()
        output = ReserveVideoChoiceOutput(logits=both, logits_from_text=by_text, logits_from_audio=by_audio)
        if labels is not None:
            output.text_loss = F.cross_entropy(by_text.float(), labels)
            output.audio_loss = F.cross_entropy(by_audio.float(), labels)
            output.loss = output.text_loss + output.audio_loss
        return output
