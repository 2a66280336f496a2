"""ViLBERT (https://arxiv.org/abs/1908.02265; https://github.com/facebookresearch/vilbert-multi-task at f22b84a).

The paper's figure 1: a BERT, a transformer over regions, and connections, in which each stream attends to the other.

With its configuration, pretraining and the heads of 17 tasks the architecture is longer than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import LAYER_ATTENTIONS, HfvlmPreTrainedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import select_states
from hfvlm.models.vilbert.configuration_vilbert import (
    HfvlmViLBERTConfig,
    HfvlmViLBERTTextConfig,
    HfvlmViLBERTVisionConfig,
)
from hfvlm.models.vilbert.embeddings_vilbert import RegionEmbedding, TaskEmbedding
from hfvlm.modules.embeddings import text_positions
from hfvlm.modules.transformer import Attention, PostNormLayer

# One folder serves several heads; each leaves unused what it has no part for.
PARTS = [
    r"^(vision_model|text_model|connections|vision_pooler|text_pooler)\.",
    r"^(lm|region|alignment|answer|gqa|pair|score|entailment|grounding|token)_head\.",
]
FUSIONS: dict[str, Any] = {"mul": torch.mul, "sum": torch.add}


@dataclass
class ViLBERTOutput(BaseModelOutputWithPooling):
    """A text and an image's regions, each encoded with the other.

    Args:
        last_hidden_state: `(B, N, D)`, the text; with a task token, which follows on [CLS], one longer than its ids.
        vision_last_hidden_state: `(B, R, E)`, the regions.
        pooler_output: `(B, F)`, both, of `config.connection_size` numbers.
        text_pooled: `(B, F)`.
        vision_pooled: `(B, F)`.
        text_model_output: the text stream: its `hidden_states` are the input of each layer, after the connection that
            comes before it, and the last layer's output; its `attentions` those of its own layers.
        vision_model_output: likewise, of the region stream.
        cross_attentions: of each connection, of the text to the regions, `(B, heads, N, R)`, and of the regions to the
            text, `(B, heads, R, N)`.
    """

    vision_last_hidden_state: Tensor | None = None
    text_pooled: Tensor | None = None
    vision_pooled: Tensor | None = None
    text_model_output: BaseModelOutput | None = None
    vision_model_output: BaseModelOutput | None = None
    cross_attentions: tuple[tuple[Tensor, Tensor], ...] | None = None


class StreamLayer(PostNormLayer):
    """A layer of BERT that also gives its attention's weights, where the implementation has them. That of a connection
    attends to the other stream's tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **kwargs: Any) -> Any:
        """(B, N, D), (B, 1, N, M) or None, (B, M, E) or None -> (B, N, D), weights."""
        attended, weights = self.attention(x, mask, context, **kwargs)
        x = self.attention_norm(x + self.dropout(attended))
        return self.mlp_norm(x + self.dropout(self.mlp(x))), weights


