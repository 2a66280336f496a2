"""CLIP (https://arxiv.org/abs/2103.00020; https://github.com/openai/CLIP at d05afc4).

The folder is longer than other architectures': open_clip's releases are all CLIPs, and brought towers of their own.
"""

from typing import ClassVar, Unpack

from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import DepthScaledModel, records
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import CausalTextTower
from hfvlm.modeling.trunks import HfvlmTextTrunkModel, HfvlmVisionTrunkModel  # noqa: F401 (CLIP registers them)
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier, ImageSize
from hfvlm.models.clip.configuration_clip import HfvlmCLIPConfig, HfvlmCLIPTextConfig, HfvlmCLIPVisionConfig
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import PreNormLayer, Stack


class HfvlmCLIPVisionModel(ClassTokenTower, DepthScaledModel):
    """A vision transformer that pools its class token."""

    config: HfvlmCLIPVisionConfig
    patch_bias = False
    pools_one_token = True
    first_norm: ClassVar[type[nn.Module]] = nn.LayerNorm

    def __init__(self, config: HfvlmCLIPVisionConfig):
        super().__init__(config)
        self.pre_norm = self.first_norm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        *,
        interpolate_pos_encoding: bool = False,
        until: int | None = None,
        **kwargs: Unpack[Keywords],
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens before the last norm, class token first, and the pooled one.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it. With `until`,
        the tokens are `hidden_states[until]`, and nothing is pooled; what comes after them is computed only for those
        who ask for all hidden states or attention weights.
        """
        x = self.pre_norm(self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        if until is not None:
            x = self.layers.until(x, until, **kwargs)
            if records(self.config, kwargs):
                self.layers.rest(x, until, **kwargs)
            return TowerOutput(last_hidden_state=x)
        x = self.layers(x, **kwargs)
        pooled = self.post_norm(self.pooling(x))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def pooling(self, x: Tensor) -> Tensor:
        """Take what is pooled of the tokens, class token first: `(B, N, D)` -> `(B, D)`."""
        return x[:, 0]

    def unused(self, until: int) -> list[str]:
        """Names of the modules that `hidden_states[until]` does not depend on."""
        depth = self.layers.depth_of(until)
        return [*(f"layers.{i}" for i in range(depth, len(self.layers))), "post_norm", "projection"]


class HfvlmCLIPTextModel(CausalTextTower, DepthScaledModel):
    """A causal transformer that pools its end-of-text token."""

    config: HfvlmCLIPTextConfig

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids -> all tokens after the last norm, and the pooled output; see `CausalTextTower`."""
        x = self.post_norm(self.read(input_ids, attention_mask, **kwargs))
        pooled = self.end_tokens(x, input_ids, attention_mask)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmCLIPModel(DualEncoder):
    """Images and texts in one space."""

    config: HfvlmCLIPConfig
    base_model_prefix = "clip"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmCLIPConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def resize_positions(self, image_size: ImageSize | None = None, context_length: int | None = None) -> None:
        """Change the image size or the number of text positions for good, as open_clip does when it loads a file.

        Raises:
            ValueError: an image size for a ResNet, whose positions open_clip never resizes.
        """
        if image_size is not None:
            self.vision_model.resize_positions(image_size)
        if context_length is not None:
            self.text_model.resize_positions(context_length)


class HfvlmCLIPForImageClassification(ImageClassifier):
    """A linear layer on the vision tower's pooled output before its projection, as in the paper's linear probes."""

    config: HfvlmCLIPConfig
    base_model_prefix = "clip"
