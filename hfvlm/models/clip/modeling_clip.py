"""CLIP (https://arxiv.org/abs/2103.00020; https://github.com/openai/CLIP at d05afc4)."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.losses import contrastive_loss
from hfvlm.modeling.base import DualEncoder, HfvlmPreTrainedModel, as_features, other_towers
from hfvlm.modeling.compat import causal_mask
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.modeling.vision import ClassTokenTower, ImageClassifier
from hfvlm.models.clip.configuration_clip import HfvlmCLIPConfig, HfvlmCLIPTextConfig, HfvlmCLIPVisionConfig
from hfvlm.modules.embeddings import TokenEmbedding
from hfvlm.modules.pooling import end_of_text
from hfvlm.modules.positions import resize_line
from hfvlm.modules.projection import projection
from hfvlm.modules.similarity import LogitScale
from hfvlm.modules.transformer import GroundingLayer, PreNormLayer, Stack


class HfvlmCLIPPreTrainedModel(HfvlmPreTrainedModel):
    """Initialises the layers as the paper's code does: residual branches shrink with depth."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PreNormLayer | GroundingLayer):
            width, depth = self.config.hidden_size, self.config.num_hidden_layers
            for projection in (module.attention.q_proj, module.attention.k_proj, module.attention.v_proj):
                init.normal_(projection.weight, std=width**-0.5)
            init.normal_(module.mlp.fc1.weight, std=(2 * width) ** -0.5)
            for projection in (module.attention.out_proj, module.mlp.fc2):
                init.normal_(projection.weight, std=(2 * width * depth) ** -0.5)


class HfvlmCLIPVisionModel(ClassTokenTower, HfvlmCLIPPreTrainedModel):
    """A vision transformer that reads its class token."""

    config: HfvlmCLIPVisionConfig
    patch_bias = False

    def __init__(self, config: HfvlmCLIPVisionConfig):
        super().__init__(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        """`(B, C, H, W)` normalised pixels -> all tokens before the last norm, class token first, and the summary.

        With `interpolate_pos_encoding`, pictures may have any size; the position table is resized to it. With `until`,
        the tokens are `hidden_states[until]`, and nothing is computed that comes after them: there is no summary.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        depth = None if until is None else self.layers.depth_of(until)
        x = self.layers(self.pre_norm(x), depth=depth, **kwargs)
        if until is not None:
            return TowerOutput(last_hidden_state=x)
        pooled = self.post_norm(x[:, 0])
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))

    def unread(self, until: int) -> list[str]:
        """Names of the modules that `hidden_states[until]` does not depend on."""
        depth = self.layers.depth_of(until)
        return [*(f"layers.{i}" for i in range(depth, len(self.layers))), "post_norm", "projection"]


class HfvlmCLIPTextModel(HfvlmCLIPPreTrainedModel):
    """A causal transformer that reads its end-of-text token."""

    config: HfvlmCLIPTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = other_towers("text_model")
    input_modalities = ["text"]
    _input_embed_layer = "token"

    def __init__(self, config: HfvlmCLIPTextConfig):
        super().__init__(config)
        self.embeddings = TokenEmbedding(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = projection(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> TowerOutput:
        """`(B, N)` token ids -> all tokens after the last norm, and the pooled output.

        Trained without a padding mask: padding follows the end-of-text token, so causal attention never sees it. With
        an `attention_mask`, `(B, N)`, 0 for padding, it may come before the text as well.
        """
        x = self.embeddings(input_ids, attention_mask)
        mask = causal_mask(self.config, x, attention_mask)
        x = self.post_norm(self.layers(x, mask, **kwargs | {"is_causal": True}))
        ends = end_of_text(input_ids, self.config.eos_token_id, attention_mask)
        pooled = x[torch.arange(x.shape[0], device=x.device), ends]
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, embeds=self.projection(pooled))


class HfvlmCLIPModel(DualEncoder):
    """Pictures and texts in one space."""

    config: HfvlmCLIPConfig
    base_model_prefix = "clip"
    pair_loss = staticmethod(contrastive_loss)
    max_logit_scale = 100.0

    def __init__(self, config: HfvlmCLIPConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The embedding of each text; `last_hidden_state` is zero after a text's own end.

        Nothing after the batch's last end-of-text token can change an embedding, and it is not computed, unless hidden
        states or attentions are asked for.
        """
        ends = end_of_text(input_ids, self.text_model.config.eos_token_id, attention_mask)
        length = input_ids.shape[1]
        flags = ("output_hidden_states", "output_attentions")
        wanted = any(kwargs.get(flag) or getattr(self.text_model.config, flag, False) for flag in flags)
        computed = length if wanted or torch.compiler.is_compiling() else int(ends.max()) + 1
        mask = None if attention_mask is None else attention_mask[:, :computed]
        output = self.text_model(input_ids[:, :computed], mask, **kwargs)
        unread = torch.arange(computed, device=ends.device) > ends.unsqueeze(-1)
        tokens = output.last_hidden_state.masked_fill(unread.unsqueeze(-1), 0)
        output.last_hidden_state = F.pad(tokens, (0, 0, 0, length - computed))
        return as_features(output)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Every text against every picture; with `return_loss`, text i must belong to picture i.

        Args:
            input_ids: `(T, N)`, padded on the right, or, with an `attention_mask`, on either side.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, may be left out.
            return_loss: also compute the contrastive loss of the batch.
            interpolate_pos_encoding: take pictures of any size.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.encode_text(input_ids, attention_mask, **kwargs)
        return self.compare(image, text, return_loss=return_loss)

    def resize_positions(
        self, image_size: int | tuple[int, int] | None = None, context_length: int | None = None
    ) -> None:
        """Change the picture size or the number of text positions for good, as open_clip does when it loads a file.

        Raises:
            ValueError: a picture size for a ResNet, whose positions open_clip never resizes.
        """
        vision, text = self.vision_model, self.text_model
        if image_size is not None:
            if not isinstance(vision, HfvlmCLIPVisionModel):
                raise ValueError("A ResNet keeps its picture size; pass interpolate_pos_encoding=True for others.")
            vision.resize_positions(image_size)
        if context_length is not None:
            text.embeddings.position = nn.Parameter(resize_line(text.embeddings.position.data, context_length))
            text.config.max_position_embeddings = context_length


class HfvlmCLIPForImageClassification(ImageClassifier):
    """A linear layer on what the vision tower says before its projection, as in the paper's linear probes."""

    config: HfvlmCLIPConfig
    base_model_prefix = "clip"
