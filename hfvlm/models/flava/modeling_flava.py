"""FLAVA (https://arxiv.org/abs/2112.04482; https://github.com/facebookresearch/multimodal at 3c2a85a).

The paper's figure 2: an image encoder, a text encoder, and a multimodal encoder over the tokens of both. The first two
are a dual encoder.

With its configuration the architecture is longer than others: it is four networks, the codebook included, and six
pretraining losses.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import LAYER_ATTENTIONS, HfvlmPreTrainedModel
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modeling.text import MaskedTextTower, mask_of_one, without_padding
from hfvlm.modeling.vision import ClassTokenTower
from hfvlm.models.flava.configuration_flava import (
    HfvlmFLAVAConfig,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVATextConfig,
    HfvlmFLAVAVisionConfig,
)
from hfvlm.modules.embeddings import BertEmbedding, padded_positions, text_positions
from hfvlm.modules.pooling import first_token
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import FixedTemperature, LogitScale
from hfvlm.modules.transformer import MLP, PreNormLayer, Stack

# One folder serves several heads; each leaves unused what it has no part for.
PARTS = [
    r"^(vision_model|text_model|multimodal_model|codebook_model|classifier|logit_scale)\.",
    r"^(mim|mlm|mmm_image|mmm_text|itm)_head\.",
]


@dataclass
class FLAVATowerOutput(TowerOutput):
    """The output of one of the encoders.

    Args:
        before_norm: `(B, N, D)`, the tokens before the last norm, the multimodal encoder's inputs.
    """

    before_norm: Tensor | None = None


class DroppedMLP(MLP):
    """An MLP with dropout after its activation and after its end."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class DroppedLayer(PreNormLayer):
    """x + dropout(f(norm(x))), for attention and MLP."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.mlp = DroppedMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = x + self.dropout(self.attend(x, mask, context, **kwargs))
        return x + self.mlp(self.mlp_norm(x))


class Pooler(nn.Linear):
    """BERT's pooler of the first token."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, N, D) -> (B, D)."""
        return super().forward(x[:, 0]).tanh()


