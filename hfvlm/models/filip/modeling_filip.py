"""DeCLIP's reproduction of FILIP (https://arxiv.org/abs/2111.07783; https://github.com/Sense-GVT/DeCLIP at 5d99a85).

The authors released no weights of the paper's English models. Theirs are the Chinese FILIP and Wukong of
huawei-noah/Pretrained-Language-Model (Noah_WuKong), another architecture: `hfvlm.models.wukong`.
Where paper and reproduction differ: the paper compares the tokens of a text that are not padding, the reproduction all
77 (here, those where `attention_mask` is 1; the embeddings of others are zero); and the reproduction's loss matches
with 16 tokens of each pair (`top_k`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from typing import Any, Unpack

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss, late_interaction_loss, late_interaction_scores
from hfvlm.modeling.base import DepthScaledModel, other_towers, unit
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.modeling.text import CausalTextTower
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.filip.configuration_filip import HfvlmFILIPConfig, HfvlmFILIPTextConfig, HfvlmFILIPVisionConfig
from hfvlm.modules.projection import Projection, projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import PreNormLayer, Stack

# What is in the composite next to its towers.
SUMMARIES = r"^(image|text)_summary\.|^summary_scale\."


@dataclass
class FILIPFeatures(BaseModelOutputWithPooling):
    """The features of images or of texts.

    Args:
        pooler_output: `(B, N, projection_dim)`, the tokens in the space where they are compared, not normalised; zero
            for tokens that do not count.
        summary: `(B, summary_dim)`, the image or the text as a whole, not normalised.
    """

    summary: Tensor | None = None


@dataclass
class FILIPOutput(DualEncoderOutput):
    """Images against texts, token by token.

    Args:
        logits_per_image: `(images, texts)`, scaled means over the patches of their best match among the tokens.
        logits_per_text: `(texts, images)`, scaled means over the tokens of their best match among the patches: not the
            transpose of the other.
        image_embeds: `(images, patches, projection_dim)`, each patch of unit length.
        text_embeds: `(texts, tokens, projection_dim)`, each token of unit length, or zero if it does not count.
        image_summary_embeds: `(images, summary_dim)`, whole images, of unit length.
        text_summary_embeds: `(texts, summary_dim)`, whole texts, of unit length.
        summary_scale: `(1,)`, the inverse of the temperature for these.
    """

    image_summary_embeds: Tensor | None = None
    text_summary_embeds: Tensor | None = None
    summary_scale: Tensor | None = None


class HfvlmFILIPVisionModel(ClassTokenTower, DepthScaledModel):
    """CLIP's vision transformer, whose patches are the embedding."""

    config: HfvlmFILIPVisionConfig
    _keys_to_ignore_on_load_unexpected = [*other_towers("vision_model"), SUMMARIES]
    patch_bias = False

    def __init__(self, config: HfvlmFILIPVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.projection = projection(config, bias=True)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=self.config.hidden_size**-0.5)
        init.normal_(self.position, std=0.01)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, C, H, W)` normalised pixels -> all tokens, class token first, the mean of the patches, and the patches
        in the joint space `(B, N, D)`.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x = self.layers(self.pre_norm(x), **kwargs)
        patches = x[:, 1:]
        return TowerOutput(last_hidden_state=x, pooler_output=patches.mean(dim=1), embeds=self.projection(patches))


class HfvlmFILIPTextModel(CausalTextTower, DepthScaledModel):
    """CLIP's causal text transformer, whose tokens are the embedding."""

    config: HfvlmFILIPTextConfig
    _keys_to_ignore_on_load_unexpected = [*other_towers("text_model"), SUMMARIES]
    projection_bias = True
    pools_one_token = False

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids, padded on the right -> all tokens, the end-of-text token, and all in the joint space
        `(B, N, D)`."""
        x = self.post_norm(self.read(input_ids, attention_mask, **kwargs))
        pooled = self.end_tokens(x, input_ids, attention_mask)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(x))


class ImageSummary(nn.Module):
    """The class token as the whole image, as in CLIP."""

    def __init__(self, config: HfvlmFILIPConfig):
        super().__init__()
        vision = config.vision_config
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.projection = Projection(vision.hidden_size, config.summary_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D), the class token first -> (B, summary_dim)."""
        return self.projection(self.norm(tokens[:, 0]))


class HfvlmFILIPModel(DualEncoder):
    """Images and texts, compared token by token.

    Tokens do not count where `attention_mask` is 0, as in the paper; without one all count, as in the reproduction.
    """

    config: HfvlmFILIPConfig
    base_model_prefix = "filip"
    _keep_in_fp32_modules_strict = ["logit_scale", "summary_scale"]
    output_class = FILIPOutput
    pair_loss = staticmethod(late_interaction_loss)
    # As the reproduction, which also bounds it by exp(3) below.
    max_logit_scale = exp(6)

    def __init__(self, config: HfvlmFILIPConfig):
        super().__init__(config)
        self.build_towers(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.image_summary = ImageSummary(config)
        self.text_summary = Projection(config.text_config.hidden_size, config.summary_dim)
        self.summary_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def encode_image(self, pixel_values: Tensor, **kwargs: Any) -> FILIPFeatures:
        output = self.vision_model(pixel_values, **kwargs)
        return features(output, output.embeds, self.image_summary(output.last_hidden_state))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> FILIPFeatures:
        output = self.text_model(input_ids, attention_mask, **kwargs)
        tokens = output.embeds
        if attention_mask is not None:
            tokens = tokens * attention_mask.unsqueeze(-1)
        return features(output, tokens, self.text_summary(output.pooler_output))

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> FILIPFeatures:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, patches, D)`, are the embeddings of the patches, not
        normalised."""
        return self.encode_image(pixel_values, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> FILIPFeatures:
        """`(B, N)` -> an output whose `pooler_output`, `(B, N, D)`, are the embeddings of the tokens, not normalised,
        and zero where `attention_mask` is."""
        return self.encode_text(input_ids, attention_mask, **kwargs)

    @staticmethod
    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        """`(A, N, D)`, `(B, M, D)` tokens -> `(A, B)`, means over the queries' tokens of their best match."""
        return late_interaction_scores(queries, gallery, queries.any(dim=-1), gallery.any(dim=-1))

    def both_ways(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(image_embeds, text_embeds), self.score(text_embeds, image_embeds)

    def further_fields(self, image: FILIPFeatures, text: FILIPFeatures) -> dict[str, Tensor]:
        return {
            "image_summary_embeds": unit(image.summary),
            "text_summary_embeds": unit(text.summary),
            "summary_scale": self.summary_scale.exp(),
        }

    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        """Apply `late_interaction_loss`, or another that takes its arguments, to rows of tokens."""
        image, text = output.image_embeds, output.text_embeds
        loss = pair_loss(
            image,
            text,
            output.logit_scale,
            a_mask=image.any(dim=-1),
            b_mask=text.any(dim=-1),
            top_k=self.config.top_k,
            group=group,
        )
        summaries = output.image_summary_embeds, output.text_summary_embeds
        whole = contrastive_loss(*summaries, output.summary_scale, group=group)
        return loss + self.config.summary_loss_weight * whole


def features(output: TowerOutput, tokens: Tensor | None, summary: Tensor) -> FILIPFeatures:
    """Make features of a tower's output, with the joint embedding where every `get_*_features` has it."""
    return FILIPFeatures(
        last_hidden_state=output.last_hidden_state,
        pooler_output=tokens,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
        summary=summary,
    )


class HfvlmFILIPForImageClassification(ImageClassifier):
    """A linear layer on the mean of the patches."""

    config: HfvlmFILIPConfig
    base_model_prefix = "filip"
    _keys_to_ignore_on_load_unexpected = [*ImageClassifier._keys_to_ignore_on_load_unexpected, SUMMARIES]
