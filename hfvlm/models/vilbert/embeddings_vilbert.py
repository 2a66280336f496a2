"""What enters ViLBERT's streams: words, with the token of a task, and regions."""

import torch
from torch import Tensor, nn

from hfvlm.models.vilbert.configuration_vilbert import HfvlmViLBERTTextConfig, HfvlmViLBERTVisionConfig
from hfvlm.modules.embeddings import BertEmbedding

# Edges of a region and its area, in shares of the image's.
LOCATION_SIZE = 5


class TaskEmbedding(BertEmbedding):
    """BERT's, with a task's token after the first, which has neither a position nor a type."""

    def __init__(self, config: HfvlmViLBERTTextConfig):
        super().__init__(config)
        self.task = None if config.num_tasks is None else nn.Embedding(config.num_tasks, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, N), (1, N), (B, N), (B,) or (B, 1) -> (B, N, D), or (B, N + 1, D) with a task's token."""
        if self.task is None:
            if task_ids is not None:
                raise ValueError("task_ids: this model has no task tokens (num_tasks is None in text_config).")
            return super().forward(input_ids, position_ids, token_type_ids)
        if task_ids is None:
            raise ValueError("task_ids are missing: this model's text has a token of the task after its first.")
        x = self.token(input_ids) + self.position[position_ids]
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        x = torch.cat([x[:, :1], self.task(task_ids.reshape(-1, 1)), x[:, 1:]], dim=1)
        return self.dropout(self.norm(x))


class RegionEmbedding(nn.Module):
    """(B, R, features), (B, R, 5) -> (B, R, E): features plus locations, both projected; then a norm."""

    def __init__(self, config: HfvlmViLBERTVisionConfig):
        super().__init__()
        self.features = nn.Linear(config.feature_size, config.hidden_size)
        self.locations = nn.Linear(LOCATION_SIZE, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, region_features: Tensor, region_locations: Tensor) -> Tensor:
        dtype = self.features.weight.dtype
        x = self.features(region_features.to(dtype)) + self.locations(region_locations.to(dtype))
        return self.dropout(self.norm(x))
