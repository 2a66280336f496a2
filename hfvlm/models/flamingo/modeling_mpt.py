"""MPT-1B (https://huggingface.co/mosaicml/mpt-1b-redpajama-200b; MosaicGPT in github.com/mosaicml/examples v0.0.4)."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import MptForCausalLM
from transformers.cache_utils import Cache
from transformers.models.mpt.modeling_mpt import MptAttention

from hfvlm.modeling.base import EveryModule
from hfvlm.modeling.compat import with_cache
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.flamingo.configuration_flamingo import HfvlmFlamingoMPTConfig


class NormalisedAttention(MptAttention):
    """MPT's attention, but queries and keys are normalised over their whole width before they are cut into heads."""

    def __init__(self, config: HfvlmFlamingoMPTConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.Wqkv
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.LayerNorm(width, eps=eps, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=eps, bias=False)

    def Wqkv(self, x: Tensor) -> Tensor:  # type: ignore[override]  # noqa: N802 (MPT's attention calls it so)
        """(B, N, D) -> (B, N, 3 * D), queries, keys and values side by side."""
        return torch.cat([self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)], dim=-1)


class HfvlmFlamingoMPTForCausalLM(Generation, EveryModule, MptForCausalLM):
    """transformers' MPT, with normalised queries and keys."""

    config: HfvlmFlamingoMPTConfig

    def __init__(self, config: HfvlmFlamingoMPTConfig):
        super().__init__(config)
        blocks: Any = self.transformer.blocks
        for i, block in enumerate(blocks):
            block.attn = NormalisedAttention(config, i)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 (transformers' signature)
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> Any:
        """Score the next token after each of `(B, N)` token ids; see `MptForCausalLM`.

        Args:
            labels: `(B, N)`, the ids themselves; the loss leaves out -100.
            shift_labels: `(B, N)`, labels that are shifted already, in place of `labels`.
        """
        labels = shift_labels if labels is None else labels
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **with_cache(cache)}
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache}
        if shift_labels is not None:
            inputs["shift_labels"] = shift_labels
        return super().forward(**inputs, logits_to_keep=logits_to_keep, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As transformers finds of MPT, whose attention is its own; of this file alone it could not tell."""
        return False