class Connection(GradientCheckpointingLayer):
    """Both streams attend to each other's tokens as they were before."""

    def __init__(self, config: HfvlmViLBERTConfig):
        super().__init__()
        words, regions = config.text_config, config.vision_config
        self.text = StreamLayer(words, self.attention(config, words, regions))
        self.vision = StreamLayer(regions, self.attention(config, regions, words))

    @staticmethod
    def attention(config: HfvlmViLBERTConfig, reader: Any, source: Any) -> Attention:
        """Make one stream's attention to the other; its dropout is that of the stream that is read."""
        return Attention(
            source,
            source.hidden_size,
            reader.hidden_size,
            config.connection_size,
            config.num_connection_heads,
            reader.hidden_size,
        )

    def forward(
        self, text: Tensor, regions: Tensor, text_mask: Tensor | None, region_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
        """(B, N, D), (B, R, E), (B, 1, R, N) or None, (B, 1, N, R) or None -> the first two, and weights."""
        words, to_regions = self.text(text, region_mask, regions, **kwargs)
        regions, to_words = self.vision(regions, text_mask, text, **kwargs)
        return words, regions, (to_regions, to_words)


class Pooler(nn.Linear):
    """The first token, projected, without what is negative."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, N, D) -> (B, F)."""
        return super().forward(x[:, 0]).relu()


class HfvlmViLBERTPreTrainedModel(HfvlmPreTrainedModel):
    """Base of all classes."""

    _no_split_modules = ["StreamLayer", "Connection", "TaskEmbedding"]
    _keys_to_ignore_on_load_unexpected = PARTS
    _can_record_outputs = {"hidden_states": StreamLayer, "attentions": LAYER_ATTENTIONS}


class Stream(HfvlmViLBERTPreTrainedModel):
    """Base of the two streams: embeddings and layers, between which the whole model puts its connections."""

    embeddings: Any
    layers: nn.ModuleList

    def mask(self, x: Tensor, attention_mask: Tensor | None, queries: Tensor | None = None) -> Tensor | None:
        """Make the mask of attention to `x`, `(B, N, D)`, of its own tokens or of others, `(B, M, E)`.

        A row without any token is attended to as if it had no padding, as with the finite masks of the original.
        """
        if attention_mask is None:
            return None
        attention_mask = attention_mask.bool()
        attention_mask = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
        embeds = {"inputs_embeds": x if queries is None else queries, "encoder_hidden_states": x}
        return create_bidirectional_mask(config=self.config, attention_mask=attention_mask, **embeds)

    def run(self, x: Tensor, mask: Tensor | None, layers: slice, record: Any = None, **kwargs: Any) -> Tensor:
        """Apply some of the layers: `(B, N, D)` -> the same; a `record` takes their inputs and their weights."""
        for layer in self.layers[layers]:
            if record is not None:
                record[0].append(x)
            x, weights = layer(x, mask, **kwargs)
            if record is not None:
                record[1].append(weights)
        return x


class HfvlmViLBERTTextModel(Stream):
    """The text stream: BERT. Without connections its layers see the text alone."""

    config: HfvlmViLBERTTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _input_embed_layer = "token"

    def __init__(self, config: HfvlmViLBERTTextConfig):
        super().__init__(config)
        self.embeddings = TaskEmbedding(config)
        self.layers = nn.ModuleList(StreamLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        task_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed `(B, N)` token ids -> `(B, N, D)` and their mask, both with the task's token."""
        positions = text_positions(input_ids, None, self.config.max_position_embeddings)
        x = self.embeddings(input_ids, positions, token_type_ids, task_ids)
        if attention_mask is not None and self.embeddings.task is not None:
            attention_mask = torch.cat([attention_mask[:, :1], attention_mask], dim=1)
        return x, attention_mask

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutput:
        """Encode `(B, N)` token ids, [CLS] first, padded on the right -> `(B, N, D)`; see `HfvlmViLBERTModel`."""
        x, attention_mask = self.embed(input_ids, attention_mask, token_type_ids, task_ids)
        x = self.run(x, self.mask(x, attention_mask), slice(None), **kwargs)
        return BaseModelOutput(last_hidden_state=x)


class HfvlmViLBERTVisionModel(Stream):
    """The region stream. Without connections its layers see the regions alone."""

    config: HfvlmViLBERTVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "region_features"
    input_modalities = ["image"]

    def __init__(self, config: HfvlmViLBERTVisionConfig):
        super().__init__(config)
        self.embeddings = RegionEmbedding(config)
        self.layers = nn.ModuleList(StreamLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.features

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        region_features: Tensor,
        region_locations: Tensor,
        region_mask: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutput:
        """Encode `(B, R, feature_size)` regions -> `(B, R, E)`; see `HfvlmViLBERTModel`."""
        x = self.embeddings(region_features, region_locations)
        x = self.run(x, self.mask(x, region_mask), slice(None), **kwargs)
        return BaseModelOutput(last_hidden_state=x)


class HfvlmViLBERTModel(HfvlmViLBERTPreTrainedModel):
    """Texts and images' regions, encoded together."""

    config: HfvlmViLBERTConfig
    base_model_prefix = "vilbert"
    input_modalities = ["image", "text"]
    # What its processor prepares.
    modalities = ("regions", "text")
    # Losses are means over a batch, and not over its counted tokens.
    accepts_loss_kwargs = False

    @property
    def further_towers(self) -> tuple[str, ...]:
        """What `hfvlm.lora` adapts next to the streams: their attention to each other."""
        return ("connections",) if len(self.connections) else ()

    def __init__(self, config: HfvlmViLBERTConfig):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.text_model = HfvlmViLBERTTextModel._from_config(text)
        self.vision_model = HfvlmViLBERTVisionModel._from_config(vision)
        self.connections = nn.ModuleList(Connection(config) for _ in config.text_connections)
        self.text_pooler = Pooler(text.hidden_size, config.connection_size)
        self.vision_pooler = Pooler(vision.hidden_size, config.connection_size)
        self.build_heads(config)
        self.post_init()

    def build_heads(self, config: HfvlmViLBERTConfig) -> None:
        """Build what a head has next to the two streams."""

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor,
        region_features: Tensor,
        region_locations: Tensor,
        attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ViLBERTOutput:
        """Encode text i together with the regions of image i.

        Args:
            input_ids: `(B, N)`, [CLS] first, padded on the right.
            region_features: `(B, R, feature_size)`, the mean of an image's regions first, padded on the right.
            region_locations: `(B, R, 5)`: left, top, right and bottom edge and area, in shares of the image's; the
                mean's are 0, 0, 1, 1 and 1.
            attention_mask: `(B, N)`, 0 for padding; by default there is none.
            region_mask: `(B, R)`, likewise.
            token_type_ids: `(B, N)`, by default 0.
            task_ids: `(B,)` or `(B, 1)`, numbers of tasks, of a model that has task tokens.
        """
        text, attention_mask = self.text_model.embed(input_ids, attention_mask, token_type_ids, task_ids)
        regions = self.vision_model.embeddings(region_features, region_locations)
        return self.encode(text, attention_mask, regions, region_mask, **kwargs)

    def encode(
        self, text: Tensor, text_mask: Tensor | None, regions: Tensor, region_mask: Tensor | None, **kwargs: Any
    ) -> ViLBERTOutput:
        """Run both streams over their embeddings: before each connection, the layers that come before it."""
        wanted = {name: kwargs.pop(f"output_{name}", None) for name in ("hidden_states", "attentions")}
        records: Any = [([], []), ([], [])] if any(wanted.values()) else [None, None]
        weights = []
        words, image = self.text_model, self.vision_model
        masks = words.mask(text, text_mask), image.mask(regions, region_mask)
        crossed = words.mask(text, text_mask, regions), image.mask(regions, region_mask, text)
        starts = zip([0, *self.config.text_connections], [0, *self.config.vision_connections], strict=True)
        ends = zip([*self.config.text_connections, None], [*self.config.vision_connections, None], strict=True)
        for i, ((t, v), (t_end, v_end)) in enumerate(zip(starts, ends, strict=True)):
            text = words.run(text, masks[0], slice(t, t_end), records[0], **kwargs)
            regions = image.run(regions, masks[1], slice(v, v_end), records[1], **kwargs)
            if i < len(self.connections):
                text, regions, seen = self.connections[i](text, regions, *crossed, **kwargs)
                weights.append(seen)
        pooled = self.text_pooler(text), self.vision_pooler(regions)
        return ViLBERTOutput(
            last_hidden_state=text,
            vision_last_hidden_state=regions,
            pooler_output=FUSIONS[self.config.fusion](*pooled),
            text_pooled=pooled[0],
            vision_pooled=pooled[1],
            text_model_output=recorded(text, records[0], **wanted),
            vision_model_output=recorded(regions, records[1], **wanted),
            cross_attentions=tuple(weights) if wanted["attentions"] else None,
        )


def recorded(
    last: Tensor,
    record: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    *,
    hidden_states: bool | int | Sequence[int] | None,
    attentions: bool | None,
) -> BaseModelOutput | None:
    """Return what a stream's layers computed, where it is wanted."""
    if record is None:
        return None
    return BaseModelOutput(
        last_hidden_state=last,
        hidden_states=select_states((*record[0], last), wanted=hidden_states),
        attentions=tuple(record[1]) if attentions else None,
    )
