"""Models that write about pictures with transformers' `generate`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput

from hfvlm.modeling import HfvlmPreTrainedModel
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import text_positions


@dataclass
class CaptioningOutput(ModelOutput):
    """What is written about pictures.

    Args:
        loss: scalar, with `labels`.
        logits: `(T, N, V)`, scores of each text's next tokens.
        vision_model_output: the vision tower's whole output.
        text_model_output: the text encoder's, where the writing is about what was read with the picture.
        text_decoder_output: the decoder's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    text_decoder_output: CausalLMOutputWithCrossAttentions | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class GroundedGenerationMixin(GenerationMixin):
    """`generate` for a text decoder whose forward takes a `context`, and where each step of it begins."""

    config: Any

    def begin_step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        *,
        use_cache: bool | None,
    ) -> tuple[Tensor, Cache | None]:
        """The positions of a step's tokens, by default those after the cache's; and the cache, made if missing."""
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask, cache)
        return position_ids, cache

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Of ids `(B, N)` that follow a cache's, counted from each text's first token; see `text_positions`."""
        past = 0 if cache is None else cache.get_seq_length()
        return text_positions(input_ids, attention_mask, self.config.max_position_embeddings, past)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Any = None, *, context: Context, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Continue texts that are grounded in a context.

        Args:
            inputs: `(B * T, N)` token ids to continue, padded on either side; by default the start token alone.
            context: of B rows.
            attention_mask: `(B * T, N)`, 0 for padding.
            **options: of transformers' `generate`.

        Returns:
            What transformers' `generate` returns; token ids begin with `inputs`, padded on the left.
        """
        config = self.config.get_text_config(decoder=True)
        if inputs is None:
            inputs = torch.full((len(context.tokens), 1), config.bos_token_id, device=context.tokens.device)
        elif attention_mask is not None:
            inputs, attention_mask = padded_left(inputs, attention_mask, config.pad_token_id)
        reused = context if context.kept is not None else context.for_reuse()
        result: Any = super().generate(inputs, attention_mask=attention_mask, context=reused, **options)  # type: ignore[misc]
        if isinstance(result, Tensor):
            return padded_right(result, inputs.shape[1], config.eos_token_id, config.pad_token_id)
        result.sequences = padded_right(result.sequences, inputs.shape[1], config.eos_token_id, config.pad_token_id)
        return result

    def _prepare_generated_length(self, **arguments: Any) -> Any:  # type: ignore[override]
        """No text is longer than there are positions, whatever a pipeline asks for."""
        options = super()._prepare_generated_length(**arguments)  # type: ignore[misc]
        longest = self.config.get_text_config(decoder=True).max_position_embeddings
        options.max_length = min(options.max_length, longest)
        return options


class CaptioningModel(HfvlmPreTrainedModel, GenerationMixin):
    """A vision tower and a text decoder, which continues texts about the pictures.

    A subclass builds `vision_model` and `text_decoder`, whose `generate` takes a context, and may say in `read` what
    the decoder is to look at and in `begin` how a text begins.
    """

    input_modalities = ["image", "text"]
    vision_model: Any
    text_decoder: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.text_decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.text_decoder.set_output_embeddings(value)

    def read(self, pixel_values: Tensor, **kwargs: Any) -> Context:
        """`(B, C, H, W)` -> what the decoder attends to."""
        return Context(self.vision_model(pixel_values, **kwargs).last_hidden_state)

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Texts `(T, N)` with the first token that says that they are to be continued."""
        return input_ids

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """Write about pictures, each of which is read once, however many texts and beams there are about it.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T texts to continue for each picture; by default only the start token. The
                end-of-text token that a tokenizer puts after them is taken off.
            attention_mask: `(B * T, N)`, 0 for padding, which may be on either side.
            context: what `read` returned, instead of pixels.
            interpolate_pos_encoding: take pictures of any size.
            **options: of transformers' `generate`.

        Returns:
            Token ids that begin with the given ones, padded on the left, or what `options` ask for.
        """
        if context is None:
            context = self.read(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if input_ids is not None:
            end = self.config.get_text_config(decoder=True).eos_token_id
            input_ids = self.begin(input_ids, attention_mask)
            whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = whole * (input_ids != end)
        self.text_decoder.generation_config = self.generation_config
        return self.text_decoder.generate(input_ids, context=context, attention_mask=attention_mask, **options)


def padded_left(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The same texts with all their padding before them, where generating needs it, and no more than is needed."""
    order = attention_mask.argsort(dim=1, stable=True)
    mask = attention_mask.gather(1, order)
    used = mask.any(dim=0)
    mask = mask[:, used]
    return input_ids.gather(1, order)[:, used].masked_fill(mask == 0, pad_token_id), mask


def padded_right(ids: Tensor, start: int, end: int | None, pad_token_id: int) -> Tensor:
    """Ids `(B, N)` with padding after the first end token from `start` on; transformers' beams put more end tokens
    there where the padding is 0."""
    if end is None:
        return ids
    ends = ids[:, start:] == end
    over = ends.cumsum(dim=1) > ends.long()
    return torch.cat([ids[:, :start], ids[:, start:].masked_fill(over, pad_token_id)], dim=1)
