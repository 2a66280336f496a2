"""LLaVA v1, v1.5 and v1.6 (https://arxiv.org/abs/2304.08485, 2310.03744; github.com/haotian-liu/LLaVA at c121f04)."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ProjectedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.scoring import TextScorer
from hfvlm.models.llava.anyres import Size, Tiling, unpadded
from hfvlm.models.llava.configuration_llava import HfvlmLLaVAConfig
from hfvlm.modules.projection import Projector


class FlatProjector(Projector):
    """A projector after which the views of an image follow one on the other."""

    def join(self, views: Tensor, tiling: Tiling, size: Size | None) -> Tensor:
        """Join the views of one image, (V, N, D), to one sequence (tokens, D)."""
        return views.flatten(0, 1)


class SpatialProjector(FlatProjector):
    """A projector after which the whole image is followed by its tiles, row by row of patches across all of them."""

    def join(self, views: Tensor, tiling: Tiling, size: Size | None) -> Tensor:
        whole, rest = views[0], views[1:]
        if len(rest) == 0:
            return self.end_rows(whole)
        if size is None or tiling.pinpoints is None:
            raise ValueError(
                "Tiles are arranged by image_sizes and config.grid_pinpoints, and one of them is missing."
            )
        down, across = tiling.tiles(size)
        image = rest.unflatten(1, (tiling.edge, tiling.edge)).unflatten(0, (down, across))
        # (down, across, rows, columns, D) -> rows of patches across the whole image
        image = image.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return torch.cat([whole, self.end_rows(self.trim(image, size)).flatten(0, -2)])

    def trim(self, image: Tensor, size: Size) -> Tensor:
        return image

    def end_rows(self, rows: Tensor) -> Tensor:
        return rows


class UnpaddedProjector(SpatialProjector):
    """Likewise, without the tiles' padding, and with a learned vector at the end of each row."""

    def __init__(self, in_size: int, out_size: int, depth: int):
        super().__init__(in_size, out_size, depth)
        self.newline = Newline(out_size)

    def trim(self, image: Tensor, size: Size) -> Tensor:
        return image[unpadded(size, (image.shape[0], image.shape[1]))]

    def end_rows(self, rows: Tensor) -> Tensor:
        return self.newline(rows)


PROJECTORS = {"flat": FlatProjector, "spatial": SpatialProjector, "spatial_unpad": UnpaddedProjector}


class Newline(nn.Module):
    """A learned vector at the end of each row of an image."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, rows: Tensor) -> Tensor:
        """Append the vector to each row, (..., N, D) -> (..., N + 1, D)."""
        return torch.cat([rows, self.weight.to(rows).expand(*rows.shape[:-2], 1, -1)], dim=-2)


class HfvlmLLaVAForConditionalGeneration(ProjectedModel):
    """A language model that attends to the patches of images through a projector."""

    config: HfvlmLLaVAConfig
    media_inputs = {"image": ("pixel_values", "image_sizes")}

    def build_projector(self, config: Any) -> Projector:
        return PROJECTORS[config.patch_merge](
            config.vision_config.hidden_size, config.text_config.hidden_size, config.projector_depth
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], image_sizes: Any = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Project images to an output whose `pooler_output` has one `(tokens, hidden_size)` tensor an image.

        Args:
            pixel_values: `(images, 3, H, W)`; or the views of all images, `(views, 3, H, W)`, with `image_sizes`: of
                each the whole image first, then its tiles, row by row. Also `(images, views, 3, H, W)`, padded at the
                end, or a list with each image's views.
            image_sizes: `(images, 2)`, height and width in pixels before anything was done to them.
        """
        sizes = None if image_sizes is None else [(int(height), int(width)) for height, width in image_sizes]
        views = self.views(pixel_values, sizes)
        # Layers after the one that is projected are not computed.
        vision = self.vision_model(torch.cat(views), until=self.config.vision_feature_layer, **kwargs)
        tokens = vision.last_hidden_state[:, 1 - self.config.keep_class_token :]
        parts = self.projector(tokens).split([view.shape[0] for view in views])
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 4 and sizes is None:
            return media_features(vision, (part[0] for part in parts))
        sized: Sequence[Size | None] = sizes or [None] * len(parts)
        tiling, join = self.config.tiling, self.projector.join
        return media_features(vision, (join(part, tiling, size) for part, size in zip(parts, sized, strict=True)))

    def views(self, pixel_values: Tensor | Sequence[Tensor], sizes: list[Size] | None) -> list[Tensor]:
        """Return the views of each image, (V, 3, H, W)."""
        if not isinstance(pixel_values, Tensor):
            return [image[None] if image.ndim == 3 else image for image in pixel_values]
        if sizes is None or self.config.grid_pinpoints is None:
            return list(pixel_values.split(1)) if pixel_values.ndim == 4 else list(pixel_values)
        counts = [1 + rows * columns for rows, columns in map(self.config.tiling.tiles, sizes)]
        if pixel_values.ndim == 5:
            return [image[:count] for image, count in zip(pixel_values, counts, strict=True)]
        if sum(counts) != pixel_values.shape[0]:
            raise ValueError(
                f"pixel_values hold {pixel_values.shape[0]} views, but images of the sizes {sizes} have {sum(counts)} "
                f"by config.grid_pinpoints {self.config.grid_pinpoints}: the processor's must be the same."
            )
        return list(pixel_values.split(counts))


class HfvlmLLaVAForSequenceClassification(TextScorer, HfvlmLLaVAForConditionalGeneration):
    """A reward, or other scores, of answers about images."""
