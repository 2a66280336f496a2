"""Towers that are models of transformers: any vision model or text encoder, pooled and projected."""

import inspect
from dataclasses import field
from typing import Any, Unpack

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel, ConvNextConfig, PreTrainedModel, RobertaConfig
from transformers.utils.generic import can_return_tuple

from hfvlm.configuration import HfvlmConfig, SubConfig
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import MaskedTextTower
from hfvlm.modeling.vision import VisionTower
from hfvlm.modules.pooling import POOLINGS
from hfvlm.modules.projection import projection_head


@strict
class TrunkConfig(HfvlmConfig):
    """A tower that is a model of transformers, its trunk.

    Args:
        trunk_config: of the model, as AutoModel builds it; of one with an encoder and a decoder the encoder is taken.
        pooling: one of `hfvlm.modules.pooling.POOLINGS`: "pooler" takes the trunk's own pooled output, "first" its
            first token, "mean" and "max" the mean and the largest of its tokens but padding.
        layer_norm_eps: epsilon of all layer norms of the trunk; None for what its own configuration and class have.
        projection_dim: width of the joint space; None leaves the projection out.
        projection_hidden_size: width between the projection's two layers; None for a projection of one layer.
        projection_bias: whether the projection's first layer has a bias.
    """

    trunk_config: SubConfig[Any] = None
    pooling: str = "pooler"
    layer_norm_eps: float | None = None
    projection_dim: int | None = 512
    projection_hidden_size: int | None = None
    projection_bias: bool = False

    def validate_pooling(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"{type(self).__name__}: pooling {self.pooling!r} is none of {', '.join(POOLINGS)}.")

    @property
    def hidden_size(self) -> int:
        """Width of the trunk's last layer."""
        trunk = self.trunk_config
        return trunk.hidden_size if hasattr(trunk, "hidden_size") else trunk.hidden_sizes[-1]

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes."""
        return self.hidden_size


@strict
class HfvlmVisionTrunkConfig(TrunkConfig):
    """Any vision model of transformers as a vision tower."""

    model_type = "hfvlm_vision_trunk"
    base_config_key = "vision_config"
    sub_configs = {"trunk_config": ConvNextConfig}

    trunk_config: SubConfig[Any] = field(default_factory=ConvNextConfig)

    @property
    def image_size(self) -> int | list[int] | tuple[int, int]:
        """One edge in pixels, or (height, width)."""
        return self.trunk_config.image_size


@strict
class HfvlmTextTrunkConfig(TrunkConfig):
    """Any text encoder of transformers as a text tower.

    Args:
        max_position_embeddings: number of tokens to which texts are cut, at most the trunk's own.
    """

    model_type = "hfvlm_text_trunk"
    base_config_key = "text_config"
    sub_configs = {"trunk_config": RobertaConfig}

    trunk_config: SubConfig[Any] = field(default_factory=RobertaConfig)
    pooling: str = "mean"
    max_position_embeddings: int = 77

    @property
    def pad_token_id(self) -> int | None:
        """The token that is padding where no mask says more."""
        return self.trunk_config.pad_token_id

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return self.trunk_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.trunk_config.vocab_size = value


# The layers that LoRA adapts by default, by the names that models have for queries and values; those of ConvNeXt mix
# channels.
LORA_LAYERS = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("qkv",), ("pwconv1", "pwconv2"))


# Of transformers, by the ends of the names of what a class declares.
ATTENTION = ("sdpa", "flash_attn", "flex_attn")


class Trunk(HfvlmPreTrainedModel):
    """Base of towers that are a model of transformers."""

    config: Any
    # The trunk's own.
    _no_split_modules = []
    _can_record_outputs = {}

    def __init__(self, config: TrunkConfig):
        super().__init__(config)
        self.trunk = trunk_of(config)
        if self.trunk.main_input_name != self.main_input_name:
            raise ValueError(
                f"{config.base_config_key}: {type(self.trunk).__name__} takes {self.trunk.main_input_name}, a tower "
                f"here takes {self.main_input_name}."
            )
        self.supports_gradient_checkpointing = self.trunk.supports_gradient_checkpointing
        self.projection = projection_head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_input_embeddings(value)

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """Names of the layers that LoRA adapts by default."""
        names = {name.rpartition(".")[2] for name, part in self.trunk.named_modules() if isinstance(part, nn.Linear)}
        return next((layers for layers in LORA_LAYERS if names.issuperset(layers)), ())

    def embed(self, inputs: Tensor, mask: Tensor | None = None, **kwargs: Any) -> TowerOutput:
        """Run the trunk, pool and project; `mask`, `(B, N)`, is 0 for tokens that are padding."""
        output = self.trunk(inputs, **kwargs, return_dict=True)
        pooled = POOLINGS[self.config.pooling](output, mask)
        return TowerOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=pooled,
            embeds=self.projection(pooled),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


def trunk_of(config: TrunkConfig) -> PreTrainedModel:
    """Build a trunk, without a pooling layer of its own that the tower would not use."""
    kind: Any = AutoModel._model_mapping[type(config.trunk_config)]
    options = {} if config.pooling == "pooler" else {"add_pooling_layer": False}
    known = inspect.signature(kind).parameters
    attends = kind._supports_sdpa or "attentions" in (kind._can_record_outputs or {})
    if not attends:
        config.trunk_config._attn_implementation = "eager"
    trunk = AutoModel.from_config(config.trunk_config, **{k: v for k, v in options.items() if k in known})
    trunk = trunk.get_encoder() if config.trunk_config.is_encoder_decoder else trunk
    for implementation in () if attends else ATTENTION:
        setattr(trunk, f"_supports_{implementation}", True)  # the other tower's changes nothing here
    if config.layer_norm_eps is not None:
        for norm in (part for part in trunk.modules() if isinstance(part, nn.LayerNorm)):
            norm.eps = config.layer_norm_eps
    return trunk


class HfvlmVisionTrunkModel(Trunk, VisionTower):
    """Any vision model of transformers, pooled and projected."""

    config: HfvlmVisionTrunkConfig

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> the trunk's tokens `(B, N, D)` or map `(B, D, H, W)`, and the pooled
        output.

        `interpolate_pos_encoding` is for trunks that have positions, and take images of other sizes by it.
        """
        if interpolate_pos_encoding and "interpolate_pos_encoding" in inspect.signature(self.trunk.forward).parameters:
            return self.embed(pixel_values.to(self.trunk.dtype), interpolate_pos_encoding=True, **kwargs)
        return self.embed(pixel_values.to(self.trunk.dtype), **kwargs)


class HfvlmTextTrunkModel(Trunk, MaskedTextTower):
    """Any text encoder of transformers, pooled and projected."""

    config: HfvlmTextTrunkConfig

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids -> the trunk's tokens, and the pooled output. Without `attention_mask`, `(B, N)` with 0
        for padding, padding is every `pad_token_id`, as open_clip has it."""
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        return self.embed(input_ids, attention_mask, attention_mask=attention_mask, **kwargs)
