"""MERLOT Reserve's pretraining (https://arxiv.org/abs/2201.02639, section 3.3): masked text and audio are found among
those of the batch, and a segment's frame by its audio or text.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, pretrain/pretrain_model.py.
"""

from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import candidate_losses
from hfvlm.losses.processes import all_processes
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.merlot_reserve.modeling_merlot_reserve import HfvlmMERLOTReserveModel, unit
from hfvlm.models.merlot_reserve.sequences import JointInputs, concatenated
from hfvlm.modules.embeddings import present
from hfvlm.modules.similarity import LogitScale

HIGHEST_LOGIT_SCALE = log(100.0)
# How much more likely a masked text with frames is drawn than one without.
MULTIMODAL_PREFERENCE = log(4.0)
# Where a masked text was predicted: from text and audio to be found, from audio that is heard, or from text alone.
TASKS = ("text_to_audio", "audio_to_text", "texts")


@dataclass
class ReservePreTrainingOutput(ModelOutput):
    """A step of pretraining.

    Args:
        loss: the sum of the three.
        image_loss: of finding a segment's frame by its audio or text.
        audio_loss: of finding masked audio.
        span_loss: of finding masked texts.
        task_losses: `(3,)`, the mean of `span_loss` over the texts of each of `TASKS`.
        image_predictions: `(B * S, D)`, of unit length, as all of these.
        image_embeds: `(B * S, D)`.
        audio_predictions: `(M, D)`.
        audio_embeds: `(M, D)`.
        other_audio_embeds: `(E, D)`, of audio that was not masked.
        span_predictions: `(T, D)`.
        span_embeds: `(T, D)`.
        span_tasks: `(T,)`, which of `TASKS` a text was masked in, -1 for none.
        hidden_states: of the joint encoder.
        attentions: of the joint encoder.
    """

    loss: Tensor | None = None
    image_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    span_loss: Tensor | None = None
    task_losses: Tensor | None = None
    image_predictions: Tensor | None = None
    image_embeds: Tensor | None = None
    audio_predictions: Tensor | None = None
    audio_embeds: Tensor | None = None
    other_audio_embeds: Tensor | None = None
    span_predictions: Tensor | None = None
    span_embeds: Tensor | None = None
    span_tasks: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Rows(NamedTuple):
    """Sequences of one of the tasks, `(rows, N)` each: the ids, the audio clips and the masked texts."""

    ids: Tensor
    clips: Tensor
    spans: Tensor

    @classmethod
    def of(cls, sequences: Tensor) -> "Rows":
        """Take `(B, R, N, 3)` or, of one sequence each, `(B, N, 3)` apart."""
        return cls(*sequences.reshape(-1, *sequences.shape[-2:]).unbind(-1))


