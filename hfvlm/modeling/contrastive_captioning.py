"""Models that match pictures with texts and write about them, with the same weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor
from torch.distributed import ProcessGroup
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import average_losses, token_losses
from hfvlm.modeling.base import DualEncoder, as_features, loss_without_labels
from hfvlm.modeling.captioning import CaptioningModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import as_padded, right_padded


@dataclass
class ContrastiveCaptioningOutput(DualEncoderOutput):
    """Pictures against texts and, with `return_loss` or `labels`, each text written about its picture.

    Args:
        logits: `(T, N, V)`, scores of each text's next tokens.
        text_losses: `(T,)`, the sums of the losses of each text's tokens.
        text_lengths: `(T,)`, how many tokens those are.
    """

    logits: Tensor | None = None
    text_losses: Tensor | None = None
    text_lengths: Tensor | None = None


class ContrastiveCaptioner(DualEncoder, CaptioningModel, ABC):
    """A dual encoder whose text tower also writes: called with a context, it returns scores of the next tokens.

    A subclass builds `vision_model`, `text_model` and `logit_scale`, says in `context` what is written from, and its
    configuration weighs the losses by `contrastive_weight` and `captioning_weight`.
    """

    training_inputs = {"return_loss": True}

    @property
    def text_decoder(self) -> Any:
        return self.text_model

    @abstractmethod
    def context(self, image: BaseModelOutputWithPooling) -> Context:
        """What the vision tower made of pictures -> what the text tower looks at when it writes."""

    def read(self, pixel_values: Tensor, **kwargs: Any) -> Context:
        return self.context(self.vision_model(pixel_values, **kwargs))

    def caption(self, input_ids: Tensor, text: BaseModelOutputWithPooling, context: Context) -> Tensor:
        """Texts `(T, N)`, padded on the right, and their features -> scores of the next tokens, `(T, N, V)`."""
        return self.text_model(input_ids, context=context).logits

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As a dual encoder's; texts are read as they were in training, with padding behind them."""
        if attention_mask is None:
            return super().encode_text(input_ids, None, **kwargs)
        output = super().encode_text(*right_padded(attention_mask, input_ids, attention_mask), **kwargs)
        tokens: Any = output.last_hidden_state
        output.last_hidden_state = as_padded(attention_mask, tokens)
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
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> ContrastiveCaptioningOutput:
        """Every text against every picture; with `return_loss` or `labels`, text i must belong to picture i, and is
        also written about it.

        Args:
            input_ids: `(T, N)`, padded on the right to the full length, as the tokenizer does it.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, not needed: padding is told by its id, as in training.
            labels: `(T, N)`, the ids that are to be predicted in their own places, -100 for those that do not count;
                by default all but padding.
            return_loss: also compute the weighted sum of the contrastive loss and that of captioning.
            interpolate_pos_encoding: take pictures of any size.
        """
        given, side = [input_ids] if labels is None else [input_ids, labels], attention_mask
        if side is not None:
            attention_mask, *given = right_padded(side, side, *given)
        input_ids, labels = given[0], given[1] if labels is not None else None
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask, **kwargs)
        compared = self.compare(as_features(vision), text, return_loss=False)
        output = ContrastiveCaptioningOutput(**dict(compared))
        if labels is None and not return_loss:
            return output
        if labels is None:
            pad = self.config.get_text_config(decoder=True).pad_token_id
            labels = input_ids.masked_fill(input_ids == pad, -100)
        output.logits = self.caption(input_ids, text, self.context(vision))
        output.text_losses = token_losses(output.logits[:, :-1], labels[:, 1:]).sum(dim=1)
        output.text_lengths = (labels[:, 1:] != -100).sum(dim=1)
        output.loss = self.contrast(output)
        if side is not None:
            output.logits = as_padded(side, output.logits)
        return output

    def contrast(
        self,
        output: Any,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The weighted sum of the loss of pairs of embeddings and, where texts were written, that of their tokens."""
        loss = self.config.contrastive_weight * super().contrast(output, pair_loss, group)
        if output.text_losses is None:
            return loss
        captioning = average_losses(output.text_losses.sum(), output.text_lengths.sum(), group)
        return loss + self.config.captioning_weight * captioning