class HfvlmFLAVAPreTrainedModel(HfvlmPreTrainedModel):
    """Base of all classes."""

    _no_split_modules = ["DroppedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS
    _can_record_outputs = {"hidden_states": DroppedLayer, "attentions": LAYER_ATTENTIONS}


class HfvlmFLAVAVisionModel(ClassTokenTower, HfvlmFLAVAPreTrainedModel):
    """The image encoder: a vision transformer, some of whose patches may be masked."""

    config: HfvlmFLAVAVisionConfig
    pools_one_token = True
    _keys_to_ignore_on_load_unexpected = PARTS

    def __init__(self, config: HfvlmFLAVAVisionConfig):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size)) if config.mask_token else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = Stack(DroppedLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.summary = Pooler(config.hidden_size, config.hidden_size)
        self.projection = projection(config, bias=True)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        for parameter in (self.class_token, self.mask_token, self.position):
            if parameter is not None:
                init.normal_(parameter, std=std)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> FLAVATowerOutput:
        """Encode `(B, C, H, W)` normalised pixels -> all tokens after the last norm, class token first, and its pooled
        outputs.

        Args:
            pixel_values: of `config.image_size`.
            bool_masked_pos: `(B, H/p, W/p)` or `(B, H/p * W/p)`, other than 0 for the patches that are masked.
            interpolate_pos_encoding: take images of any size; the position table is resized to theirs.
        """
        x = self.patches(pixel_values)
        if bool_masked_pos is not None:
            x = self.hide(x, bool_masked_pos)
        x = self.with_positions(x, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        before = self.layers(self.dropout(x), **kwargs)
        x = self.post_norm(before)
        embeds = self.projection(x[:, 0])
        return FLAVATowerOutput(last_hidden_state=x, pooler_output=self.summary(x), embeds=embeds, before_norm=before)

    def hide(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """Put the mask token in the place of each masked patch of `(B, N, D)`."""
        if self.mask_token is None:
            raise ValueError("bool_masked_pos: this model has no mask token (mask_token is off in vision_config).")
        if hidden.flatten(1).shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos is {tuple(hidden.shape)}, but there are {patches.shape[1]} patches in each of "
                f"{patches.shape[0]} images."
            )
        return torch.where(hidden.flatten(1).bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def resized(self, grid: tuple[int, int]) -> Tensor:
        """Resize the position table.

        The original asks for a tenth of a row and of a column too much, lest rounding should lose one, and samples by
        these factors.
        """
        old = self.config.grid
        if grid == old:
            return self.position
        factors = [(new + 0.1) / edge for new, edge in zip(grid, old, strict=True)]
        table = self.position[1:].float().unflatten(0, old).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)[0].flatten(1).t()
        return torch.cat([self.position[:1], resized.to(self.position.dtype)])


class HfvlmFLAVATextModel(HfvlmFLAVAPreTrainedModel, MaskedTextTower):
    """The text encoder: BERT's embeddings, and layers that normalise first."""

    config: HfvlmFLAVATextConfig
    pools_one_token = True
    base_model_prefix = "text_model"

    def __init__(self, config: HfvlmFLAVATextConfig):
        super().__init__(config)
        self.embeddings = BertEmbedding(config)
        self.layers = Stack(DroppedLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.summary = Pooler(config.hidden_size, config.hidden_size)
        self.projection = projection(config, bias=True)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> FLAVATowerOutput:
        """Encode `(B, N)` token ids, [CLS] first -> all tokens after the last norm, and pooled outputs of the first.

        Args:
            input_ids: padded on the right.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            token_type_ids: `(B, N)`; trained on type 0, the default.
        """
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        if kwargs.get("pooled_only"):
            attention_mask, input_ids, token_type_ids = without_padding(attention_mask, input_ids, token_type_ids)
        positions = text_positions(input_ids, None, self.config.max_position_embeddings)
        if attention_mask is not None:
            positions = padded_positions(attention_mask)
        x = self.embeddings(input_ids, positions, token_type_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        pool = partial(first_token, attention_mask=attention_mask)
        one = mask_of_one(self.config, x, attention_mask) if kwargs.get("pooled_only") else None
        before = self.layers(x, mask, pool=pool, pooled_mask=one, **kwargs)
        x = self.post_norm(before)
        first = pool(x)
        pooled, embeds = self.summary(first.unsqueeze(1)), self.projection(first)
        return FLAVATowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=embeds, before_norm=before)


class HfvlmFLAVAMultimodalModel(HfvlmFLAVAPreTrainedModel):
    """The multimodal encoder: a class token of its own, then an image's tokens, then a text's."""

    config: HfvlmFLAVAMultimodalConfig
    base_model_prefix = "multimodal_model"
    main_input_name = "image_tokens"
    input_modalities = ["image", "text"]

    def __init__(self, config: HfvlmFLAVAMultimodalConfig):
        super().__init__(config)
        self.image_projection = nn.Linear(config.image_hidden_size, config.hidden_size)
        self.text_projection = nn.Linear(config.text_hidden_size, config.hidden_size)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = Stack(DroppedLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.summary = Pooler(config.hidden_size, config.hidden_size)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.image_projection

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Encode both `before_norm`, `(B, M, D)` and `(B, N, E)` -> `(B, 1 + M + N, F)`, and the first pooled.

        Trained on texts that were padded to 77 tokens, without a mask: padding is attended to like other tokens.
        """
        image, text = (
            self.image_projection(image_tokens.to(self.dtype)),
            self.text_projection(text_tokens.to(self.dtype)),
        )
        both = torch.cat([image, text], dim=1)
        x = torch.cat([self.class_token.expand(both.shape[0], 1, -1), both], dim=1)
        x = self.post_norm(self.layers(x, **kwargs))
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.summary(x))


class HfvlmFLAVAModel(DualEncoder, HfvlmFLAVAPreTrainedModel):
    """Images and texts in one space, and texts encoded together with images."""

    config: HfvlmFLAVAConfig
    base_model_prefix = "flava"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0
    text_inputs = ("token_type_ids",)
    lora_recipe = "vision+text"  # no loss of this class depends on the multimodal encoder

    def __init__(self, config: HfvlmFLAVAConfig):
        super().__init__(config)
        self.vision_model = HfvlmFLAVAVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmFLAVATextModel._from_config(config.text_config)
        self.multimodal_model = HfvlmFLAVAMultimodalModel._from_config(config.multimodal_config)
        scale = config.logit_scale_init_value
        self.logit_scale = FixedTemperature(1.0) if scale is None else LogitScale(scale)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmFLAVAConfig) -> None:
        """Build what a head has next to the three encoders."""

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutputWithPooling:
        """Encode texts `(B, N)` together with images `(B, C, H, W)`, text i with image i.

        `last_hidden_state`, `(B, 1 + 1 + patches + N, D)`, are the multimodal encoder's class token, the image's
        tokens and the text's; `pooler_output`, `(B, D)`, is the first one pooled. Padding is attended to, too:
        pad texts to the 77 tokens of training, as the processor does.
        """
        image = self.vision_model(pixel_values, bool_masked_pos)
        text = self.text_model(input_ids, attention_mask)
        return self.multimodal_model(image.before_norm, text.before_norm, **kwargs)


class Classifier(nn.Module):
    """Linear layers with an activation and dropout between them."""

    def __init__(self, config: HfvlmFLAVAConfig):
        super().__init__()
        widths = [config.multimodal_config.hidden_size, *config.classifier_hidden_sizes, config.num_labels or 0]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.act = ACT2FN[config.classifier_act]
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (B, D) -> (B, num_labels)."""
        for i, layer in enumerate(self.layers):
            x = layer(self.dropout(self.act(x)) if i else x)
        return x


class HfvlmFLAVAForClassification(HfvlmFLAVAPreTrainedModel):
    """A classifier on the first token of images, of texts or of pairs of both, whichever the inputs are."""

    config: HfvlmFLAVAConfig
    base_model_prefix = "flava"
    input_modalities = ["image", "text"]

    def __init__(self, config: HfvlmFLAVAConfig):
        super().__init__(config)
        self.vision_model = HfvlmFLAVAVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmFLAVATextModel._from_config(config.text_config)
        self.multimodal_model = HfvlmFLAVAMultimodalModel._from_config(config.multimodal_config)
        for tower in (self.vision_model, self.text_model):
            tower.projection = nn.Identity()  # the first token is used before it enters the joint space
        self.classifier = Classifier(config)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> SequenceClassifierOutput:
        """Classify texts, images, or text i with image i -> logits `(B, num_labels)`.

        Args:
            input_ids: `(B, N)`, [CLS] first, padded on the right; with images, to the 77 tokens of training.
            pixel_values: `(B, C, H, W)`, normalised.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            token_type_ids: `(B, N)`; trained on type 0, the default.
            labels: `(B,)` or `(B, num_labels)`, for the loss that `config.problem_type` names.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs input_ids, pixel_values or both.")
        image = None if pixel_values is None else self.vision_model(pixel_values, **kwargs)
        text = None if input_ids is None else self.text_model(input_ids, attention_mask, token_type_ids, **kwargs)
        if image is not None and text is not None:
            last = self.multimodal_model(image.before_norm, text.before_norm, **kwargs)
        else:
            last = text if image is None else image
        logits = self.classifier(last.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=last.hidden_states, attentions=last.attentions
        )