def pooled(x: Tensor, where: Tensor, index: Tensor, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Add up the tokens at `where`, `(R, N)`, by their index -> `(rows, size, D)` and their numbers, `(rows, size)`.

    The rows of `x`, `(R, N, D)`, are consecutive ones of the fewer `rows`. Sums, not means, as in the original.
    """
    x, index, where = x.reshape(rows, -1, x.shape[-1]), index.reshape(rows, -1), where.reshape(rows, -1)
    valid = where & (index >= 0) & (index < size)
    one_hot = torch.nn.functional.one_hot(torch.where(valid, index, size), size + 1)[..., :size].to(x.dtype)
    return one_hot.mT @ x, one_hot.sum(dim=1)


class HfvlmMERLOTReserveForPreTraining(HfvlmMERLOTReserveModel):
    """The model with its three losses."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # noqa: PLR0913  (what the sampler makes of videos)
        self,
        pixel_values: Tensor,
        input_features: Tensor,
        text_to_audio: Tensor,
        audio_to_text: Tensor,
        matching: Tensor,
        texts: Tensor,
        span_ids: Tensor,
        video_ids: Tensor | None = None,
        *,
        return_loss: bool = True,
        **kwargs: Unpack[Keywords],
    ) -> ReservePreTrainingOutput:
        """Compute the losses of videos of S segments, each a frame and A / S clips of audio.

        Sequences have three columns, as the masking makes them: the token's id, its clip, and the masked text that it
        stands for, or -1. They come group by group, `num_segment_groups` for each time that a video is masked.

        Args:
            pixel_values: `(B, S, C, H, W)`, in 0..1.
            input_features: `(B, A, F, M)`.
            text_to_audio: `(B, R, N, 3)`, texts that lack some, with the audio to be found there.
            audio_to_text: `(B, R, N, 3)`, audio and texts, some of which are to be found.
            matching: `(B, N, 3)`, audio or texts after a `pool_token_id` for each segment.
            texts: `(B, R, N, 3)`, other texts with masks.
            span_ids: `(B, T, max_span_length)`, the masked texts, with padding; a row without any counts for nothing.
            video_ids: `(B, S)`, the video of each segment, where rows hold several; by default one.
            return_loss: whether `loss` is the sum of the three.
        """
        batch, segments = pixel_values.shape[:2]
        clips = input_features.shape[1]
        image = self.vision_model(pixel_values.flatten(0, 1))
        audio = self.audio_model(input_features.flatten(0, 1))
        image_tokens = image.tokens.unflatten(0, (batch, segments))
        audio_tokens = audio.tokens.unflatten(0, (batch, clips))
        if video_ids is None:
            video_ids = torch.zeros(batch, segments, dtype=torch.long, device=pixel_values.device)
        tasks = {"audio_to_text": Rows.of(audio_to_text), "matching": Rows.of(matching)}
        tasks |= {"text_to_audio": Rows.of(text_to_audio), "texts": Rows.of(texts)}
        joint = {
            "audio_to_text": self.masked(tasks["audio_to_text"], image_tokens, video_ids, audio_tokens),
            "matching": self.summed_up(tasks["matching"], audio_tokens),
            "text_to_audio": self.masked(tasks["text_to_audio"], image_tokens, video_ids, None, clips),
            "texts": self.arrange(tasks["texts"].ids),
        }
        states = self.head(self.encode(concatenated(list(joint.values())), **kwargs))
        parts = states.split([len(rows.x) for rows in joint.values()])
        x = {name: part[:, : tasks[name].ids.shape[1]] for name, part in zip(joint, parts, strict=True)}
        output = ReservePreTrainingOutput()
        self.find_images(output, tasks["matching"], x["matching"], image.embeds, segments)
        self.find_audio(output, tasks["text_to_audio"], x["text_to_audio"], audio.embeds.unflatten(0, (batch, clips)))
        self.find_texts(output, tasks, x, span_ids)
        if return_loss:
            output.loss = output.image_loss + output.audio_loss + output.span_loss  # type: ignore[operator]
        return output

    def masked(
        self,
        rows: Rows,
        image_tokens: Tensor,
        video_ids: Tensor,
        audio_tokens: Tensor | None,
        clips: int = 0,
    ) -> JointInputs:
        """Arrange the sequences of groups of segments with the frames of their group."""
        groups, (batch, segments) = self.config.num_segment_groups, video_ids.shape
        if segments % groups or len(rows.ids) % (batch * groups):
            raise ValueError(
                f"{segments} segments and {len(rows.ids)} sequences of {batch} videos do not divide into "
                f"num_segment_groups {groups}."
            )
        each, times = segments // groups, len(rows.ids) // (batch * groups)
        clips = clips if audio_tokens is None else audio_tokens.shape[1]
        per_segment = clips // segments

        def by_group(values: Tensor) -> Tensor:
            return values.unflatten(1, (groups, each)).repeat(1, times, *(1,) * (values.ndim - 1)).flatten(0, 1)

        return self.arrange(
            rows.ids,
            segment_ids=rows.clips.div(per_segment, rounding_mode="floor") % each,
            image_tokens=by_group(image_tokens),
            audio_tokens=None if audio_tokens is None else audio_tokens.repeat_interleave(groups * times, dim=0),
            audio_ids=rows.clips,
            video_ids=self.split_at_random(by_group(video_ids)),
        )

    def split_at_random(self, video_ids: Tensor) -> Tensor:
        """In training, make the last segments of some rows, `(R, S)`, another video."""
        rows, segments = video_ids.shape
        if not self.training or segments == 1 or not self.config.video_split_rate:
            return video_ids
        device = video_ids.device
        first = torch.randint(1, segments, (rows, 1), device=device)
        split = torch.rand(rows, 1, device=device) < self.config.video_split_rate
        later = torch.arange(segments, device=device) >= first
        return torch.where(split & later, video_ids + video_ids.max() + 1, video_ids)

    def summed_up(self, rows: Rows, audio_tokens: Tensor) -> JointInputs:
        """Arrange whole videos' audio or text, without frames; a pooling token begins each segment."""
        segment_ids = (rows.ids == self.config.pool_token_id).long().cumsum(dim=1)
        return self.arrange(rows.ids, segment_ids=segment_ids, audio_tokens=audio_tokens, audio_ids=rows.clips)

    def find_images(
        self, output: ReservePreTrainingOutput, rows: Rows, x: Tensor, embeds: Tensor, segments: int
    ) -> None:
        """Compare what the pooling tokens sum up with the frames, `(B * S, D)`."""
        here = rows.ids == self.config.pool_token_id
        found, _ = pooled(x, here, here.long().cumsum(dim=1) - 1, segments, len(x))
        output.image_predictions, output.image_embeds = unit(found.flatten(0, 1)), unit(embeds)
        losses = self.losses(output.image_predictions, output.image_embeds, self.image_logit_scale)
        output.image_loss = losses.mean()

    def find_audio(self, output: ReservePreTrainingOutput, rows: Rows, x: Tensor, embeds: Tensor) -> None:
        """Compare masks of audio with the clips `(B, A, D)`: those that were masked, among all."""
        batch, clips = embeds.shape[:2]
        times = len(rows.ids) // (batch * self.config.num_segment_groups)
        here = rows.ids == self.config.audio_mask_token_id
        found, count = pooled(x, here, rows.clips, clips, batch)
        number = int(clips * self.config.mask_share) * times
        order = count.argsort(dim=1, descending=True, stable=True).unsqueeze(-1)
        found, embeds = (values.gather(1, order.expand_as(values)) for values in (found, embeds))
        output.audio_predictions, output.audio_embeds = (
            unit(values[:, :number].flatten(0, 1)) for values in (found, embeds)
        )
        output.other_audio_embeds = unit(embeds[:, number:].flatten(0, 1))
        output.audio_loss = self.losses(
            output.audio_predictions, output.audio_embeds, self.audio_logit_scale, output.other_audio_embeds
        ).mean()

    def find_texts(
        self, output: ReservePreTrainingOutput, tasks: dict[str, Rows], x: dict[str, Tensor], span_ids: Tensor
    ) -> None:
        """Compare masks of texts with the masked texts `(B, T, N)`, or with some of them, drawn over the batch."""
        batch, number = span_ids.shape[:2]
        found, counts = zip(
            *(
                pooled(x[name], tasks[name].ids == self.config.mask_token_id, tasks[name].spans, number, batch)
                for name in TASKS
            ),
            strict=True,
        )
        usable = present(span_ids, self.config.pad_token_id).any(dim=-1) & (torch.stack(counts).sum(dim=0) > 0)
        preference = usable * 1e6 + MULTIMODAL_PREFERENCE * (counts[0] + counts[1])
        if self.training:
            preference = preference - torch.rand_like(preference).log().neg().log()
        wanted = min(self.config.num_target_spans or number, number) * batch
        best = preference.flatten().topk(wanted).indices
        none = torch.zeros_like(counts[0])
        output.span_tasks = torch.stack([none, *counts], dim=-1).argmax(dim=-1).flatten()[best] - 1
        output.span_predictions = unit(torch.stack(found).sum(dim=0).flatten(0, 1)[best])
        output.span_embeds = unit(self.encode_spans(span_ids.flatten(0, 1)[best]))
        losses = self.losses(output.span_predictions, output.span_embeds, self.span_logit_scale)
        output.span_loss = losses.mean()
        of_task = torch.stack([output.span_tasks == i for i in range(len(TASKS))]).to(losses.dtype)
        output.task_losses = (of_task @ losses).detach() / (of_task.sum(dim=1) + 1e-5)

    def losses(self, a: Tensor, b: Tensor, scale: LogitScale, others: Tensor | None = None) -> Tensor:
        """Compute each pair's loss, over the batches of all processes in training."""
        group = all_processes() if self.training else None
        factor: Any = scale.exp().clamp_max(100.0)
        return candidate_losses(a, b, factor, others, group=group)
