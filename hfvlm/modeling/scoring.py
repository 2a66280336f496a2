"""Models that score whole texts with images or videos: rewards of answers, and other classes."""

from collections.abc import Collection, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.headless import replace_output_layer
from hfvlm.modeling.image_text import Features, ImageTextModel
from hfvlm.modeling.keywords import Keywords


class TextScorer(ImageTextModel):
    """Base of a chat model with a linear layer, `score`, on the last token of each text in place of the output layer.

    A subclass inherits from the architecture's model that generates, too, and loads its weights; `score` then begins
    at random. With one label, `num_labels=1`, it is a reward (https://arxiv.org/abs/2203.02155, section 3.5).
    """

    _keys_to_ignore_on_load_unexpected = [r"^language_model\.lm_head\."]
    full_precision_modules = ("vision_model", "projector", "score")
    # They begin at random, and are trained in full next to adapters.
    heads = ("score",)

    def post_init(self) -> None:
        """Finish as `ImageTextModel`, with `score` in place of the output layer, to which nothing is tied then."""
        replace_output_layer(self.language_model, None)
        self.score = nn.Linear(self.config.text_config.hidden_size, self.config.num_labels or 0, bias=False)
        super().post_init()

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a TypeError: the model that generates is another class of the same weights."""
        other = "AutoModelForImageTextToText loads the model that generates them"
        raise TypeError(f"{type(self).__name__} scores texts; {other}.")

    def further_keywords(self, method: str) -> Collection[str]:
        return {*super().further_keywords(method)} - {"labels", "logits_to_keep", "shift_labels"}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Features] | None = None,
        **kwargs: Unpack[Keywords],
    ) -> SequenceClassifierOutputWithPast:
        """Score texts with media -> logits `(B, num_labels)`, of the last token of each that is not padding.

        Args:
            input_ids: `(B, N)`, with a placeholder for each token of each image.
            pixel_values: all images of the batch, in the order of their placeholders; see `get_image_features`.
            attention_mask: `(B, N)`, 0 where a row is padded, on either side. Without it, no row is.
            inputs_embeds: `(B, N, D)` in place of `input_ids`, as of the model that generates.
            labels: `(B,)`; the loss is the one that `config.problem_type` names.
            image_sizes: `(images, 2)`, height and width in pixels, for models that need them.
            pixel_values_videos: likewise, all videos.
            mm_encoder_outputs: outputs of `get_image_features`, as {"image": ...}, in place of images.
            **kwargs: other inputs that `media_inputs` names, and those of the language model.

        Raises:
            ValueError: the images do not fit their placeholders; the message counts both. Or the mask is no `(B, N)`.
        """
        media = {"pixel_values": pixel_values, "image_sizes": image_sizes, "pixel_values_videos": pixel_values_videos}
        output = self.base_model(
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            attention_mask=attention_mask,
            **{name: value for name, value in media.items() if value is not None},
            **{"use_cache": False, **kwargs, "return_dict": True},
        )
        logits = self.score(last_tokens(output.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


def last_tokens(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Take the last token of each row that is not padding, `(B, N, D)` -> `(B, D)`.

    Raises:
        ValueError: the mask is not `(B, N)`.
    """
    if attention_mask is None:
        return x[:, -1]
    if attention_mask.shape != x.shape[:2]:
        wanted, given = tuple(x.shape[:2]), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be {wanted}, a number a token, to find the last one; it is {given}.")
    positions = torch.arange(x.shape[1], device=x.device)
    last = torch.where(attention_mask.to(x.device) != 0, positions, -1).amax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), last]
