"""The encoder of DALL-E's discrete VAE (https://arxiv.org/abs/2102.12092;
https://github.com/openai/DALL-E at 5be4b23).

An image becomes an eighth of its rows and columns of codes, which FLAVA learns to predict for masked patches.
"""

from dataclasses import dataclass
from typing import Unpack

from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.flava.configuration_flava import HfvlmFLAVACodebookConfig
from hfvlm.models.flava.modeling_flava import HfvlmFLAVAPreTrainedModel
from hfvlm.modules.dvae import CodebookBlock, encoder_groups, init_by_inputs


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
        encoder = encoder_groups(config.num_channels, config.hidden_size, depth, config.vocab_size, gain)
        self.stem, self.groups, self.head = encoder.stem, encoder.groups, encoder.head
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init_by_inputs(self)

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
