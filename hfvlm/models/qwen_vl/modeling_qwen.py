"""Qwen-7B, the language model of Qwen-VL: as Qwen2, but for texts longer than those it was trained on.

Parameters have the names of transformers' Qwen2. Source: the code released with Qwen/Qwen-VL-Chat.
"""

from collections.abc import Callable, Collection
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.compat import begin_cache, causal_mask, with_cache
from hfvlm.modeling.keywords import SERVER_KEYWORDS, SERVERS, Keywords
from hfvlm.modeling.language import CausalLanguageModel
from hfvlm.models.qwen_vl.configuration_qwen_vl import HfvlmQwenVLTextConfig
from hfvlm.modules.transformer import eager_attention_forward


class QwenAttention(nn.Module):
    """Causal attention with rotary positions, whose queries may be scaled by their position."""

    is_causal = True

    def __init__(self, config: HfvlmQwenVLTextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width, bias=config.linear_bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        turn: Callable[[Tensor], Tensor],
        query_scale: Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, D) -> (B, N, D) and, where the implementation has them, weights."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = turn(query), turn(key)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5, dropout=dropout, **kwargs)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), weights


class QwenLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), for attention and MLP."""

    def __init__(self, config: HfvlmQwenVLTextConfig, layer_idx: int):
        super().__init__()
        self.depth = config.num_hidden_layers
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = QwenAttention(config, layer_idx)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LlamaMLP(config)

    def init_own_weights(self, std: float) -> None:
        for projection in (self.self_attn.o_proj, self.mlp.down_proj):
            init.normal_(projection.weight, std=std / (2 * self.depth) ** 0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class HfvlmQwenVLTextPreTrainedModel(HfvlmPreTrainedModel):
    """Base of the language model with its output layer and without."""

    config: HfvlmQwenVLTextConfig
    _no_split_modules = ["QwenLayer"]
    _can_record_outputs = {"hidden_states": QwenLayer, "attentions": QwenAttention}
    _input_embed_layer = "embed_tokens"
    input_modalities = ["text"]


class HfvlmQwenVLTextModel(HfvlmQwenVLTextPreTrainedModel):
    """Qwen-7B without its output layer."""

    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: HfvlmQwenVLTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(QwenLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def further_keywords(self, method: str) -> Collection[str]:
        return SERVER_KEYWORDS if method == "forward" else ()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 (transformers' signature)
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutputWithPast:
        """Run `(B, N)` token ids, or `(B, N, D)` embeddings, through all layers and the last norm.

        `position_ids` are ignored: as trained, a position is the column of the row, padding included. Up to
        `config.trained_length` tokens padding changes nothing but the numbers of the padding itself. A server, which
        has texts end to end in one row and an attention of its own, has to give them.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = begin_cache(self, cache, use_cache=use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        mask = causal_mask(self.config, x, attention_mask, cache)
        served = self.config._attn_implementation in SERVERS
        positions = past + torch.arange(x.shape[1], device=x.device)
        if served:
            positions = position_ids.flatten()  # type: ignore[union-attr]
        turn = rotation(self.config, positions, 1 if served else self.stretch(x.shape[1], past, cache))
        query_scale = self.query_scale(positions)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask, turn=turn, query_scale=query_scale, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **with_cache(cache))

    def stretch(self, length: int, past: Any, cache: Cache | None) -> int:
        """Return how far the rotary frequencies are lowered, which the length of the prompt decides."""
        if cache is None:
            return self.stretch_of(length)
        # A static cache counts in a tensor; steps need not wait for it.
        if (length > 1 or isinstance(past, int)) and bool(past == 0):
            cache.stretch = self.stretch_of(length)  # type: ignore[attr-defined]
        return getattr(cache, "stretch", 1)

    def stretch_of(self, length: int) -> int:
        """Return 1 for a prompt of the trained length, 3 for one up to twice as long, 7 for four times."""
        stretch, reach = 1, self.config.trained_length if self.config.dynamic_ntk else length
        while length > reach and not self.training:
            stretch, reach = 2 * stretch + 1, 2 * reach
        return stretch

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """Return factors (N, 1) of queries at positions (N,) beyond the trained length, to keep attention sharp."""
        if self.training or not self.config.logn_attention:
            return None
        lengths = (positions + 1).float() / self.config.trained_length
        growth = torch.log(torch.tensor(float(self.config.trained_length), device=positions.device))
        return (1 + lengths.clamp_min(1).log() / growth).unsqueeze(-1)


def rotation(config: HfvlmQwenVLTextConfig, positions: Tensor, stretch: int) -> Callable[[Tensor], Tensor]:
    """Make the rotary position embedding, in float32, of heads `(B, heads, N, head_dim)` at `positions` `(N,)`."""
    size = config.rotary_size
    base = config.rope_theta * stretch ** (size / (size - 2))
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        turned, rest = x[..., :size].float(), x[..., size:]
        left, right = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat([-right, left], dim=-1) * sine
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    return turn


class HfvlmQwenVLForCausalLM(CausalLanguageModel, HfvlmQwenVLTextPreTrainedModel):
    """Qwen-7B."""

    base_model_prefix = "language_model"
    _keys_to_ignore_on_load_unexpected = other_towers("language_model")

    def __init__(self, config: HfvlmQwenVLTextConfig):
        super().__init__(config)
        self.model = HfvlmQwenVLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The model without its output layer."""
        return self.model

    def further_keywords(self, method: str) -> Collection[str]:
        return ("position_ids",) if method == "forward" else ()
