"""BLIP for questions about images (https://arxiv.org/abs/2201.12086, figure 5a).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_vqa.py.
"""

from typing import Any, Unpack

import torch
from torch import Tensor
from transformers.utils.generic import can_return_tuple

from hfvlm.checks.ranges import check_integer
from hfvlm.losses import token_losses
from hfvlm.modeling.captioning import CaptioningModel, CaptioningOutput, RankedAnswers, begin_with
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig
from hfvlm.models.blip.modeling_blip import (
    HfvlmBLIPPreTrainedModel,
    HfvlmBLIPTextDecoder,
    HfvlmBLIPTextModel,
    HfvlmBLIPVisionModel,
)
from hfvlm.modules.context import Context


class AnswerDecoder(HfvlmBLIPTextDecoder):
    """A decoder with cross-attention to a question that the text encoder has encoded with its image."""

    def __init__(self, config: HfvlmBLIPTextConfig):
        super().__init__(config, context_size=config.hidden_size)


class HfvlmBLIPForQuestionAnswering(CaptioningModel, HfvlmBLIPPreTrainedModel):
    """Answers questions about images: the text encoder attends to the image, and the decoder to the text encoder."""

    config: HfvlmBLIPConfig
    main_input_name = "pixel_values"
    # The loss is a weighted mean over questions; the Trainer must not rescale it by counted tokens.
    accepts_loss_kwargs = False

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmBLIPTextModel._from_config(config.text_config)
        self.text_decoder = AnswerDecoder._from_config(config.text_config)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize both tables, of the text encoder and of the decoder; see transformers'."""
        self.text_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def read(  # type: ignore[override]
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Context:
        """Encode images `(B, C, H, W)` and questions `(B * T, N)` -> what the decoder attends to."""
        image = super().read(pixel_values, **kwargs)
        return Context(self.text_model.ground(input_ids, attention_mask, image).last_hidden_state, attention_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        answer_counts: Tensor | None = None,
        answer_weights: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> CaptioningOutput:
        """Score each next token of answers to questions and, with `labels`, compute the loss.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B, N)`, the questions; [ENC] takes the place of their first token.
            attention_mask: `(B, N)`, 0 for padding on either side.
            labels: `(A, M)`, ids of the answers with -100 after their end; without any, the first token is scored.
            answer_counts: `(B,)`, how many consecutive answers belong to each question; by default equally many.
            answer_weights: `(A,)`, by default 1; the weights of a question's answers usually sum to 1.
            interpolate_pos_encoding: take images of any size.
        """
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        question = self.text_model.ground(input_ids, attention_mask, Context(vision.last_hidden_state), **kwargs)
        context = Context(question.last_hidden_state, attention_mask)
        if answer_counts is not None:
            mask = None if attention_mask is None else attention_mask.repeat_interleave(answer_counts, dim=0)
            context = Context(context.tokens.repeat_interleave(answer_counts, dim=0), mask)
        decoder = self.text_decoder(*self.answers(labels, input_ids.shape[0], input_ids), context, **kwargs)
        output = CaptioningOutput(
            logits=decoder.logits,
            vision_model_output=vision,
            text_model_output=question,
            text_decoder_output=decoder,
        )
        if labels is not None:
            losses = self.answer_losses(decoder.logits, labels)
            output.loss = (losses if answer_weights is None else losses * answer_weights).sum() / input_ids.shape[0]
        return output

    def answers(self, labels: Tensor | None, questions: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make the decoder's inputs, [DEC] first, and their mask."""
        start = self.config.text_config.bos_token_id
        if labels is None:
            return torch.full_like(like[:questions, :1], start), None
        mask = (labels != -100).long()
        return begin_with(start, labels.masked_fill(labels == -100, self.config.text_config.pad_token_id), mask), mask

    def answer_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the losses of each answer's tokens: `(A, M, V)`, `(A, M)` -> `(A,)`."""
        smoothing = self.config.label_smoothing
        return token_losses(logits[:, :-1], labels[:, 1:], label_smoothing=smoothing).sum(dim=1)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Any = None,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """Generate answers to questions.

        The original's generation also attends to a question's padding, which its training and its ranking do not; pass
        `context=Context(model.read(...).tokens)` to have the same.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T questions about each image.
            attention_mask: `(B * T, N)`, 0 for padding on either side.
            context: what `read` returned, instead of the others.
            interpolate_pos_encoding: take images of any size.
            **options: of transformers' `generate`.

        Returns:
            Token ids of the answers, [DEC] first, or what `options` ask for.
        """
        if context is None:
            context = self.read(
                pixel_values, input_ids, attention_mask, interpolate_pos_encoding=interpolate_pos_encoding
            )
        return super().generate(context=context, **options)

    @torch.no_grad()
    def rank(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        candidates: Tensor,
        *,
        top_k: int = 128,
    ) -> RankedAnswers:
        """Choose from a list of answers: those with the likeliest first tokens are compared in full.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B, N)`, the questions.
            attention_mask: `(B, N)`, 0 for padding on either side.
            candidates: `(A, M)`, ids of the answers with -100 after their end.
            top_k: how many answers are compared in full; the paper takes 128.

        Raises:
            ValueError: top_k is no number of answers.
        """
        check_integer("top_k", top_k)
        context = self.read(pixel_values, input_ids, attention_mask).for_reuse()
        first = self.text_decoder(*self.answers(None, input_ids.shape[0], input_ids), context).logits[:, 0]
        _, indices = first.softmax(dim=1)[:, candidates[:, 1]].topk(min(top_k, candidates.shape[0]), dim=1)
        labels = candidates[indices.flatten()]
        logits = self.text_decoder(*self.answers(labels, 0, labels), context).logits
        scores = -self.answer_losses(logits, labels).view(indices.shape)
        best = indices.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return RankedAnswers(indices, scores, best)
