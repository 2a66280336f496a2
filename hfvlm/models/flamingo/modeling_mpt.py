"""MPTs that transformers' code does not build, as MPT-1B (https://huggingface.co/mosaicml/mpt-1b-redpajama-200b;
MosaicGPT in github.com/mosaicml/examples v0.0.4)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MptForCausalLM
from transformers.models.mpt.modeling_mpt import MptAttention

from hfvlm.modeling.base import EveryModule
from hfvlm.modeling.language import CausalLanguageModel
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
        """Project (B, N, D) to (B, N, 3 * D), queries, keys and values side by side."""
        return torch.cat([self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)], dim=-1)


class HfvlmFlamingoMPTForCausalLM(CausalLanguageModel, EveryModule, MptForCausalLM):
    """transformers' MPT, with normalised queries and keys where `attn_config.qk_ln` is on, and feed-forward parts of
    any `expansion_ratio`."""

    config: HfvlmFlamingoMPTConfig

    def __init__(self, config: HfvlmFlamingoMPTConfig):
        super().__init__(config)
        blocks: Any = self.transformer.blocks
        attention: Any = config.attn_config
        for i, block in enumerate(blocks):
            if attention.qk_ln:
                block.attn = NormalisedAttention(config, i)
            width = config.expansion_ratio * config.hidden_size
            if block.ffn.up_proj.out_features != width:
                block.ffn.up_proj = nn.Linear(config.hidden_size, width, bias=False)
                block.ffn.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Answer as for transformers' MPT, whose attention is its own; of this file alone it would err."""
        return False
