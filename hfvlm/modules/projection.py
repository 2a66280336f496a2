"""The last step into the joint space, or into a language model."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init


class Projection(nn.Linear):
    """Pooled vector to joint embedding."""

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)


def projection(config: PreTrainedConfig, *, bias: bool = False) -> nn.Module:
    """Make a tower's projection to its `projection_dim`; without one the pooled vector is the embedding."""
    if config.projection_dim is None:
        return nn.Identity()
    return Projection(config.hidden_size, config.projection_dim, bias=bias)


class DeepProjection(nn.Module):
    """Pooled vector to joint embedding in two layers with GELU between them, of which the second has no bias."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, *, bias: bool):
        super().__init__()
        self.fc1 = Projection(in_size, hidden_size, bias=bias)
        self.fc2 = Projection(hidden_size, out_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_size) -> (B, out_size)."""
        return self.fc2(F.gelu(self.fc1(x)))


def projection_head(config: PreTrainedConfig) -> nn.Module:
    """Do as `projection`; in two layers, where there is a `projection_hidden_size`. The first may have a bias."""
    if config.projection_dim is None or config.projection_hidden_size is None:
        return projection(config, bias=config.projection_bias)
    sizes = config.hidden_size, config.projection_hidden_size, config.projection_dim
    return DeepProjection(*sizes, bias=config.projection_bias)


class Bridge(nn.Module):
    """What stands between a tower and a language model. LoRA recipes train it in full, as "projection"."""


class Projector(Bridge):
    """An image's features at the width of the language model: `depth` linear layers with GELU between them.

    One layer is LLaVA's, two are LLaVA-1.5's; without any the features stay as they are.
    """

    def __init__(self, in_size: int, out_size: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(out_size if i else in_size, out_size) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_size) -> (..., out_size)."""
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return x
