"""What towers and models return."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """What one tower makes of one modality.

    Args:
        embeds: `(B, projection_dim)`, the pooled vector in the joint space, not normalised. Equal to `pooler_output`
            where the tower has no projection.
    """

    embeds: Tensor | None = None


@dataclass
class DualEncoderOutput(ModelOutput):
    """Images against texts.

    Args:
        loss: scalar, with `return_loss=True`.
        logits_per_image: `(images, texts)`, scaled cosine similarities.
        logits_per_text: `(texts, images)`, the transpose.
        text_embeds: `(texts, projection_dim)`, of unit length.
        image_embeds: `(images, projection_dim)`, of unit length.
        text_model_output: the text tower's whole output.
        vision_model_output: the vision tower's whole output.
        logit_scale: `(1,)`, the temperature's inverse that the similarities were multiplied by.
        logit_bias: `(1,)`, what was added to them, if anything.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


def contrastive_fields(output: ModelOutput) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a contrastive loss is computed from: fields with a value for each row (`*_embeds`, `*_mask`), and factors
    of all of them (`*_scale`, `*_bias`, one number each)."""
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    rows = {name: value for name, value in tensors.items() if name.endswith(("_embeds", "_mask"))}
    factors = {name: value for name, value in tensors.items() if name.endswith(("_scale", "_bias"))}
    return rows, factors
