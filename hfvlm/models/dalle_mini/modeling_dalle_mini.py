"""DALL-E mini and mega: BART with NormFormer's norms and gated linear units, from texts to an image's codes.

Source: https://github.com/borisdayma/dalle-mini at f0be4de (src/dalle_mini/model/modeling.py), all of whose variants
that run are here, and https://github.com/kuprel/min-dalle at 73621fb.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text_to_image import CodeDecoder, TextToImageModel
from hfvlm.models.dalle_mini.configuration_dalle_mini import (
    HfvlmDALLEMiniConfig,
    HfvlmDALLEMiniDecoderConfig,
    HfvlmDALLEMiniTextConfig,
)
from hfvlm.models.dalle_mini.modeling_dalle_mini_vqgan import HfvlmDALLEMiniVQGANModel
from hfvlm.modules.context import Context
from hfvlm.modules.embeddings import present, text_positions
from hfvlm.modules.normformer import (
    CausalHeads,
    ContextHeads,
    SelfHeads,
    SinkhornHeads,
    VariantContextLayer,
    VariantEmbedding,
    VariantLayer,
    norm,
)
from hfvlm.modules.transformer import Stack


class HfvlmDALLEMiniPreTrainedModel(HfvlmPreTrainedModel):
    """Base of the parts and of their composition."""

    config: Any
    _input_embed_layer = "token"
    _no_split_modules = ["VariantLayer", "VariantContextLayer"]
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
        "hidden_states": VariantLayer,
        "attentions": OutputRecorder(SelfHeads, index=1, layer_name=".attention"),
    }

    def __init__(self, config: HfvlmDALLEMiniTextConfig):
        super().__init__(config)
        length, kind = config.max_position_embeddings, SelfHeads if config.sinkhorn_iterations == 1 else SinkhornHeads
        self.embeddings = VariantEmbedding(config)
        self.layers = Stack(
            VariantLayer(config, i, kind(config, i, length, length)) for i in range(config.num_hidden_layers)
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
            attention_mask = present(input_ids, self.config.pad_token_id).long()
        positions = text_positions(input_ids, None, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        options: dict[str, Any] = dict(kwargs)
        x = self.layers(x, mask, positions=positions[0], **options)
        return TowerOutput(last_hidden_state=self.final_norm(x))


class HfvlmDALLEMiniDecoder(CodeDecoder, HfvlmDALLEMiniPreTrainedModel):
    """The decoder of an image's codes, which attends to a text."""

    config: HfvlmDALLEMiniDecoderConfig
    base_model_prefix = "image_decoder"
    input_modalities = ["text"]
    _can_record_outputs = {
        "hidden_states": VariantContextLayer,
        "attentions": OutputRecorder(CausalHeads, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(ContextHeads, index=1, layer_name=".cross_attention"),
    }

    def __init__(self, config: HfvlmDALLEMiniDecoderConfig):
        super().__init__(config)
        self.embeddings = VariantEmbedding(config)
        self.layers = Stack(VariantContextLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids, position_ids)

    def run(self, x: Tensor, mask: Any, context: Context, cache: Any, **kwargs: Any) -> Tensor:
        positions = None
        if self.config.relative_positions:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(x.shape[1], device=x.device) + past
        tokens, context_mask = context.tokens.to(x.dtype), context.mask_for(x, self.config)
        for layer in self.layers:
            x = layer(x, mask, tokens, context_mask, context.kept, positions, cache=cache, **kwargs)
        return self.final_norm(x)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class HfvlmDALLEMiniForConditionalGeneration(HfvlmDALLEMiniPreTrainedModel, TextToImageModel):
    """Draws images of texts. The VQGAN of the codes, if there is one, is not trained."""

    config: HfvlmDALLEMiniConfig
    base_model_prefix = "dalle_mini"
    _keys_to_ignore_on_load_unexpected: Any = None
    lora_recipe = "text+image_decoder"

    def __init__(self, config: HfvlmDALLEMiniConfig):
        super().__init__(config)
        self.text_model = HfvlmDALLEMiniTextModel._from_config(config.text_config)
        self.image_decoder = HfvlmDALLEMiniDecoder._from_config(config.decoder_config)
        self.codec = None
        if config.codec_config is not None:
            self.codec = HfvlmDALLEMiniVQGANModel._from_config(config.codec_config)
            self.codec.requires_grad_(requires_grad=False)
            self.frozen_modules = ("codec",)
        self.post_init()
