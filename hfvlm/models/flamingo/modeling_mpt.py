"""MPT-1B (https://huggingface.co/mosaicml/mpt-1b-redpajama-200b; MosaicGPT in github.com/mosaicml/examples v0.0.4)."""

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
    """transformers' MPT, with normalised queries and keys."""

    config: HfvlmFlamingoMPTConfig

    def __init__(self, config: HfvlmFlamingoMPTConfig):
        super().__init__(config)
        blocks: Any = self.transformer.blocks
        for i, block in enumerate(blocks):
            block.attn = NormalisedAttention(config, i)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Answer as for transformers' MPT, whose attention is its own; of this file alone it would err."""
        return False
