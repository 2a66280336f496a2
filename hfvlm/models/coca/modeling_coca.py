"""CoCa (https://arxiv.org/abs/2205.01917; https://github.com/mlfoundations/open_clip at 89fb801).

One text decoder in two halves: the lower half embeds a text alone, and its class token meets the image in the joint
space; the upper half attends to the image and generates. An attentional pooler makes of the image one token to compare
and the others to generate from.
"""

from collections.abc import Collection
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import DepthScaledModel
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.contrastive_captioning import CaptioningTextTower, ContrastiveCaptioner
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import mask_of_one
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.coca.configuration_coca import HfvlmCoCaConfig, HfvlmCoCaTextConfig, HfvlmCoCaVisionConfig
from hfvlm.modules.context import Context
from hfvlm.modules.prefixes import PrefixTree
from hfvlm.modules.projection import Projection, projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import (
    Attention,
    CausalAttention,
    CrossAttention,
    GroundingLayer,
    PreNormLayer,
    Stack,
)


class QueryPool(nn.Module):
    """The paper's attentional pooler: learned queries attend to the sequence, without residual or MLP."""

    def __init__(self, config: HfvlmCoCaVisionConfig):
        super().__init__()
        width = config.projection_dim
        self.queries = nn.Parameter(torch.zeros(config.num_queries, width))
        self.query_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, config.hidden_size, width=width, heads=config.pooler_heads)

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.queries, std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, C) -> (B, queries, D)."""
        queries = self.query_norm(self.queries).expand(x.shape[0], -1, -1)
        return self.attention(queries, context=self.context_norm(x))[0]


class HfvlmCoCaVisionModel(ClassTokenTower, DepthScaledModel):
    """A vision transformer whose tokens, class token included, go through the attentional pooler."""

    config: HfvlmCoCaVisionConfig
    patch_bias = False

    def __init__(self, config: HfvlmCoCaVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.pool = QueryPool(config)
        self.post_norm = nn.LayerNorm(config.projection_dim, eps=config.layer_norm_eps)
        self.projection = Projection(config.projection_dim, config.projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> the pooler's tokens after the last norm, and the first of them, which is
        the pooled output. Texts are generated from the others.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(x), **kwargs)
        x = self.post_norm(self.pool(x))
        return TowerOutput(last_hidden_state=x, pooler_output=x[:, 0], embeds=self.projection(x[:, 0]))


class HfvlmCoCaTextModel(CaptioningTextTower, DepthScaledModel):
    """The text decoder: without a context its lower half embeds, with one the whole of it generates."""

    config: HfvlmCoCaTextConfig
    pools_one_token = True

    def __init__(self, config: HfvlmCoCaTextConfig):
        super().__init__(config)
        lower, heads = config.unimodal_layers, config.multimodal_heads
        upper = range(lower, config.num_hidden_layers)
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.position = nn.Parameter(torch.zeros(config.max_position_embeddings + 1, config.hidden_size))
        self.layers = Stack(PreNormLayer(config, attention=CausalAttention(config, i)) for i in range(lower))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config)
        self.multimodal_layers = nn.ModuleList(
            PreNormLayer(config, attention=CausalAttention(config, i, heads)) for i in upper
        )
        self.grounding_layers = nn.ModuleList(
            GroundingLayer(config, CrossAttention(config, i, heads=heads)) for i in upper
        )
        self.multimodal_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std / 2)
        init.normal_(self.position, std=std / 2)

    def further_keywords(self, method: str) -> Collection[str]:
        return ("visible", *super().further_keywords(method)) if method == "forward" else ()

    def mask(
        self,
        x: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        *,
        visible: Tensor | None = None,
    ) -> Any:
        """Make the masks of the lower half and of the upper half; see `TextDecoder`.

        Args:
            visible: `(B * T, past + N)`, what the lower half attends to; by default made from `input_ids` by the same
                name's method, which is right as long as what is past has no padding's id.
        """
        if visible is None and (cache is None or not cache.get_seq_length()):
            visible = self.visible(input_ids, attention_mask)
        return [
            causal_mask(self.config, x, seen, cache)
            for seen in (attention_mask if visible is None else visible, attention_mask)
        ]

    def decode(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        lower, upper = mask
        return self.decode_upper(self.layers(x, lower, **kwargs), upper, context, **kwargs)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(self.multimodal_norm(x))

    def embed(self, input_ids: Tensor, *, pooled_only: bool = False, **kwargs: Any) -> TowerOutput:
        """Run the lower half: `(B, N)` -> its tokens, before any norm, unless `pooled_only`, and the class token as
        the pooled output."""
        length, visible = input_ids.shape[1], self.visible_to_class(input_ids)
        self.positions(input_ids, None)  # refuses texts that are too long
        if pooled_only and not (self.drops_out() or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            pooled = self.post_norm(self.class_tokens(input_ids, visible, **kwargs))
            return TowerOutput(pooler_output=pooled, embeds=self.projection(pooled))
        x = self.with_class(input_ids, self.position[: length + 1])
        x = self.layers(x, causal_mask(self.config, x, visible), **kwargs)
        pooled = self.post_norm(x[:, -1])
        return TowerOutput(last_hidden_state=x[:, :-1], pooler_output=pooled, embeds=self.projection(pooled))

    def class_tokens(self, input_ids: Tensor, visible: Tensor, **kwargs: Any) -> Tensor:
        """Run the lower half without what the class token does not see, and each token after the same ones once:
        `(B, N)`, `visible_to_class` of it -> `(B, D)`, before any norm."""
        last = torch.arange(1, visible.shape[1] + 1, device=visible.device)[:-1] * visible[:, :-1]
        stop = int(last.amax())
        after = torch.arange(stop, device=visible.device) >= last.amax(dim=1, keepdim=True)
        # The class token, which may see itself, has an id of its own here.
        tokens = input_ids[:, :stop].masked_fill(after, -1)
        tree = PrefixTree(torch.cat([tokens, self.config.vocab_size + visible[:, -1:].long()], dim=1))
        seen = tree.distinct(torch.cat([visible[:, :stop], visible[:, -1:]], dim=1))
        position = torch.cat([self.position[:stop], self.position[input_ids.shape[1]].unsqueeze(0)])
        x = self.with_class(tree.ids[:, :-1].clamp_min(0), position)
        mask, pooled_mask = causal_mask(self.config, x, seen), mask_of_one(self.config, x, seen)
        options = {"pooled_only": True, "pool": tree.pool, "pooled_mask": pooled_mask, "tree": tree}
        return self.layers(tree.gather(x), mask, **kwargs, **options)[tree.texts, 0]

    def with_class(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Embed `(B, N)` tokens and the class token after them, at positions `(N + 1, D)` -> `(B, N + 1, D)`."""
        return torch.cat([self.token(input_ids), self.class_token.expand(input_ids.shape[0], 1, -1)], dim=1) + position

    def decode_upper(self, x: Tensor, mask: Any, context: Any, **kwargs: Any) -> Tensor:
        """Run the upper half over the lower half's tokens `(B * T, N, D)`, before any norm."""
        tokens, context_mask = context.tokens.to(x.dtype), context.mask_for(x, self.config)
        for layer, grounding in zip(self.multimodal_layers, self.grounding_layers, strict=True):
            x = grounding(layer(x, mask, **kwargs), tokens, context_mask, context.kept)
        return x

    # Padding's id is that of a real piece, "!" within a word, and is hidden there too. The original hides the key
    # after each such token, and calls that a mistake which the released weights were trained with.

    def visible_to_class(self, input_ids: Tensor) -> Tensor:
        """Mask the tokens of texts that are embedded: `(B, N)` -> `(B, N + 1)`, the class token last."""
        shift = self.config.mask_shift
        return pad(input_ids != self.config.pad_token_id, (shift, 1 - shift), value=True)

    def visible(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Mask the tokens of texts that are continued, `(B, N)`; the padding that a mask hides is no such token."""
        real = input_ids != self.config.pad_token_id
        if attention_mask is not None:
            real = real | (attention_mask == 0)
        real = pad(real, (self.config.mask_shift, 0), value=True)[:, : real.shape[1]]
        return real if attention_mask is None else real & (attention_mask != 0)

    def step_inputs(self, step: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        return {"visible": self.visible(input_ids, attention_mask)}


class HfvlmCoCaModel(ContrastiveCaptioner):
    """Images and texts in one space, and captions."""

    config: HfvlmCoCaConfig
    base_model_prefix = "coca"
    _no_split_modules = ["PreNormLayer", "GroundingLayer"]
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmCoCaConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def context(self, image: BaseModelOutputWithPooling) -> Context:
        tokens: Any = image.last_hidden_state
        return Context(tokens[:, 1:])

    def caption(self, input_ids: Tensor, text: BaseModelOutputWithPooling, context: Context) -> Tensor:
        """Score from the lower half's tokens, which are the same as with a class token after them."""
        tokens: Any = text.last_hidden_state
        mask = causal_mask(self.text_model.config, tokens, None)
        return self.text_model.logits_of(self.text_model.decode_upper(tokens, mask, context))


class HfvlmCoCaForImageClassification(ImageClassifier):
    """A linear layer on the first token of the attentional pooler, with whose own layers the paper fine-tunes it."""

    config: HfvlmCoCaConfig
    base_model_prefix = "coca"
