"""Outputs of towers and models."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)
from transformers.utils import ModelOutput

MODALITIES = ("image", "video", "text", "audio", "depth", "thermal", "imu")


def select_states(states: Sequence[Tensor], *, wanted: bool | int | Sequence[int] | None) -> tuple[Any, ...] | None:
    """Return the hidden states that `output_hidden_states` asks for, as transformers records those of layers.

    Args:
        states: the input of the first layer, then the output of each.
        wanted: all for True, none for False and None; or indices into `states`, which may count from the end: None is
            in the place of others.
    """
    if not wanted:
        return None
    if wanted is True:
        return tuple(states)
    count = len(states)
    kept = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
    return tuple(state if i in kept else None for i, state in enumerate(states))


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """One modality in the space of its tower.

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
        text_model_output: the text tower's whole output; in training without its tokens, `last_hidden_state`, unless
            hidden states are asked for.
        vision_model_output: as `text_model_output`, of the vision tower.
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


@dataclass
class MultiEncoderOutput(ModelOutput):
    """Several modalities in one space. Only what was given has values.

    `<m>` stands for image, video, text, audio, depth, thermal and imu.

    Args:
        loss: scalar, with `return_loss=True`.
        logits_per_<m>: `(rows of m, texts)`, the similarities with the texts, scaled by both sides' scales; those of
            the texts, `(texts, images)`, with the images. `logits` gives any other pair's.
        <m>_embeds: `(rows, projection_dim)`, of unit length; of several clips, the mean of theirs, which is shorter.
        <m>_scale: `(1,)`, what the modality's embeddings are multiplied by.
        <m>_model_output: the tower's whole output; in training without its tokens, `last_hidden_state`, unless hidden
            states are asked for. That of images is `vision_model_output`.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_video: Tensor | None = None
    logits_per_text: Tensor | None = None
    logits_per_audio: Tensor | None = None
    logits_per_depth: Tensor | None = None
    logits_per_thermal: Tensor | None = None
    logits_per_imu: Tensor | None = None
    image_embeds: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    audio_embeds: Tensor | None = None
    depth_embeds: Tensor | None = None
    thermal_embeds: Tensor | None = None
    imu_embeds: Tensor | None = None
    image_scale: Tensor | None = None
    video_scale: Tensor | None = None
    text_scale: Tensor | None = None
    audio_scale: Tensor | None = None
    depth_scale: Tensor | None = None
    thermal_scale: Tensor | None = None
    imu_scale: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    video_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    audio_model_output: BaseModelOutputWithPooling | None = None
    depth_model_output: BaseModelOutputWithPooling | None = None
    thermal_model_output: BaseModelOutputWithPooling | None = None
    imu_model_output: BaseModelOutputWithPooling | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that were given."""
        return tuple(name.removesuffix("_embeds") for name in self if name.endswith("_embeds"))

    def logits(self, a: str, b: str) -> Tensor:
        """Compare any two modalities that were given: scaled similarities `(rows of a, rows of b)`, in float32.

        Raises:
            ValueError: one was not given.
        """
        if missing := [name for name in (a, b) if name not in self.modalities]:
            raise ValueError(f"No {' and no '.join(missing)} was given to the model.")
        left, right = (self[f"{name}_embeds"] for name in (a, b))
        wide = torch.promote_types(left.dtype, torch.float32)
        with torch.autocast(left.device.type, enabled=False):
            left, right = left.to(wide) * self[f"{a}_scale"].to(wide), right.to(wide) * self[f"{b}_scale"].to(wide)
            return left @ right.t()

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class LateLogits(ModelOutput):
    """Makes the `logits` of an output be computed when they are first read, where `late_logits` computes them.

    In training, a loss needs the scores of labelled tokens alone, and not all at a time; few read all of them.
    """

    def __post_init__(self) -> None:
        # transformers 5.4 has set all keys here, and reads every field once more.
        late = OrderedDict.pop(self, "late_logits", None)
        super().__post_init__()
        if late is not None:
            OrderedDict.__setitem__(self, "late_logits", late)

    def compute_logits(self) -> None:
        """Compute the logits, if that is still to be done."""
        own: Any = self
        if (compute := OrderedDict.pop(self, "late_logits", None)) is not None:
            own.late_logits = None
            own.logits = compute()

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self.compute_logits()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" or not isinstance(key, str):
            self.compute_logits()
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        self.compute_logits()
        values = (self.get(field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in values if v is not None)


@dataclass
class ImageTextOutput(CausalLMOutputWithPast):
    """Scores of a language model that attends to media.

    Args:
        image_outputs: what `get_image_features` returned, None without images.
        video_outputs: what `get_video_features` returned, None without videos.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class LateImageTextOutput(LateLogits, ImageTextOutput):
    """The same in training.

    Args:
        late_logits: computes `logits`, which are not yet; see `LateLogits`.
    """

    late_logits: Callable[[], Tensor] | None = None


@dataclass
class LateLanguageOutput(LateLogits, CausalLMOutputWithCrossAttentions):
    """Scores of a language model in training.

    Args:
        late_logits: computes `logits`, which are not yet; see `LateLogits`.
    """

    late_logits: Callable[[], Tensor] | None = None


@dataclass
class ImageTextSeq2SeqOutput(Seq2SeqLMOutput):
    """As `ImageTextOutput`, of a language model with an encoder and a decoder."""

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


def media_features(output: Any, rows: Iterable[Tensor]) -> BaseModelOutputWithPooling:
    """Make the output of a `get_image_features` or `get_video_features` of a vision tower's output and of what the
    language model attends to: for each image or video `(tokens, hidden_size)`."""
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=tuple(rows),  # type: ignore[arg-type]
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def contrastive_fields(output: ModelOutput) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of a contrastive loss: fields with a value for each row (`*_embeds`, `*_mask`, and of texts
    that are also predicted `*_losses` and `*_lengths`), and factors of all of them (`*_scale`, `*_bias`, one number
    each)."""
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    rows = {
        name: value for name, value in tensors.items() if name.endswith(("_embeds", "_mask", "_losses", "_lengths"))
    }
    factors = {name: value for name, value in tensors.items() if name.endswith(("_scale", "_bias"))}
    return rows, factors
