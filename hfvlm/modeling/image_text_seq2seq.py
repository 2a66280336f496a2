"""Encoder-decoder language models whose encoder attends to images: T5 and its relatives."""

from collections.abc import Collection, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.base import EveryModule
from hfvlm.modeling.compat import CACHE
from hfvlm.modeling.image_text import Features, ImageTextModel, as_outputs
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import ImageTextSeq2SeqOutput


class UntiedT5(EveryModule, T5ForConditionalGeneration):
    """T5 1.1 (mT5, https://arxiv.org/abs/2010.11934; FLAN-T5, 2210.11416), whose output layer is not its embedding
    table."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.lm_head.weight, std=self.config.initializer_factor)


class Seq2SeqImageTextModel(ImageTextModel):
    """A model whose `language_model` has an encoder, the inputs of which images are part of, and a decoder."""

    # T5 averages over the labels of its own batch; the Trainer must not rescale that by counted tokens.
    accepts_loss_kwargs = False

    def further_keywords(self, method: str) -> Collection[str]:
        return {*super().further_keywords(method)} - {"shift_labels"}  # a decoder's labels are not shifted

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Features] | None = None,
        **kwargs: Unpack[Keywords],
    ) -> Any:
        """Score each next token of what is generated about texts with images in them.

        Args:
            input_ids: `(B, N)`, with a placeholder for each token of each image.
            pixel_values: all images of the batch, in the order of their placeholders.
            attention_mask: `(B, N)`, 0 where a row is padded.
            inputs_embeds: `(B, N, D)` in place of `input_ids`; its images are merged already, see `embed`.
            labels: `(B, M)`, what to generate; the loss leaves out -100.
            pixel_values_videos: likewise, all videos.
            mm_encoder_outputs: what `get_image_features` returned, as {"image": ...}, in place of images.
            **kwargs: what else `media_inputs` names, and of the language model: without `labels`, `decoder_input_ids`,
                by default only its start token.
        """
        media: dict[str, Any] = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
        rest: dict[str, Any] = dict(kwargs)
        media |= {name: rest.pop(name) for names in self.media_inputs.values() for name in names if name in rest}
        features = self.encode_media(media, mm_encoder_outputs)
        embeds = self.merged(input_ids, inputs_embeds, features)
        if labels is None and "decoder_input_ids" not in rest:
            start = self.config.text_config.decoder_start_token_id
            rest["decoder_input_ids"] = torch.full((embeds.shape[0], 1), start, device=embeds.device)
        output = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **rest)
        return ImageTextSeq2SeqOutput(**{**output, **as_outputs(features)})

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the language model does: token ids after its start token. Each image is encoded once, and so is
        the text."""
        names = [name for names in self.media_inputs.values() for name in names]
        media = {name: kwargs.pop(name, None) for name in dict.fromkeys(names)}
        features = self.encode_media(media, kwargs.pop("mm_encoder_outputs", None))
        embeds = self.merged(kwargs.pop("input_ids", inputs), kwargs.pop("inputs_embeds", None), features)
        kwargs.pop(CACHE, None)  # of the prompt, which this encoder encodes again
        self.language_model.generation_config = self.generation_config
        return self.language_model.generate(*args, inputs_embeds=embeds, **kwargs)
