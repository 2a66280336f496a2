"""FLAVA (https://arxiv.org/abs/2112.04482; https://github.com/facebookresearch/multimodal at 3c2a85a).

The paper's figure 2: an image encoder, a text encoder, and a multimodal encoder over the tokens of both. The first two
alone are a dual encoder.
"""

from dataclasses import dataclass
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
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.models.flava.configuration_flava import (
    HfvlmFLAVAConfig,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVATextConfig,
    HfvlmFLAVAVisionConfig,
)
from hfvlm.modules.embeddings import BertEmbedding, PatchEmbedding, padded_positions, text_positions
from hfvlm.modules.pooling import first_token
from hfvlm.modules.positions import check_positions
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import FixedTemperature, LogitScale
from hfvlm.modules.transformer import MLP, PreNormLayer, Stack

# One folder serves several heads; each leaves unread what it has no part for.
PARTS = [
    r"^(vision_model|text_model|multimodal_model|codebook_model|classifier|logit_scale)\.",
    r"^(mim|mlm|mmm_image|mmm_text|itm)_head\.",
]


@dataclass
class FLAVATowerOutput(TowerOutput):
    """What one of the encoders makes of its tokens.

    Args:
        before_norm: `(B, N, D)`, the tokens before the last norm, which the multimodal encoder reads.
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

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, **kwargs)[0])
        return x + self.mlp(self.mlp_norm(x))


class Pooler(nn.Linear):
    """The first token's summary: BERT's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return super().forward(x[:, 0]).tanh()


class HfvlmFLAVAPreTrainedModel(HfvlmPreTrainedModel):
    """What all classes share."""

    _no_split_modules = ["DroppedLayer"]
    _keys_to_ignore_on_load_unexpected = PARTS
    _can_record_outputs = {"hidden_states": DroppedLayer, "attentions": LAYER_ATTENTIONS}


