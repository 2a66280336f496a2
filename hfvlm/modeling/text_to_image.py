"""Models that draw images of texts: an encoder of texts, a decoder of images' codes, and the codec of these codes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.checks.ranges import check_number
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.captioning import TextDecoder
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.image_codecs import ImageCodec
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import present

# Tokens of a text without words.
EMPTY_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(eq=False)
class GuidedContext(Context):
    """Texts, and after them as many texts to be moved away from (classifier-free guidance, "super-conditioning").

    Args:
        scale: what the difference of the two is multiplied by.
    """

    scale: float = 1.0

    def for_reuse(self) -> "GuidedContext":
        return GuidedContext(self.tokens, self.mask, {}, self.scale)


def guided(text: Context, other: Context, scale: float) -> GuidedContext:
    """Move texts away from others, of which each has a mask."""
    masks: Any = [text.mask, other.mask]
    if text.tokens.shape[1] != other.tokens.shape[1]:
        lengths = f"{text.tokens.shape[1]} and {other.tokens.shape[1]}"
        raise ValueError(f"The texts and those to move away from have {lengths} tokens: pad both to one length.")
    return GuidedContext(torch.cat([text.tokens, other.tokens]), torch.cat(masks), scale=scale)


class CodesOnly(LogitsProcessor):
    """A processor that suppresses ids which are no codes of an image."""

    def __init__(self, num_codes: int):
        self.num_codes = num_codes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(self.num_codes, scores.shape[1], device=scores.device), -torch.inf)


class GivenNoise(LogitsProcessor):
    """A processor, the last, that draws by Gumbel noise which is given, as JAX and, on a CPU, PyTorch draw.

    Args:
        noise: `(steps, B, V)`; of exponential noise, as PyTorch's, its negative logarithm.
    """

    def __init__(self, noise: Tensor):
        self.noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, shape = input_ids.shape[1] - 1, tuple(scores.shape)
        if step >= len(self.noise) or tuple(self.noise.shape[1:]) != shape:
            raise ValueError(
                f"noise is {tuple(self.noise.shape)}, step {step} of {shape} needs (steps, {shape[0]}, {shape[1]})."
            )
        drawn = (scores + self.noise[step].to(scores)).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class CodeDecoder(TextDecoder):
    """Base of decoders of an image's codes, which attend to a text, or away from another.

    A subclass runs its layers and its last norm in `run`. What follows on them, in `logits_of`, is linear.
    """

    @abstractmethod
    def run(self, x: Tensor, mask: Any, context: Context, cache: Any, **kwargs: Any) -> Tensor:
        """Run the layers over `(B * T, N, D)` -> hidden states of that shape."""

    def decode(self, x: Tensor, mask: Any, context: Any, cache: Any = None, **kwargs: Any) -> Tensor:
        """Run the layers. Guidance comes before the output layer, which is linear: what it adds up are logits."""
        if context is None:
            raise ValueError(f"{type(self).__name__} decodes images of texts: give `context`.")
        if not isinstance(context, GuidedContext):
            return self.run(x, mask, context, cache, **kwargs)
        x = x.repeat(2, 1, 1)
        mask = causal_mask(self.config, x, None, cache)  # of codes that are generated none is padding
        text, other = self.run(x, mask, context, cache, **kwargs).chunk(2)
        return other + context.scale * (text - other)

    def longest_text(self) -> int:
        """Return the number of codes and the start token: the last code has no position."""
        return self.config.max_position_embeddings + 1

    def adapted(self, processors: LogitsProcessorList, prompt_length: int) -> LogitsProcessorList:
        """Put what draws by given noise last."""
        return LogitsProcessorList(sorted(processors, key=lambda each: isinstance(each, GivenNoise)))


@dataclass
class TextToImageOutput(ModelOutput):
    """Scores of images' codes.

    Args:
        loss: scalar, with `labels` or with pixels.
        logits: `(B, N, V)`, of each next code.
        labels: `(B, N)`, the codes that the loss is of.
        text_model_output: the text encoder's whole output.
        decoder_output: the decoder's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    text_model_output: TowerOutput | None = None
    decoder_output: CausalLMOutputWithCrossAttentions | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class TextToImageModel(HfvlmPreTrainedModel, Generation):
    """Base of models that draw images of texts.

    A subclass builds `text_model`, `image_decoder` and, unless it is None, `codec`. Its configuration has a
    `text_config`, a `decoder_config` and a `guidance_scale`.
    """

    config: Any
    main_input_name = "input_ids"
    input_modalities = ["text"]
    text_model: Any
    image_decoder: Any
    codec: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """Return None: the table of texts has no output, that of codes is the decoder's."""

    def needed_codec(self) -> ImageCodec:
        """Return the codec.

        Raises:
            ValueError: there is none.
        """
        if self.codec is None:
            raise ValueError(
                "This model has no VQGAN (codec_config is None), so it knows images by their codes alone: convert it "
                "with one (--part codec=FILE), or decode what `generate` returns with a VQGAN of your own."
            )
        return self.codec

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> TextToImageOutput:
        """Score each next code of the images of texts and, with `labels` or pixels, compute the loss: the mean
        cross-entropy over all classes, of which some are no codes.

        Args:
            input_ids: `(B, N)`, the texts.
            attention_mask: `(B, N)`, 0 for padding on the right; by default wherever the padding token is.
            pixel_values: `(B, 3, H, W)` in 0..1, whose codes are the labels.
            labels: `(B, M)`, the images' codes, row by row; -100 is left out.
            decoder_input_ids: `(B, M)`, the start token and the codes before each; by default from the labels, or the
                start token alone.
            return_loss: changes nothing.
        """
        if labels is None and pixel_values is not None:
            codes: Any = self.needed_codec().encode(pixel_values).codes
            labels = codes.flatten(1)
        if decoder_input_ids is None:
            decoder_input_ids = self.shifted(labels, input_ids)
        attention_mask = self.mask_of(input_ids, attention_mask)
        text = self.text_model(input_ids, attention_mask, **kwargs)
        context = Context(text.last_hidden_state, attention_mask)
        decoder = self.image_decoder(
            decoder_input_ids, context=context, shift_labels=labels, use_cache=False, **kwargs
        )
        return TextToImageOutput(
            loss=decoder.loss, logits=decoder.logits, labels=labels, text_model_output=text, decoder_output=decoder
        )

    def shifted(self, labels: Tensor | None, input_ids: Tensor) -> Tensor:
        """Make the decoder's inputs: the start token, and all labels but the last."""
        start = input_ids.new_full((len(input_ids), 1), self.config.decoder_config.bos_token_id)
        return start if labels is None else torch.cat([start, labels[:, :-1].clamp_min(0)], dim=1)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Encode texts `(B, N)` -> what the decoder attends to."""
        attention_mask = self.mask_of(input_ids, attention_mask)
        return Context(self.text_model(input_ids, attention_mask).last_hidden_state, attention_mask)

    def mask_of(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the mask, or 0 wherever the padding token is; without such a token a text has no padding."""
        if attention_mask is not None:
            return attention_mask
        return present(input_ids, self.config.text_config.pad_token_id).long()

    def empty_texts(self, like: Tensor) -> Tensor:
        """Make the ids of the empty text, `(B, N)`.

        Raises:
            ValueError: it needs a token that the configuration does not name.
        """
        text = self.config.text_config
        tokens = [getattr(text, name) for name in EMPTY_TEXT]
        if missing := [name for name, token in zip(EMPTY_TEXT, tokens, strict=True) if token is None]:
            raise ValueError(
                f"The empty text, which images are moved away from, has start, end and padding: text_config has no "
                f"{' and no '.join(missing)}. Set it, give negative_prompt_ids, or guidance_scale=1."
            )
        start, end, pad = tokens
        ids = torch.full_like(like, pad)
        ids[:, 0] = start
        ids[:, 1:2] = end
        return ids

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        *,
        guidance_scale: float | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        logits_processor: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """Draw the codes of images of texts.

        Args:
            input_ids: `(B, N)`, the texts.
            attention_mask: `(B, N)`, 0 for padding on the right.
            guidance_scale: logits are `other + scale * (text - other)`; 1 reads the texts alone. By default the
                generation configuration's, or the configuration's.
            negative_prompt_ids: `(B, N)`, the other texts; by default the empty one.
            negative_prompt_attention_mask: theirs.
            noise: `(steps, B, V)`, Gumbel noise to draw by.
            logits_processor: of transformers, which see guided logits.
            **options: of transformers' `generate`: `top_k=50`, `temperature=1.0`, `num_return_sequences=4`, ...

        Returns:
            `(B, 1 + M)` ids, the start token first, or what `options` name. With a VQGAN, all others are its codes.

        Raises:
            ValueError: beams are to be guided, or the noise is of another shape.
        """
        settings = options.get("generation_config") or self.generation_config
        scale = next(s for s in (guidance_scale, settings.guidance_scale, self.config.guidance_scale) if s is not None)
        context = self.read(input_ids, attention_mask)
        if check_number("guidance_scale", scale, 0) != 1:
            if (options.get("num_beams") or settings.num_beams or 1) > 1:
                raise ValueError("Beams cannot be guided: give guidance_scale=1, or num_beams=1.")
            ids = self.empty_texts(input_ids) if negative_prompt_ids is None else negative_prompt_ids
            context = guided(context, self.read(ids, negative_prompt_attention_mask), float(scale))
        processors = [*logits_processor]
        if self.codec is not None:
            processors.append(CodesOnly(self.codec.config.num_codes))
        if noise is not None:
            processors.append(GivenNoise(noise))
        if not {"max_length", "max_new_tokens", "generation_config"} & set(options):
            options["max_new_tokens"] = self.config.decoder_config.max_position_embeddings
        decoder, start = self.image_decoder, self.shifted(None, input_ids)
        if self.generation_config.do_sample is None:  # as the original, unless a file or a call says otherwise
            self.generation_config.do_sample = True
        if "generation_config" not in options:
            options = {name: getattr(decoder.config, name) for name in ("eos_token_id", "pad_token_id")} | options
        decoder.generation_config = self.generation_config
        return decoder.generate(
            start,
            context=context,
            attention_mask=torch.ones_like(start),
            logits_processor=LogitsProcessorList(processors),
            guidance_scale=1.0,  # the decoder's context has it
            **options,
        )

    @torch.no_grad()
    def draw(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Draw images of texts `(B, N)`, with the options of `generate` -> `(B, 3, H, W)` in 0..1.

        Raises:
            ValueError: the model has no VQGAN.
        """
        codec = self.needed_codec()
        return codec.decode(self.generate(input_ids, attention_mask, **options)[:, 1:]).clamp(0, 1)
