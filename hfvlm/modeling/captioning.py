"""Models that caption images with transformers' `generate`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.compat import begin_cache, causal_mask, with_cache
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.language import as_output, next_tokens
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import text_positions, text_starts


@dataclass
class CaptioningOutput(ModelOutput):
    """Scores of texts about images.

    Args:
        loss: scalar, with `labels`.
        logits: `(T, N, V)`, scores of each text's next tokens.
        vision_model_output: the vision tower's whole output.
        text_model_output: the text encoder's, where the decoder attends to a question and its image.
        text_decoder_output: the decoder's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    text_decoder_output: CausalLMOutputWithCrossAttentions | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class RankedAnswers:
    """The likeliest of a list of answers.

    Args:
        indices: `(B, k)`, of candidates, in the order of the probability of their first tokens.
        scores: `(B, k)`, log probabilities of the whole answers.
        best: `(B,)`, the candidate of the highest score.
    """

    indices: Tensor
    scores: Tensor
    best: Tensor


class TextDecoder(Generation, ABC):
    """Base of text decoders, which continue texts that may attend to a context, by transformers' `generate`.

    A subclass embeds tokens in `embed_ids`, runs its layers over them in `decode`, and scores in `logits_of` which
    tokens may come next.
    """

    config: Any
    device: torch.device
    # Whether a text without a context is embedded, by `embed`, instead of being continued.
    embeds_texts_alone: ClassVar[bool] = False

    @abstractmethod
    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed `(B * T, N)` token ids at their positions -> `(B * T, N, D)`."""

    @abstractmethod
    def decode(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        """Run the layers over `(B * T, N, D)`, with the cache among the keywords -> hidden states of that shape."""

    @abstractmethod
    def logits_of(self, x: Tensor) -> Tensor:
        """Turn hidden states `(B * T, N, D)` into scores `(B * T, N, V)` of what comes next."""

    def mask(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Any:
        """Make the mask of `decode`; a subclass may take `further_keywords` of its forward here."""
        return causal_mask(self.config, x, attention_mask, cache)

    def embed(self, input_ids: Tensor, **kwargs: Any) -> TowerOutput:
        """Embed texts `(B, N)` without a context."""
        raise TypeError(f"{type(self).__name__} embeds no texts.")

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # noqa: PLR0913 (transformers reads these names)
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: Context | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[Keywords],
    ) -> TowerOutput | CausalLMOutputWithCrossAttentions:
        """Score the next token after each of `(B * T, N)` token ids.

        Decoders that embed texts alone (CoCa, MaMMUT) return a `TowerOutput` where there is no context.

        Args:
            input_ids: the texts, or what follows the tokens in `cache`.
            attention_mask: `(B * T, past + N)`, 0 for padding on either side.
            context: of B rows, T consecutive texts for each.
            position_ids: `(B * T, N)`; by default counted from each text's first token.
            cache: keys and values of the tokens before `input_ids`.
            labels: `(B * T, N)`, the ids themselves, which are shifted here; the loss leaves out -100.
            shift_labels: `(B * T, N)`, labels that are shifted already.
            use_cache: return keys and values for the next call.
            logits_to_keep: score only the last n tokens, or the tokens at these positions; 0 scores all.

        Raises:
            ValueError: there are labels for a text that is embedded, or more tokens than positions.
        """
        options: dict[str, Any] = dict(kwargs)
        if context is None and self.embeds_texts_alone:
            if labels is not None or shift_labels is not None:
                raise ValueError(f"{type(self).__name__} predicts labels only with a context.")
            return self.embed(input_ids, **options)
        decoder: Any = self
        cache = begin_cache(decoder, cache, use_cache=use_cache)
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask, cache)
        own = {name: options.pop(name) for name in self.further_keywords("forward") if name in options}
        x = self.embed_ids(input_ids, position_ids)
        mask = self.mask(x, input_ids, attention_mask, cache, **own)
        x, count = self.decode(x, mask, context, cache=cache, **options), options.get("num_items_in_batch")
        scores = next_tokens(self, self.logits_of, x, labels, shift_labels, count, logits_to_keep)
        return as_output(scores, **with_cache(cache))

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Count the positions of ids `(B, N)` that follow a cache's from each text's first token."""
        past = 0 if cache is None else cache.get_seq_length()
        longest = self.config.get_text_config(decoder=True).max_position_embeddings
        return text_positions(input_ids, attention_mask, longest, past)

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        *,
        context: Context | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continue texts, which may attend to a context.

        Args:
            inputs: `(B * T, N)` token ids to continue, also as `input_ids`, padded on either side; by default the
                start token alone.
            context: of B rows; decoders that embed texts alone need one.
            attention_mask: `(B * T, N)`, 0 for padding.
            **options: of transformers' `generate`.

        Returns:
            What transformers' `generate` returns; token ids begin with `inputs`, padded on the left.
        """
        config = self.config.get_text_config(decoder=True)
        inputs = options.pop("input_ids", None) if inputs is None else inputs
        if context is not None:
            options["context"] = context if context.kept is not None else context.for_reuse()
        elif self.embeds_texts_alone:
            raise ValueError(f"{type(self).__name__} continues texts only with a context: give `context`.")
        if inputs is None:
            # Offloaded parameters are on no device.
            rows, device = (1, self.device) if context is None else (context.tokens.shape[0], context.tokens.device)
            inputs = torch.full((rows, 1), config.bos_token_id, device=device)
        elif attention_mask is not None:
            inputs, attention_mask = padded_left(inputs, attention_mask, config.pad_token_id)
        result: Any = super().generate(inputs, attention_mask=attention_mask, **options)
        if isinstance(result, Tensor):
            return padded_right(result, inputs.shape[1], config.eos_token_id, config.pad_token_id)
        result.sequences = padded_right(result.sequences, inputs.shape[1], config.eos_token_id, config.pad_token_id)
        return result

    def longest_text(self) -> int:
        """Return the number of positions, whatever length a pipeline sets."""
        return self.config.get_text_config(decoder=True).max_position_embeddings


class CaptioningModel(HfvlmPreTrainedModel, Generation):
    """A vision tower and a text decoder, which continues texts about images.

    A subclass builds `vision_model` and `text_decoder`, whose `generate` takes a context, and may define in `read`
    what the decoder attends to and in `begin` how a text begins.
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
        """Encode images `(B, C, H, W)` -> what the decoder attends to."""
        return Context(self.vision_model(pixel_values, **kwargs).last_hidden_state)

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Replace the first of ids `(T, N)` with the start token of a text that is continued."""
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
        """Caption images, each of which is encoded once, whatever the number of its texts and beams.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            input_ids: `(B * T, N)`, T texts to continue for each image; by default only the start token. The
                end-of-text token that a tokenizer appends is removed.
            attention_mask: `(B * T, N)`, 0 for padding, which may be on either side.
            context: what `read` returned, instead of pixels.
            interpolate_pos_encoding: take images of any size.
            **options: of transformers' `generate`.

        Returns:
            Token ids that begin with the given ones, padded on the left, or what `options` name.
        """
        if context is None:
            context = self.read(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if input_ids is not None:
            end = self.config.get_text_config(decoder=True).eos_token_id
            input_ids = self.begin(input_ids, attention_mask)
            whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = whole * (input_ids != end)
        decoder = self.text_decoder
        decoder.generation_config = self.generation_config
        return decoder.generate(input_ids, context=context, attention_mask=attention_mask, **options)


def padded_left(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Move all padding before the texts, where generation needs it, and drop what no row needs. Without a token for
    padding, it keeps its ids."""
    order = attention_mask.argsort(dim=1, stable=True)
    mask = attention_mask.gather(1, order)
    used = mask.any(dim=0)
    mask, ids = mask[:, used], input_ids.gather(1, order)[:, used]
    return ids if pad_token_id is None else ids.masked_fill(mask == 0, pad_token_id), mask


def padded_right(ids: Tensor, start: int, end: int | None, pad_token_id: int | None) -> Tensor:
    """Pad ids `(B, N)` after the first end token from `start` on, where transformers' beams put more end tokens if the
    padding is 0. Without a token for padding, the end token pads, as in transformers."""
    if end is None:
        return ids
    ends = ids[:, start:] == end
    over = ends.cumsum(dim=1) > ends.long()
    filling = end if pad_token_id is None else pad_token_id
    return torch.cat([ids[:, :start], ids[:, start:].masked_fill(over, filling)], dim=1)


def begin_with(token_id: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Replace each text's first token, after padding on the left, by one that defines the text's use."""
    first = torch.zeros_like(input_ids[:, :1]) if attention_mask is None else text_starts(attention_mask)
    return input_ids.scatter(1, first, token_id)