class HfvlmFLAVAVisionModel(HfvlmFLAVAPreTrainedModel):
    """The image encoder: a vision transformer, some of whose patches may be hidden."""

    config: HfvlmFLAVAVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: HfvlmFLAVAVisionConfig):
        super().__init__(config)
        rows, columns = config.grid
        self.patches = PatchEmbedding(config)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size)) if config.mask_token else None
        self.position = nn.Parameter(torch.zeros(1 + rows * columns, config.hidden_size))
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

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

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
        """`(B, C, H, W)` normalised pixels -> all tokens after the last norm, class token first, and the summaries.

        Args:
            pixel_values: of the size that `config.image_size` says.
            bool_masked_pos: `(B, H/p, W/p)` or `(B, H/p * W/p)`, other than 0 for the patches that are hidden.
            interpolate_pos_encoding: take pictures of any size; the position table is resized to it.
        """
        x = self.patches(pixel_values)
        if bool_masked_pos is not None:
            x = self.hide(x, bool_masked_pos)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        position = self.position_for(pixel_values) if interpolate_pos_encoding else self.position
        check_positions(x, position, pixel_values, self.config.image_size)
        before = self.layers(self.dropout(x + position), **kwargs)
        x = self.post_norm(before)
        embeds = self.projection(x[:, 0])
        return FLAVATowerOutput(last_hidden_state=x, pooler_output=self.summary(x), embeds=embeds, before_norm=before)

    def hide(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """`(B, N, D)` with the mask token in the place of each hidden patch."""
        if self.mask_token is None:
            raise ValueError("bool_masked_pos: this model has no mask token (mask_token is off in vision_config).")
        if hidden.flatten(1).shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos is {tuple(hidden.shape)}, but there are {patches.shape[1]} patches in each of "
                f"{patches.shape[0]} pictures."
            )
        return torch.where(hidden.flatten(1).bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def position_for(self, pixel_values: Tensor) -> Tensor:
        """The position table for pictures of another size.

        The original asks for a tenth of a row and of a column too much, lest rounding should lose one, and samples by
        these factors.
        """
        grid, wanted = self.config.grid, [edge // self.config.patch_size for edge in pixel_values.shape[-2:]]
        if wanted == list(grid):
            return self.position
        factors = [(new + 0.1) / old for new, old in zip(wanted, grid, strict=True)]
        table = self.position[1:].float().unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)[0].flatten(1).t()
        return torch.cat([self.position[:1], resized.to(self.position.dtype)])


class HfvlmFLAVATextModel(HfvlmFLAVAPreTrainedModel):
    """The text encoder: BERT's embeddings, and layers that normalise first."""

    config: HfvlmFLAVATextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _input_embed_layer = "token"

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
        """`(B, N)` token ids, [CLS] first -> all tokens after the last norm, and the first one's summaries.

        Args:
            input_ids: padded on the right.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            token_type_ids: `(B, N)`; trained on type 0 alone, the default.
        """
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        positions = text_positions(input_ids, None, self.config.max_position_embeddings)
        if attention_mask is not None:
            positions = padded_positions(attention_mask)
        x = self.embeddings(input_ids, positions, token_type_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        before = self.layers(x, mask, **kwargs)
        x = self.post_norm(before)
        first = first_token(x, attention_mask)
        pooled, embeds = self.summary(first.unsqueeze(1)), self.projection(first)
        return FLAVATowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=embeds, before_norm=before)


class HfvlmFLAVAMultimodalModel(HfvlmFLAVAPreTrainedModel):
    """The multimodal encoder: a class token of its own, then a picture's tokens, then a text's."""

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
        """`before_norm` of both encoders, `(B, M, D)` and `(B, N, E)` -> `(B, 1 + M + N, F)`, and the first's summary.

        Trained on texts that were padded to 77 tokens, without a mask: padding is read like other tokens.
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
    """Pictures and texts in one space, and texts read together with pictures."""

    config: HfvlmFLAVAConfig
    base_model_prefix = "flava"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0
    lora_recipe = "vision+text"  # no loss of this class reads the multimodal encoder

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
        """What a head has beside the three encoders."""

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutputWithPooling:
        """Texts `(B, N)` read together with pictures `(B, C, H, W)`, text i with picture i.

        `last_hidden_state`, `(B, 1 + 1 + patches + N, D)`, are the multimodal encoder's class token, the picture's
        tokens and the text's; `pooler_output`, `(B, D)`, is the first one's summary. The tokens of padding are read
        too: pad texts to the 77 tokens of training, as the processor does.
        """
        image = self.vision_model(pixel_values, bool_masked_pos)
        text = self.text_model(input_ids, attention_mask)
        return self.multimodal_model(image.before_norm, text.before_norm, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Every text against every picture; with `return_loss`, text i must belong to picture i.

        Args:
            input_ids: `(T, N)`, [CLS] first, padded on the right.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, 0 for padding; by default for every `pad_token_id`.
            token_type_ids: `(T, N)`; trained on type 0 alone, the default.
            return_loss: also compute the contrastive loss of the batch.
            interpolate_pos_encoding: take pictures of any size.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask, token_type_ids=token_type_ids, **kwargs)
        return self.compare(image, text, return_loss=return_loss)


class Classifier(nn.Module):
    """Linear layers with an activation and dropout between them."""

    def __init__(self, config: HfvlmFLAVAConfig):
        super().__init__()
        widths = [config.multimodal_config.hidden_size, *config.classifier_hidden_sizes, config.num_labels or 0]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.act = ACT2FN[config.classifier_act]
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, num_labels)."""
        for i, layer in enumerate(self.layers):
            x = layer(self.dropout(self.act(x)) if i else x)
        return x


class HfvlmFLAVAForClassification(HfvlmFLAVAPreTrainedModel):
    """A classifier on the first token: of pictures, of texts or of pairs of both, by what it is given."""

    config: HfvlmFLAVAConfig
    base_model_prefix = "flava"
    input_modalities = ["image", "text"]

    def __init__(self, config: HfvlmFLAVAConfig):
        super().__init__(config)
        self.vision_model = HfvlmFLAVAVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmFLAVATextModel._from_config(config.text_config)
        self.multimodal_model = HfvlmFLAVAMultimodalModel._from_config(config.multimodal_config)
        for tower in (self.vision_model, self.text_model):
            tower.projection = nn.Identity()  # the first token is read before it enters the joint space
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
        """Texts, pictures, or text i with picture i -> logits `(B, num_labels)`.

        Args:
            input_ids: `(B, N)`, [CLS] first, padded on the right; with pictures, to the 77 tokens of training.
            pixel_values: `(B, C, H, W)`, normalised.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            token_type_ids: `(B, N)`; trained on type 0 alone, the default.
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
