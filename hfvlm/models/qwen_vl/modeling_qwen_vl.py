"""Qwen-VL (https://arxiv.org/abs/2308.12966; the code released with Qwen/Qwen-VL-Chat, as of its last revision)."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.scoring import TextScorer
from hfvlm.modeling.vision import PatchClassifier, PatchTower
from hfvlm.models.qwen_vl.configuration_qwen_vl import (
    HfvlmQwenVLConfig,
    HfvlmQwenVLResamplerConfig,
    HfvlmQwenVLVisionConfig,
)
from hfvlm.models.qwen_vl.modeling_qwen import HfvlmQwenVLForCausalLM
from hfvlm.modules.positions import BICUBIC_SAMPLED, resize_grid, sine_grid
from hfvlm.modules.projection import Bridge
from hfvlm.modules.transformer import MultiHead, PreNormLayer, Stack

Size = tuple[int, int]


class HfvlmQwenVLVisionModel(PatchTower):
    """A vision transformer without a last norm."""

    config: HfvlmQwenVLVisionConfig
    patch_bias = False
    resize_rule = BICUBIC_SAMPLED
    # That of the 224 pixels ViT-bigG was trained at, whatever the image size.
    position_grid = (16, 16)

    def __init__(self, config: HfvlmQwenVLVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutput:
        """Encode `(B, 3, H, W)` normalised pixels, of any size, to the patches after the last layer, `(B, N, D)`."""
        x = self.embed(pixel_values, interpolate_pos_encoding=True)
        return BaseModelOutput(last_hidden_state=self.layers(self.pre_norm(x), **kwargs))

    def resize_positions(self, image_size: int | tuple[int, int]) -> None:
        """Change the image size alone: the table is resized in every forward."""
        self.config.image_size = image_size


class ResamplerAttention(MultiHead):
    """Attention to keys and values that differ: positions are part of the keys alone."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, D) to (B, M, D), (B, M, D) -> (B, N, D) and, where the implementation has them, weights."""
        return self.attend(x, self.heads(self.k_proj(keys)), self.heads(self.v_proj(values)), None, **kwargs)


class HfvlmQwenVLResampler(HfvlmPreTrainedModel, Bridge):
    """Learned queries, each with its position in the image, gather what the patches show: 1,024 become 256."""

    config: HfvlmQwenVLResamplerConfig
    base_model_prefix = "projector"
    _keys_to_ignore_on_load_unexpected = other_towers("projector")
    supports_gradient_checkpointing = False  # it has no layers
    _no_split_modules = ["ResamplerAttention"]
    main_input_name = "patches"
    _can_record_outputs = {}

    def __init__(self, config: HfvlmQwenVLResamplerConfig):
        super().__init__(config)
        width, context = config.hidden_size, config.context_size
        self.query = nn.Parameter(torch.zeros(config.num_queries, width))
        # Never trained, but stored: a released file holds it in its own precision.
        self.position = nn.Buffer(sine_grid(config.edge, width).to(torch.get_default_dtype()))
        self.kv_proj = nn.Identity() if context == width else nn.Linear(context, width, bias=False)
        self.query_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = ResamplerAttention(config)
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, width, bias=False)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.query, std=std)
        init.copy_(self.position, sine_grid(self.config.edge, self.config.hidden_size))
        init.normal_(self.projection.weight, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.kv_proj

    @can_return_tuple
    def forward(self, patches: Tensor, grid: Size, **kwargs: Unpack[Keywords]) -> BaseModelOutput:
        """Resample `(B, rows * columns, C)` of `grid`, rows and columns, to `(B, num_queries, D)`."""
        edge = (self.config.edge, self.config.edge)
        context = self.context_norm(self.kv_proj(patches.to(self.query.dtype)))
        positions = resize_grid(self.position, edge, grid, **BICUBIC_SAMPLED)
        query = (self.query_norm(self.query) + self.position).expand(patches.shape[0], -1, -1)
        x, _ = self.attention(query, context + positions, context, **kwargs)
        return BaseModelOutput(last_hidden_state=self.projection(self.post_norm(x)))


class HfvlmQwenVLForConditionalGeneration(ImageTextModel):
    """A language model that attends to images through a resampler, and answers with words and regions."""

    config: HfvlmQwenVLConfig
    # The authors adapt the language model alone.
    lora_recipe = "language"

    def __init__(self, config: HfvlmQwenVLConfig):
        super().__init__(config)
        self.vision_model = HfvlmQwenVLVisionModel._from_config(config.vision_config)
        self.projector = HfvlmQwenVLResampler._from_config(config.projector_config)
        self.language_model = HfvlmQwenVLForCausalLM._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Resample images `(images, 3, H, W)` to an output whose `pooler_output` has one `(num_queries, hidden_size)`
        tensor an image."""
        vision = self.vision_model(pixel_values, **kwargs)
        grid = self.vision_model.patch_grid(*pixel_values.shape[-2:])
        return media_features(vision, self.projector(vision.last_hidden_state, grid, **kwargs).last_hidden_state)

    def reusable(self, cache: Any, known: int, length: int) -> int:
        """Count no token for a prompt so long that its rotary frequencies differ from the cache's."""
        return known if self.language_model.model.stretch_of(length) == getattr(cache, "stretch", 1) else 0


class HfvlmQwenVLForSequenceClassification(TextScorer, HfvlmQwenVLForConditionalGeneration):
    """A reward, or other scores, of answers about images."""


class HfvlmQwenVLForImageClassification(PatchClassifier):
    """A linear layer on the mean of the vision tower's patches."""

    config: HfvlmQwenVLConfig
    base_model_prefix = "qwen_vl"
