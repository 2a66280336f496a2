"""LLaVA's sizes. Defaults are those of LLaVA-1.5 7B."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from hfvlm.configuration import HfvlmConfig, SubConfig
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.anyres import Tiling


def openai_vision_config(image_size: int = 336) -> HfvlmCLIPVisionConfig:
    """Return CLIP's ViT-L/14, without its projection."""
    return HfvlmCLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=None,
    )


@strict
class ProjectedConfig(HfvlmConfig):
    """Base of models whose language model attends to the patches of CLIP's tower, through a projector.

    Args:
        vision_config: of the CLIP tower.
        text_config: of any language model of transformers.
        vision_feature_layer: which of the tower's hidden states is projected; -2 is the output of the last layer but
            one.
    """

    sub_configs = {"vision_config": HfvlmCLIPVisionConfig, "text_config": LlamaConfig}
    projector_depth = 1

    vision_config: SubConfig[HfvlmCLIPVisionConfig] = field(default_factory=openai_vision_config)
    text_config: SubConfig[Any] = field(default_factory=LlamaConfig)
    vision_feature_layer: int = -2

    def validate_projector(self) -> None:
        vision, text = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.projector_depth == 0 and vision != text:
            raise ValueError(
                f"projector_depth is 0, but vision_config.hidden_size {vision} is not text_config.hidden_size {text}."
            )

    def validate_layer(self) -> None:
        self.vision_config.check_layer(self.vision_feature_layer)


@strict
class HfvlmLLaVAConfig(ProjectedConfig):
    """LLaVA v1, v1.5 and v1.6 (NeXT).

    Args:
        vision_config: of the CLIP tower.
        text_config: of any language model of transformers.
        image_token_id: the placeholder, of which each image takes as many as it has tokens. The first id after the
            vocabulary will do: placeholders are never looked up.
        vision_feature_layer: which of the tower's hidden states is projected; -2 is the output of the last layer but
            one.
        keep_class_token: project the class token too.
        projector_depth: linear layers between tower and language model; 1 in v1, 2 since v1.5, 0 leaves them out.
        grid_pinpoints: heights and widths in pixels of which v1.6 chooses one for each image, to cut it into tiles of
            the tower's size. None cuts no image.
        patch_merge: how the views of an image are joined: "flat" one after the other, "spatial" row by row of the
            whole tiled image, "spatial_unpad" so, without the padding, a learned vector at the end of each row.
    """

    model_type = "hfvlm_llava"
    token_count_fields = (
        *("vision_config.image_size", "vision_config.patch_size"),
        *("keep_class_token", "grid_pinpoints", "patch_merge"),
    )

    image_token_id: int = 32000
    keep_class_token: bool = False
    projector_depth: int = 2
    grid_pinpoints: list[list[int]] | list[tuple[int, int]] | None = None
    patch_merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"

    @property
    def tiling(self) -> Tiling:
        """How images are cut, and how many tokens they make."""
        vision: Any = self.vision_config
        return Tiling(
            vision.image_size, vision.patch_size, self.grid_pinpoints, self.patch_merge, self.keep_class_token
        )

    def count_tokens(self, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders of an image; `image_size`, its height and width, matters with `grid_pinpoints`."""
        return self.tiling.count_tokens(image_size)

    def validate_grid(self) -> None:
        tile = self.vision_config.image_size
        if not isinstance(tile, int):
            raise ValueError(f"vision_config.image_size {tile}: LLaVA takes squares, give one edge.")
        if self.keep_class_token and self.patch_merge != "flat":
            raise ValueError(f"patch_merge {self.patch_merge!r} arranges patches; keep_class_token needs 'flat'.")
        if any(edge % tile for size in self.grid_pinpoints or () for edge in size):
            raise ValueError(
                f"grid_pinpoints {self.grid_pinpoints}: every edge must be a multiple of vision_config.image_size "
                f"{tile}."
            )
