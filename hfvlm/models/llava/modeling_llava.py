"""LLaVA v1, v1.5 and v1.6 (https://arxiv.org/abs/2304.08485, 2310.03744; github.com/haotian-liu/LLaVA at c121f04)."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.llava.anyres import Size, unpadded
from hfvlm.models.llava.configuration_llava import HfvlmLLaVAConfig
from hfvlm.modules.projection import Projector


class Newline(nn.Module):
    """A learned vector at the end of each row of a picture."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., N, D) -> (..., N + 1, D)."""
        return torch.cat([rows, self.weight.to(rows).expand(*rows.shape[:-2], 1, -1)], dim=-2)


class HfvlmLLaVAForConditionalGeneration(ImageTextModel):
    """A language model that reads the patches of pictures through a projector."""

    config: HfvlmLLaVAConfig
    media_inputs = {"image": ("pixel_values", "image_sizes")}

    projector: Any

    def __init__(self, config: HfvlmLLaVAConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = HfvlmCLIPVisionModel._from_config(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, width, config.projector_depth)
        if config.patch_merge == "spatial_unpad":
            self.projector.newline = Newline(width)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_unread()

    @property
    def unread_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unread(self.config.vision_feature_layer)]

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], image_sizes: Any = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Pictures -> an output whose `pooler_output` has one `(tokens, hidden_size)` tensor a picture.

        Args:
            pixel_values: `(pictures, 3, H, W)`; or the views of all pictures, `(views, 3, H, W)`, with `image_sizes`:
                of each the whole picture first, then its tiles, row by row. Also `(pictures, views, 3, H, W)`, padded
                at the end, or a list with each picture's views.
            image_sizes: `(pictures, 2)`, height and width in pixels before anything was done to them.
        """
        sizes = None if image_sizes is None else [(int(height), int(width)) for height, width in image_sizes]
        views = self.views(pixel_values, sizes)
        # Layers after the one that is read are not computed.
        vision = self.vision_model(torch.cat(views), until=self.config.vision_feature_layer, **kwargs)
        tokens = vision.last_hidden_state if self.config.keep_class_token else vision.last_hidden_state[:, 1:]
        parts = self.projector(tokens).split([view.shape[0] for view in views])
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 4 and sizes is None:
            return media_features(vision, (part[0] for part in parts))
        sized: Sequence[Size | None] = sizes or [None] * len(parts)
        return media_features(vision, (self.merge(part, size) for part, size in zip(parts, sized, strict=True)))

    def views(self, pixel_values: Tensor | Sequence[Tensor], sizes: list[Size] | None) -> list[Tensor]:
        """The views of each picture, (V, 3, H, W)."""
        if not isinstance(pixel_values, Tensor):
            return [picture[None] if picture.ndim == 3 else picture for picture in pixel_values]
        if sizes is None or self.config.grid_pinpoints is None:
            return list(pixel_values.split(1)) if pixel_values.ndim == 4 else list(pixel_values)
        counts = [1 + rows * columns for rows, columns in map(self.config.tiling.tiles, sizes)]
        if pixel_values.ndim == 5:
            return [picture[:count] for picture, count in zip(pixel_values, counts, strict=True)]
        if sum(counts) != len(pixel_values):
            raise ValueError(
                f"pixel_values hold {len(pixel_values)} views, but pictures of the sizes {sizes} have {sum(counts)} "
                f"by config.grid_pinpoints {self.config.grid_pinpoints}: the processor's must be the same."
            )
        return list(pixel_values.split(counts))

    def merge(self, views: Tensor, size: Size | None) -> Tensor:
        """The views of one picture, (V, N, D), as one sequence (tokens, D): the whole picture, then its tiles."""
        if self.config.patch_merge == "flat":
            return views.flatten(0, 1)
        whole, rest = views[0], views[1:]
        if len(rest) == 0:
            return self.end_rows(whole)
        if size is None or self.config.grid_pinpoints is None:
            raise ValueError(
                "Tiles are arranged by image_sizes and config.grid_pinpoints, and one of them is missing."
            )
        down, across = self.config.tiling.tiles(size)
        edge = self.config.tiling.edge
        picture = rest.unflatten(1, (edge, edge)).unflatten(0, (down, across))
        # (down, across, rows, columns, D) -> rows of patches across the whole picture
        picture = picture.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        if self.config.patch_merge == "spatial_unpad":
            picture = picture[unpadded(size, picture.shape[:2])]
        return torch.cat([whole, self.end_rows(picture).flatten(0, -2)])

    def end_rows(self, rows: Tensor) -> Tensor:
        return self.projector.newline(rows) if self.config.patch_merge == "spatial_unpad" else rows

    def token_count_fields(self) -> str:
        fields = ("vision_feature_layer", "keep_class_token", "grid_pinpoints", "patch_merge")
        own = (f"{name} {getattr(self.config, name)}" for name in fields[1:])
        return f"{super().token_count_fields()}, {', '.join(own)}"
