"""Models that match images with texts and caption them, with the same weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from hfvlm.losses import average_losses, token_losses
from hfvlm.modeling.base import loss_without_labels
from hfvlm.modeling.captioning import CaptioningModel, TextDecoder
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.modeling.text import TextTower
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import as_padded, right_padded
from hfvlm.modules.transformer import CausalAttention, CrossAttention, PreNormLayer


@dataclass
class ContrastiveCaptioningOutput(DualEncoderOutput):
    """Images against texts and, with `return_loss` or `labels`, each text predicted from its image.

    Args:
        logits: `(T, N, V)`, scores of each text's next tokens.
        text_losses: `(T,)`, the sums of the losses of each text's tokens.
        text_lengths: `(T,)`, how many tokens those are.
    """

    logits: Tensor | None = None
    text_losses: Tensor | None = None
    text_lengths: Tensor | None = None


class CaptioningTextTower(TextDecoder, TextTower):
    """Base of the text towers: without a context they embed texts, with one they continue them."""

    embeds_texts_alone = True
    _no_split_modules = ["PreNormLayer", "GroundingLayer"]
    _can_record_outputs = {
        "hidden_states": PreNormLayer,
        "attentions": OutputRecorder(CausalAttention, index=1),
        "cross_attentions": OutputRecorder(CrossAttention, index=1),
    }
    token: nn.Embedding
    position: nn.Parameter

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position[position_ids]


class ContrastiveCaptioner(DualEncoder, CaptioningModel, ABC):
    """A dual encoder whose text tower also generates: called with a context, it scores the next tokens.

    A subclass builds `vision_model`, `text_model` and `logit_scale`, makes what captions are generated from in
    `context`, and its configuration weighs the losses by `contrastive_weight` and `captioning_weight`.
    """

    training_inputs = {"return_loss": True}
    output_class = ContrastiveCaptioningOutput
    needs_tokens = True

    @property
    def text_decoder(self) -> Any:
        return self.text_model

    @abstractmethod
    def context(self, image: BaseModelOutputWithPooling) -> Context:
        """Turn the vision tower's output into what the text tower attends to when it generates."""

    def read(self, pixel_values: Tensor, **kwargs: Any) -> Context:
        return self.context(self.vision_model(pixel_values, **kwargs))

    def caption(self, input_ids: Tensor, text: BaseModelOutputWithPooling, context: Context) -> Tensor:
        """Score the next tokens, `(T, N, V)`, of texts `(T, N)`, padded on the right, with known features."""
        return self.text_model(input_ids, context=context).logits

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed texts as in training, with padding after them."""
        if attention_mask is None:
            return super().encode_text(input_ids, None, **kwargs)
        output = super().encode_text(*right_padded(attention_mask, input_ids, attention_mask), **kwargs)
        if output.last_hidden_state is not None:
            output.last_hidden_state = as_padded(attention_mask, output.last_hidden_state)
        return output

    @loss_without_labels
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ContrastiveCaptioningOutput:
        """Compare every text with every image; with `return_loss` or `labels`, text i must belong to image i, and is
        also predicted from it.

        Args:
            input_ids: `(T, N)`, padded on the right to the full length, as the tokenizer does it.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, not needed: padding has an id of its own, as in training.
            labels: `(T, N)`, the ids that are to be predicted at their own positions, -100 for those that do not
                count; by default all but padding.
            return_loss: also compute the weighted sum of the contrastive loss and that of captioning.
            **kwargs: as of every dual encoder, such as `interpolate_pos_encoding=True` for images of any size.
        """
        given, side = [input_ids] if labels is None else [input_ids, labels], attention_mask
        if side is not None:
            attention_mask, *given = right_padded(side, side, *given)
        input_ids, labels = given[0], given[1] if labels is not None else None
        image, text = self.encode(input_ids, pixel_values, attention_mask, **kwargs)
        output = self.compare(image, text, return_loss=False)
        if labels is None and not return_loss:
            return output
        if labels is None:
            pad = self.config.get_text_config(decoder=True).pad_token_id
            labels = input_ids.masked_fill(input_ids == pad, -100)
        output.logits = self.caption(input_ids, text, self.context(image))
        output.text_losses = token_losses(output.logits[:, :-1], labels[:, 1:]).sum(dim=1)
        output.text_lengths = (labels[:, 1:] != -100).sum(dim=1)
        output.loss = self.contrast(output)
        if side is not None:
            output.logits = as_padded(side, output.logits)
        return output

    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        """Weigh the loss of pairs of embeddings and, where texts were predicted, that of their tokens."""
        loss = self.config.contrastive_weight * super().loss_of_pairs(output, pair_loss, group)
        if output.text_losses is None:
            return loss
        captioning = average_losses(output.text_losses.sum(), output.text_lengths.sum(), group)
        return loss + self.config.captioning_weight * captioning
