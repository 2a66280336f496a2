"""DALL-E mini and mega: BART with NormFormer's norms and gated linear units, from texts to an image's codes.

Source: https://github.com/borisdayma/dalle-mini at f0be4de (src/dalle_mini/model/modeling.py), all of whose variants
that run are here, and https://github.com/kuprel/min-dalle at 73621fb. Dropout is of each number; the original's
attention drops the same ones in all rows and heads. With its variants, the VQGAN and OpenAI's dVAE the architecture is
longer than others: it is three networks, each of which is used by itself, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.checks.ranges import check_number
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.captioning import TextDecoder
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.models.dalle_mini.configuration_dalle_mini import (
    HfvlmDALLEMiniConfig,
    HfvlmDALLEMiniDecoderConfig,
    HfvlmDALLEMiniTextConfig,
)
from hfvlm.models.dalle_mini.modeling_dalle_mini_vqgan import HfvlmDALLEMiniVQGANModel
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import text_positions
from hfvlm.modules.transformer import Attention, CausalAttention, CrossAttention, MultiHead, Stack

# Of the residual stream, where norms are Swin-V2's: after every sixth layer but the last.
STREAM_NORM_EVERY = 6


class SmeLU(nn.Module):
    """A quadratic between the identity and a constant, from 1 to -1 (https://arxiv.org/abs/2202.06499): the constant
    is a quarter in the original, which puts 0 into the quadratic, and not 0."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x <= -1, 0.0, x)
        return torch.where(x >= 1, x, (x + 1).square() / 4)


def norm(config: HfvlmDALLEMiniTextConfig, size: int, *where: str) -> nn.Module:
    """Make a norm, if `config.norms` is one of `where` or nothing is named."""
    if where and config.norms not in where:
        return nn.Identity()
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.layer_norm_eps)


class RelativePositions(nn.Module):
    """A learned bias of each head for each pair of a query's and a key's position."""

    def __init__(self, queries: int, keys: int, heads: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(queries, keys, heads))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.bias, std=std)

    def forward(self, mask: Tensor | None, positions: Tensor, keys: int, *, causal: bool) -> Tensor:
        """Add the bias of queries at `positions` `(N,)` to a mask -> `(B or 1, heads, N, keys)`."""
        bias = self.bias[positions, :keys].permute(2, 0, 1).unsqueeze(0)
        if mask is None and causal:
            mask = positions.unsqueeze(-1) >= torch.arange(keys, device=positions.device)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return mask + bias


