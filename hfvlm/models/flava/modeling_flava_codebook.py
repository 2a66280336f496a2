"""The encoder of DALL-E's discrete VAE (https://arxiv.org/abs/2102.12092;
https://github.com/openai/DALL-E at 5be4b23).

An image becomes an eighth of its rows and columns of codes, which FLAVA learns to predict for masked patches.
"""

from dataclasses import dataclass
from typing import Unpack

from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.flava.configuration_flava import HfvlmFLAVACodebookConfig
from hfvlm.models.flava.modeling_flava import HfvlmFLAVAPreTrainedModel

# Each group but the first has twice the channels of the one before it, and all but the last halve the image.
GROUPS = 4


@dataclass
class CodebookOutput(ModelOutput):
    """Images as codes.

    Args:
        logits: `(B, V, H/8, W/8)`, of each code.
        codes: `(B, H/8, W/8)`, the most likely ones.
        hidden_states: the input and output of every block.
    """

    logits: Tensor | None = None
    codes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """Make one that retains rows and columns."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class CodebookBlock(GradientCheckpointingLayer):
    """Four convolutions, narrow in their middle, next to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, gain: float):
        super().__init__()
        narrow = out_channels // 4
        self.gain = gain
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else convolution(in_channels, out_channels, 1)
        self.conv1 = convolution(in_channels, narrow, 3)
        self.conv2 = convolution(narrow, narrow, 3)
        self.conv3 = convolution(narrow, narrow, 3)
        self.conv4 = convolution(narrow, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = conv(y.relu())
        return self.shortcut(x) + self.gain * y


class HfvlmFLAVACodebookModel(HfvlmFLAVAPreTrainedModel):
    """Encodes images to codes. FLAVA does not train it."""

    config: HfvlmFLAVACodebookConfig
    base_model_prefix = "codebook_model"
    main_input_name = "codebook_pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["CodebookBlock"]
    _can_record_outputs = {"hidden_states": CodebookBlock}

    def __init__(self, config: HfvlmFLAVACodebookConfig):
        super().__init__(config)
        depth, gain = config.blocks_per_group, (config.num_groups * config.blocks_per_group) ** -2
        widths = [config.hidden_size * 2**i for i in range(GROUPS)]
        self.stem = convolution(config.num_channels, config.hidden_size, 7)
        self.groups = nn.ModuleList()
        for before, width in zip([config.hidden_size, *widths], widths, strict=False):
            blocks = [CodebookBlock(width if i else before, width, gain) for i in range(depth)]
            self.groups.append(nn.Sequential(*blocks, *([] if width == widths[-1] else [nn.MaxPool2d(2)])))
        self.head = convolution(widths[-1], config.vocab_size, 1)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.stem

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, codebook_pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> CodebookOutput:
        """Encode `(B, C, H, W)` pixels in 0.1..0.9, as the image processor makes them -> codes.

        Args:
            codebook_pixel_values: of any size that is a multiple of 8.
        """
        x = self.stem(codebook_pixel_values.to(self.dtype))
        for group in self.groups:
            x = group(x)
        logits = self.head(x.relu())
        return CodebookOutput(logits=logits, codes=logits.argmax(dim=1))
