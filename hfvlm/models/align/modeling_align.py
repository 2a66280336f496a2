"""ALIGN (https://arxiv.org/abs/2102.05918; https://github.com/kakaobrain/coyo-align at 8cea82e)."""

from functools import partial
from typing import Any, Unpack

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import LAYER_ATTENTIONS
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import MaskedTextTower, mask_of_one, without_padding
from hfvlm.modeling.vision import ImageClassifier, VisionTower
from hfvlm.models.align.configuration_align import (
    BlockSizes,
    HfvlmALIGNConfig,
    HfvlmALIGNTextConfig,
    HfvlmALIGNVisionConfig,
)
from hfvlm.modules.dropout import DropPath
from hfvlm.modules.embeddings import BertEmbedding, text_positions
from hfvlm.modules.normalization import BatchNorm2d
from hfvlm.modules.pooling import first_token
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import Temperature
from hfvlm.modules.transformer import PostNormLayer, Stack


def pad_for(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Put zeros around `(B, C, H, W)`, so that a convolution divides its size by its stride.

    With a stride, as TensorFlow pads images of even size; the original does so whatever their size is.
    """
    after = kernel_size // 2
    before = after - 1 if stride > 1 else after
    return F.pad(x, (before, after, before, after))


class ConvNorm(nn.Module):
    """A convolution without bias, and a batch norm.

    The original takes a batch's statistics over 16 images at a time (`virtual_batch_size`), here over all.
    """

    def __init__(
        self,
        config: HfvlmALIGNVisionConfig,
        channels: tuple[int, int],
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.conv = nn.Conv2d(*channels, kernel_size, stride=stride, groups=groups, bias=False)
        self.norm = BatchNorm2d(channels[1], eps=config.batch_norm_eps, momentum=0.01)
        self.act = ACT2FN[config.hidden_act]

    def init_own_weights(self, std: float) -> None:
        height, width = self.conv.kernel_size
        fan_out = height * width * self.conv.out_channels / self.conv.groups
        init.normal_(self.conv.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(pad_for(x, self.kernel_size, self.stride))))


class LinearConvNorm(ConvNorm):
    """Without an activation: the narrow end of a block, where one would lose too much."""

    def __init__(self, config: HfvlmALIGNVisionConfig, channels: tuple[int, int]):
        super().__init__(config, channels)
        self.act = nn.Identity()


class SqueezeExcite(nn.Module):
    """Weighs the channels by the mean of the whole feature map."""

    def __init__(self, config: HfvlmALIGNVisionConfig, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, squeezed)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


class MBConv(nn.Module):
    """Widen, filter each channel, weigh the channels, narrow; and a shortcut where the shape stays the same."""

    def __init__(self, config: HfvlmALIGNVisionConfig, sizes: BlockSizes, drop_path: float):
        super().__init__()
        narrow, out, kernel_size, stride, ratio = sizes
        wide = narrow * ratio
        self.expand = ConvNorm(config, (narrow, wide)) if ratio > 1 else nn.Identity()
        self.depthwise = ConvNorm(config, (wide, wide), kernel_size, stride, groups=wide)
        self.excite = SqueezeExcite(config, wide, max(1, int(narrow * config.squeeze_ratio)))
        self.project = LinearConvNorm(config, (wide, out))
        self.shortcut = stride == 1 and narrow == out
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + self.drop_path(y) if self.shortcut else y


class HfvlmALIGNVisionModel(VisionTower):
    """An EfficientNet up to its last block, and the mean of its output: there is no convolution on top."""

    config: HfvlmALIGNVisionConfig
    _input_embed_layer = "stem"
    # Recomputing a batch norm in training would count its batch twice in the running statistics.
    supports_gradient_checkpointing = False
    _no_split_modules = ["MBConv"]
    _can_record_outputs = {"hidden_states": MBConv}

    def __init__(self, config: HfvlmALIGNVisionConfig):
        super().__init__(config)
        self.stem = ConvNorm(config, (config.num_channels, config.stem_size), kernel_size=3, stride=2)
        share = config.drop_connect_rate / len(config.blocks)
        self.layers = Stack(MBConv(config, sizes, share * i) for i, sizes in enumerate(config.blocks))
        self.projection = projection(config, bias=True)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> TowerOutput:
        """`(B, C, H, W)` pixels in -1..1 -> the last feature map as tokens `(B, H/32 * W/32, D)`, and their mean."""
        x = self.stem(pixel_values.to(self.dtype))
        for layer in self.layers:
            x = layer(x)
        x = x.flatten(2).transpose(1, 2)
        pooled = x.mean(dim=1)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmALIGNTextModel(MaskedTextTower):
    """A BERT that pools its first token."""

    config: HfvlmALIGNTextConfig
    pools_one_token = True
    _no_split_modules = ["PostNormLayer"]
    _can_record_outputs = {"hidden_states": PostNormLayer, "attentions": LAYER_ATTENTIONS}

    def __init__(self, config: HfvlmALIGNTextConfig):
        super().__init__(config)
        self.embeddings = BertEmbedding(config)
        self.layers = Stack(PostNormLayer(config) for _ in range(config.num_hidden_layers))
        self.projection = projection(config, bias=True)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> TowerOutput:
        """`(B, N)` token ids, padded on the right -> all tokens after the last layer, and the first of them.

        Args:
            input_ids: begins with [CLS].
            attention_mask: `(B, N)` with 0 for padding; None for no padding.
            token_type_ids: `(B, N)`; trained on type 0 alone, the default.
        """
        if kwargs.get("pooled_only"):
            attention_mask, input_ids, token_type_ids = without_padding(attention_mask, input_ids, token_type_ids)
        positions = text_positions(input_ids, attention_mask, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions, token_type_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        pool = partial(first_token, attention_mask=attention_mask)
        one = mask_of_one(self.config, x, attention_mask) if kwargs.get("pooled_only") else None
        x = self.layers(x, mask, pool=pool, pooled_mask=one, **kwargs)
        pooled = pool(x)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmALIGNModel(DualEncoder):
    """Images of any size and texts in one space."""

    config: HfvlmALIGNConfig
    base_model_prefix = "align"
    image_inputs = ()
    text_inputs = ("token_type_ids",)

    def __init__(self, config: HfvlmALIGNConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = Temperature(config.temperature_init_value)
        self.post_init()

    def pair_loss(self, *pairs: Any, **options: Any) -> Tensor:
        """Add the losses of both directions up, as the original, instead of averaging them as others do."""
        return 2 * contrastive_loss(*pairs, label_smoothing=self.config.label_smoothing, **options)


class HfvlmALIGNForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's mean."""

    config: HfvlmALIGNConfig
    base_model_prefix = "align"
    supports_gradient_checkpointing = False