class VariantHeads(MultiHead):
    """Heads with what the configuration adds to them."""

    gained = True

    def __init__(self, config: Any, layer_idx: int, queries: int, keys: int):
        MultiHead.__init__(self, config, bias=config.bias)
        self.layer_idx = layer_idx
        heads = config.num_attention_heads
        self.head_scale = nn.Parameter(torch.ones(heads)) if config.head_scale else None
        self.relative = RelativePositions(queries, keys, heads) if config.relative_positions else None
        self.mid_norm = norm(config, config.hidden_size, *(["subln"] if self.gained else ["never"]))

    def init_own_weights(self, std: float) -> None:
        if self.head_scale is not None:
            init.ones_(self.head_scale)
        # Sub-LN's gain leaves cross-attention out, DeepNet's does not.
        gain = self.config.init_gain if self.gained or self.config.residual_scale != 1 else 1.0
        for projection in (self.v_proj, self.out_proj):
            init.normal_(projection.weight, std=std * gain)

    def mix(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do as `MultiHead.mix`; `positions` `(N,)` are those of the queries."""
        if (temperature := self.config.cosine_temperature) is not None:
            query, key = (x / (x.norm(dim=-1, keepdim=True) + 1e-8) for x in (query, key))
            query = query * (self.head_dim**0.5 / temperature)
        if self.relative is not None and positions is not None:
            # Rows that share a context lie side by side.
            positions = positions.repeat(query.shape[2] // len(positions))
            mask = self.relative(mask, positions, key.shape[2], causal=self.is_causal)
        return self.weigh(query, key, value, mask, **kwargs)

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().mix(query, key, value, mask, **kwargs)

    def join(self, x: Tensor) -> Tensor:
        if self.head_scale is not None:
            x = (x.unflatten(-1, (-1, self.head_dim)) * self.head_scale.unsqueeze(-1)).flatten(-2)
        return super().join(self.mid_norm(x))


class TextHeads(VariantHeads, Attention):
    """Attention of a text to itself."""


class SinkhornHeads(TextHeads):
    """Attention whose weights are normalised over keys and queries in turns (https://arxiv.org/abs/2110.11773)."""

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scores = query @ key.mT * self.head_dim**-0.5
        lowest = torch.finfo(scores.dtype).min
        hidden = None if mask is None else ~mask if mask.dtype == torch.bool else mask <= lowest / 2
        if mask is not None:
            scores = scores if mask.dtype == torch.bool else scores + mask
            scores = scores.masked_fill(hidden, lowest)
        for i in range(self.config.sinkhorn_iterations):
            scores = scores - scores.logsumexp(dim=-2 if i % 2 else -1, keepdim=True)
            scores = scores if hidden is None else scores.masked_fill(hidden, lowest)
        weights = nn.functional.dropout(scores.exp(), self.config.attention_dropout, training=self.training)
        return self.join((weights @ value).transpose(1, 2).flatten(2)), weights


class CodeHeads(VariantHeads, CausalAttention):
    """Attention of an image's codes to those before them."""


class ContextHeads(VariantHeads, CrossAttention):
    """Attention of an image's codes to its text."""

    gained = False


class FeedForward(nn.Module):
    """Norm, widen, activate and gate, norm, narrow, norm: as many norms as the configuration says."""

    def __init__(self, config: HfvlmDALLEMiniTextConfig):
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gain = config.init_gain
        self.norm = norm(config, size, "normformer", "cogview", "preln", "subln")
        self.fc1 = nn.Linear(size, wide, bias=config.bias)
        self.gate = nn.Linear(size, wide, bias=config.bias) if config.gated else None
        self.act = SmeLU() if config.activation == "smelu" else ACT2FN[config.activation]
        self.mid_norm = norm(config, wide, "normformer", "subln")
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(wide, size, bias=config.bias)
        self.out_norm = norm(config, size, "swinv2", "cogview")

    def init_own_weights(self, std: float) -> None:
        for layer in (self.fc1, self.gate, self.fc2):
            if layer is not None:
                init.normal_(layer.weight, std=std * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        wide = self.act(self.fc1(x))
        wide = wide if self.gate is None else wide * self.gate(x)
        return self.out_norm(self.fc2(self.dropout(self.mid_norm(wide))))


class TextLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with its norms, on a residual stream."""

    norms_before: tuple[str, ...] = ("normformer", "cogview", "preln", "subln")

    def __init__(self, config: HfvlmDALLEMiniTextConfig, layer_idx: int, attention: VariantHeads):
        super().__init__()
        size = config.hidden_size
        self.scale = config.residual_scale
        self.attention_norm = norm(config, size, *self.norms_before)
        self.attention = attention
        self.attention_out_norm = norm(config, size, "normformer", "cogview", "swinv2")
        self.mlp = FeedForward(config)
        normed = (layer_idx + 1) % STREAM_NORM_EVERY == 0 and layer_idx + 1 != config.num_hidden_layers
        self.stream_norm = norm(config, size, "swinv2" if normed else "never")
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        """(B, N, D), (B, 1, N, M) or None -> (B, N, D)."""
        attended = self.attention(self.attention_norm(x), mask, **kwargs)[0]
        return self.fed(self.added(x, self.attention_out_norm(attended)))

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.scale * x + self.dropout(branch)

    def fed(self, x: Tensor) -> Tensor:
        return self.stream_norm(self.added(x, self.mlp(x)))


class CodeLayer(TextLayer):
    """The same, with attention to a context before the MLP."""

    norms_before = ("normformer", "cogview", "preln")

    def __init__(self, config: HfvlmDALLEMiniDecoderConfig, layer_idx: int):
        codes = config.max_position_embeddings
        super().__init__(config, layer_idx, CodeHeads(config, layer_idx, codes, codes))
        self.context_norm = norm(config, config.hidden_size, *self.norms_before)
        self.cross_attention = ContextHeads(config, layer_idx, codes, config.context_length)
        self.context_out_norm = norm(config, config.hidden_size, "normformer", "cogview", "swinv2")

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Any,
        context: Tensor,
        context_mask: Any,
        kept: dict[int, tuple[Tensor, Tensor]] | None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B * T, N, D), its mask, (B, M, D), its mask -> (B * T, N, D)."""
        attended = self.attention(self.attention_norm(x), mask, positions=positions, **kwargs)[0]
        x = self.added(x, self.attention_out_norm(attended))
        read = self.cross_attention(self.context_norm(x), context, context_mask, kept, positions=positions)[0]
        return self.fed(self.added(x, self.context_out_norm(read)))


class CodeEmbedding(nn.Module):
    """(B, N) -> (B, N, D): token plus, where there is one, learned position; then a norm."""

    def __init__(self, config: HfvlmDALLEMiniTextConfig):
        super().__init__()
        size = config.hidden_size
        self.scale = size**0.5 if config.scale_embedding else 1.0
        self.token = nn.Embedding(config.vocab_size, size)
        self.position = (
            nn.Parameter(torch.zeros(config.max_position_embeddings, size)) if config.absolute_positions else None
        )
        self.norm = norm(config, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def init_own_weights(self, std: float) -> None:
        if self.position is not None:
            init.normal_(self.position, std=std)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.token(input_ids) * self.scale
        x = x if self.position is None else x + self.position[position_ids]
        return self.dropout(self.norm(x))


class HfvlmDALLEMiniPreTrainedModel(HfvlmPreTrainedModel):
    """Base of the parts and of their composition."""

    config: Any
    _input_embed_layer = "token"
    _no_split_modules = ["TextLayer", "CodeLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|image_decoder|codec)\."]

    def __init__(self, config: Any):
        if getattr(config, "relative_positions", False):  # which these implementations cannot add
            self._supports_flash_attn = self._supports_flex_attn = False
        super().__init__(config)


class HfvlmDALLEMiniTextModel(HfvlmDALLEMiniPreTrainedModel):
    """The encoder of texts."""

    config: HfvlmDALLEMiniTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _can_record_outputs = {
        "hidden_states": TextLayer,
        "attentions": OutputRecorder(TextHeads, index=1, layer_name=".attention"),
    }

    def __init__(self, config: HfvlmDALLEMiniTextConfig):
        super().__init__(config)
        length, kind = config.max_position_embeddings, TextHeads if config.sinkhorn_iterations == 1 else SinkhornHeads
        self.embeddings = CodeEmbedding(config)
        self.layers = Stack(
            TextLayer(config, i, kind(config, i, length, length)) for i in range(config.num_hidden_layers)
        )
        self.final_norm = norm(config, config.hidden_size) if config.final_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """Encode `(B, N)` token ids, 0 in `attention_mask` for padding on the right -> all tokens."""
        if attention_mask is None:
            pad: Any = self.config.pad_token_id
            attention_mask = (input_ids != pad).long()
        positions = text_positions(input_ids, None, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        options: dict[str, Any] = dict(kwargs)
        x = self.layers(x, mask, positions=positions[0], **options)
        return TowerOutput(last_hidden_state=self.final_norm(x))


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


class HfvlmDALLEMiniDecoder(TextDecoder, HfvlmDALLEMiniPreTrainedModel):
    """The decoder of an image's codes, which attends to a text."""

    config: HfvlmDALLEMiniDecoderConfig
    base_model_prefix = "image_decoder"
    input_modalities = ["text"]
    _can_record_outputs = {
        "hidden_states": CodeLayer,
        "attentions": OutputRecorder(CodeHeads, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(ContextHeads, index=1, layer_name=".cross_attention"),
    }

    def __init__(self, config: HfvlmDALLEMiniDecoderConfig):
        super().__init__(config)
        self.embeddings = CodeEmbedding(config)
        self.layers = Stack(CodeLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids, position_ids)

    def decode(self, x: Tensor, mask: Any, context: Any, cache: Any = None, **kwargs: Any) -> Tensor:
        """Run the layers. Guidance comes before the output layer, which is linear: what it adds up are logits."""
        if context is None:
            raise ValueError(f"{type(self).__name__} decodes images of texts: give `context`.")
        positions, guided = None, isinstance(context, GuidedContext)
        if self.config.relative_positions:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(x.shape[1], device=x.device) + past
        if guided:  # of codes that are generated none is padding
            x = x.repeat(2, 1, 1)
            mask = causal_mask(self.config, x, None, cache)
        tokens, context_mask = context.tokens.to(x.dtype), context.mask_for(x, self.config)
        for layer in self.layers:
            x = layer(x, mask, tokens, context_mask, context.kept, positions, cache=cache, **kwargs)
        x = self.final_norm(x)
        if guided:
            text, other = x.chunk(2)
            x = other + context.scale * (text - other)
        return x

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

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


class HfvlmDALLEMiniForConditionalGeneration(HfvlmDALLEMiniPreTrainedModel, Generation):
    """Draws images of texts. The VQGAN of the codes, if there is one, is not trained."""

    config: HfvlmDALLEMiniConfig
    base_model_prefix = "dalle_mini"
    main_input_name = "input_ids"
    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected: Any = None
    lora_recipe = "text+image_decoder"

    def __init__(self, config: HfvlmDALLEMiniConfig):
        super().__init__(config)
        self.text_model = HfvlmDALLEMiniTextModel._from_config(config.text_config)
        self.image_decoder = HfvlmDALLEMiniDecoder._from_config(config.decoder_config)
        self.codec: Any = None
        if config.codec_config is not None:
            self.codec = HfvlmDALLEMiniVQGANModel._from_config(config.codec_config)
            self.codec.requires_grad_(requires_grad=False)
            self.frozen_modules = ("codec",)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """Return None: the table of texts has no output, that of codes is the decoder's."""

    def needed_codec(self) -> HfvlmDALLEMiniVQGANModel:
        """Return the VQGAN.

        Raises:
            ValueError: there is none.
        """
        if self.codec is None:
            raise ValueError(
                "This model has no VQGAN (codec_config is None), so it knows images by their codes alone: convert it "
                "with one (--codec), or decode what `generate` returns with a VQGAN of your own."
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
        text = self.text_model(input_ids, attention_mask, **kwargs)
        context = Context(text.last_hidden_state, self.text_mask(input_ids, attention_mask))
        decoder = self.image_decoder(
            decoder_input_ids, context=context, shift_labels=labels, use_cache=False, **kwargs
        )
        return TextToImageOutput(
            loss=decoder.loss, logits=decoder.logits, labels=labels, text_model_output=text, decoder_output=decoder
        )

    def text_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None:
            return attention_mask
        pad: Any = self.config.text_config.pad_token_id
        return (input_ids != pad).long()

    def shifted(self, labels: Tensor | None, input_ids: Tensor) -> Tensor:
        """Make the decoder's inputs: the start token, and all labels but the last."""
        start = input_ids.new_full((len(input_ids), 1), self.config.decoder_config.bos_token_id or 0)
        return start if labels is None else torch.cat([start, labels[:, :-1].clamp_min(0)], dim=1)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Encode texts `(B, N)` -> what the decoder attends to."""
        states = self.text_model(input_ids, attention_mask).last_hidden_state
        return Context(states, self.text_mask(input_ids, attention_mask))

    def empty_texts(self, like: Tensor) -> Tensor:
        """Make the ids of the empty text, `(B, N)`."""
        text: Any = self.config.text_config
        ids = torch.full_like(like, text.pad_token_id)
        ids[:, 0] = text.bos_token_id
        ids[:, 1:2] = text.eos_token_id
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
