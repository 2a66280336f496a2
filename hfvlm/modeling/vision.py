"""Bases of vision towers: what comes before their layers, and a classifier on what comes after them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.base import HfvlmPreTrainedModel, for_pooled, other_towers
from hfvlm.modeling.keywords import Keywords
from hfvlm.modules.dropout import PatchDropout
from hfvlm.modules.embeddings import PatchEmbedding
from hfvlm.modules.positions import BICUBIC, check_positions, resize_grid

# One edge, or height and width, in pixels.
ImageSize = int | tuple[int, int]


class VisionTower(HfvlmPreTrainedModel):
    """Base of towers over images."""

    base_model_prefix = "vision_model"
    _keys_to_ignore_on_load_unexpected = other_towers("vision_model")
    main_input_name = "pixel_values"
    input_modalities = ["image"]


class PatchTower(VisionTower):
    """Base of towers over patches, each with a learned position.

    A subclass builds its layers, norms and pooling, and calls `post_init`, in `__init__`; its forward begins with
    `embed`. Class attributes hold what the original's code decides.

    Attributes:
        patch_bias: whether the convolution that makes the patches has a bias.
        num_prefix_tokens: tokens before the patches, which have positions too.
        resize_rule: how the position table is resized, one of `hfvlm.modules.positions`.
    """

    patch_bias: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 0
    resize_rule: ClassVar[Mapping[str, Any]] = BICUBIC

    _input_embed_layer = "patches"

    config: Any

    def __init__(self, config: Any):
        super().__init__(config)
        rows, columns = self.position_grid
        self.patches = self.make_patches(config)
        self.position = nn.Parameter(torch.zeros(self.num_prefix_tokens + rows * columns, config.hidden_size))
        self.patch_dropout = PatchDropout(config.patch_dropout, prefix=self.num_prefix_tokens)

    def make_patches(self, config: Any) -> nn.Module:
        """Make the module that turns pixels into `(B, N, D)`."""
        return PatchEmbedding(config, bias=self.patch_bias)

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.config.grid

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.position, std=self.config.hidden_size**-0.5)

    def embed(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embed pixels `(B, C, H, W)` as the inputs of the layers, `(B, N, D)`.

        Args:
            pixel_values: normalised.
            interpolate_pos_encoding: take images of any size; the position table is resized to theirs.

        Raises:
            ValueError: there are more or fewer tokens than positions.
        """
        x = self.with_positions(
            self.patches(pixel_values), pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        return self.patch_dropout(x)

    def with_positions(self, patches: Tensor, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> Tensor:
        """Put the prefix before the patches `(B, N, D)` of `pixel_values`, and add the positions of both."""
        x = self.with_prefix(patches)
        position = self.positions_for(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        check_positions(x, position, pixel_values, self.config.image_size, self.main_input_name)
        return x + position

    def with_prefix(self, patches: Tensor) -> Tensor:
        """Put `num_prefix_tokens` tokens before the patches `(B, N, D)`."""
        return patches

    def positions_for(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool) -> Tensor:
        """Return the position table for images `(..., H, W)`."""
        height, width = pixel_values.shape[-2:]
        return self.resized(self.patch_grid(height, width)) if interpolate_pos_encoding else self.position

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Count rows and columns of the patches of an image."""
        return height // self.config.patch_size, width // self.config.patch_size

    def resized(self, grid: tuple[int, int]) -> Tensor:
        """Resize the position table to rows and columns of patches."""
        return resize_grid(self.position, self.position_grid, grid, **self.resize_rule)

    @torch.no_grad()
    def resize_positions(self, image_size: ImageSize) -> None:
        """Change the image size, one edge or (height, width), and with it the position table for good."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.position = nn.Parameter(self.resized(self.patch_grid(height, width)))
        self.config.image_size = image_size


class ClassTokenTower(PatchTower):
    """Base of towers over patches with a class token before them."""

    num_prefix_tokens = 1

    def __init__(self, config: Any):
        super().__init__(config)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.class_token, std=self.config.hidden_size**-0.5)
        super().init_own_weights(std)

    def with_prefix(self, patches: Tensor) -> Tensor:
        return torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], dim=1)


class ImageClassifier(HfvlmPreTrainedModel):
    """A linear layer on the pooled output of a model's vision tower; its other towers are not built."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    # Of a whole model the tower alone is read.
    _keys_to_ignore_on_load_unexpected = [r"^(?!vision_model\.|classifier\.)", r"^vision_model\.projection\."]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.vision_config is None:
            raise ValueError(f"{type(self).__name__}: the model has no tower of images (vision_config).")
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.leave_out()
        self.classifier = nn.Linear(config.vision_config.pooled_size, config.num_labels or 0)
        self.post_init()

    def leave_out(self) -> None:
        """Take out of the tower what only embeddings need: the pooled output is used before it enters their space."""
        self.vision_model.projection = nn.Identity()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> ImageClassifierOutput:
        """`(B, C, H, W)` -> logits `(B, num_labels)` and, for `labels`, the loss that `config.problem_type` names."""
        vision = self.vision_model(pixel_values, **for_pooled(self.vision_model, dict(kwargs)))
        logits = self.classifier(self.pooled(vision))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=vision.hidden_states, attentions=vision.attentions
        )

    def pooled(self, vision: Any) -> Tensor:
        """Return what the last layer takes of the tower's output, `(B, pooled_size)`."""
        return vision.pooler_output


class PatchClassifier(ImageClassifier):
    """A linear layer on the mean of the patches, of a tower that pools none."""

    def leave_out(self) -> None:
        """Leave the tower as it is: it ends with its patches."""

    def pooled(self, vision: Any) -> Tensor:
        return vision.last_hidden_state.mean(dim=1)
