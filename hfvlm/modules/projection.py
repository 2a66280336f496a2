"""The last step into the joint space."""

from torch import nn
from transformers import initialization as init

from hfvlm.configuration import TowerConfig


class Projection(nn.Linear):
    """Pooled vector to joint embedding."""

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)


def projection(config: TowerConfig, *, bias: bool = False) -> nn.Module:
    """For a tower whose config says a `projection_dim`; without one the pooled vector is the embedding."""
    if config.projection_dim is None:
        return nn.Identity()
    return Projection(config.hidden_size, config.projection_dim, bias=bias)
