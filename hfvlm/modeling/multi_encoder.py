"""The base of models with more than two modalities."""

from abc import abstractmethod
from collections.abc import Callable, Collection
from itertools import combinations, product
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.configuration import MultiEncoderConfig, config_of
from hfvlm.modeling.base import as_features, for_pooled, unit
from hfvlm.modeling.dual_encoder import ContrastiveModel
from hfvlm.modeling.keywords import Keywords, tower_keywords
from hfvlm.modeling.outputs import MultiEncoderOutput
from hfvlm.modules.parts import in_parts

# Dimensions of a batch with one clip a row; one more is a row of clips.
DIMENSIONS = {"image": 4, "video": 5, "text": 2, "audio": 4, "depth": 4, "thermal": 4, "imu": 3}


class MultiEncoder(ContrastiveModel):
    """Towers whose embeddings meet in one space, one a modality or two; those that its configuration has are built.

    A subclass names in `anchor` the modality that every other was trained against, makes each modality's scale in
    `make_scale`, and names its `pair_loss`. The inputs of its `get_<modality>_features` are what the processor's
    `prepare(modality, ...)` makes.
    """

    _keep_in_fp32_modules_strict = ["logit_scales"]

    config: MultiEncoderConfig
    anchor: str
    logit_scales: Any
    one: Tensor

    def __init__(self, config: MultiEncoderConfig):
        super().__init__(config)
        if not config.modalities:
            raise ValueError(f"{type(config).__name__} has no tower: each of its sub-configurations is None.")
        for tower in dict.fromkeys(config.towers[modality] for modality in config.modalities):
            setattr(self, tower, AutoModel.from_config(getattr(config, config_of(tower))))
        scales = {modality: self.make_scale(modality) for modality in config.modalities}
        self.logit_scales = nn.ModuleDict({name: scale for name, scale in scales.items() if scale is not None})
        self.register_buffer("one", torch.ones(1), persistent=False)
        absent = {modality: tower for modality, tower in config.towers.items() if modality not in config.modalities}
        self._keys_to_ignore_on_load_unexpected = [
            *(rf"^{tower}\." for tower in dict.fromkeys(absent.values())),
            *(rf"^logit_scales\.{modality}\." for modality in absent),
        ]
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.ones_(self.one)

    @property
    def towers(self) -> dict[str, str]:
        """Which tower embeds a modality."""
        return {modality: self.config.towers[modality] for modality in self.modalities}

    def further_keywords(self, method: str) -> Collection[str]:
        return tower_keywords(self, method)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds: it has a `get_<modality>_features` for each."""
        return self.config.modalities

    @abstractmethod
    def make_scale(self, modality: str) -> nn.Module | None:
        """Make a `LogitScale`, or what has its `exp`; None for embeddings that stay of unit length."""

    def scale(self, modality: str) -> Tensor:
        """Return what a modality's embeddings are multiplied by, `(1,)`."""
        return self.logit_scales[modality].exp() if modality in self.logit_scales else self.one

    def tower(self, modality: str) -> PreTrainedModel:
        """Return the tower that embeds a modality.

        Raises:
            ValueError: the model was loaded without it, or never had it.
        """
        if modality not in self.modalities:
            raise ValueError(
                f"This {type(self).__name__} embeds {', '.join(self.modalities)}, not {modality}: name it among the "
                "modalities in from_pretrained(..., modalities=[...]), from a folder that has its tower."
            )
        return getattr(self, self.towers[modality])

    def get_input_embeddings(self) -> nn.Module:
        return self.first_tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.first_tower.set_input_embeddings(value)

    @property
    def first_tower(self) -> PreTrainedModel:
        """The text tower, if there is one."""
        return self.tower("text" if "text" in self.modalities else self.modalities[0])

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, scaled."""
        return self.scaled("image", self.encode("image", pixel_values, **kwargs))

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """`(B, C, T, H, W)`, or `(B, clips, C, T, H, W)` -> an output whose `pooler_output`, `(B, D)`, is the joint
        embedding, scaled: the mean over the clips."""
        return self.scaled("video", self.encode("video", pixel_values_videos, **kwargs))

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """`(B, N)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, scaled."""
        return self.scaled("text", self.encode("text", input_ids, attention_mask=attention_mask, **kwargs))

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, bins, frames)`, or `(B, clips, C, bins, frames)` -> an output whose `pooler_output`, `(B, D)`, is
        the joint embedding, scaled: the mean over the clips."""
        return self.scaled("audio", self.encode("audio", input_features, **kwargs))

    @can_return_tuple
    def get_depth_features(self, depth_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, scaled."""
        return self.scaled("depth", self.encode("depth", depth_values, **kwargs))

    @can_return_tuple
    def get_thermal_features(self, thermal_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, scaled."""
        return self.scaled("thermal", self.encode("thermal", thermal_values, **kwargs))

    @can_return_tuple
    def get_imu_features(self, imu_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, 6, N)`, or `(B, clips, 6, N)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding,
        scaled: the mean over the clips."""
        return self.scaled("imu", self.encode("imu", imu_values, **kwargs))

    def encode(self, modality: str, values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed rows, or rows of clips: `pooler_output` is `(B, D)` of unit length, or the mean of such over clips."""
        tower, clips = self.tower(modality), values.ndim > DIMENSIONS[modality]
        rows = values.flatten(0, 1) if clips else values
        frames = rows.shape[2] if modality == "video" else 1
        output = in_parts(tower, rows, frames, **kwargs) if clips or frames > 1 else tower(rows, **kwargs)
        output = as_features(output, pooled_only=kwargs.get("pooled_only", False))
        output.pooler_output = unit(output.pooler_output)
        if clips:
            output.pooler_output = output.pooler_output.unflatten(0, values.shape[:2]).mean(dim=1)
        return output

    def scaled(self, modality: str, features: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Multiply features by their modality's scale."""
        embeds: Any = features.pooler_output
        features.pooler_output = embeds * self.scale(modality).to(embeds.dtype)
        return features

    @can_return_tuple
    def forward(  # noqa: PLR0913  (an argument a modality)
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        depth_values: Tensor | None = None,
        thermal_values: Tensor | None = None,
        imu_values: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> MultiEncoderOutput:
        """Embed whatever is given; with `return_loss`, row i of each belongs to row i of every other.

        Args:
            input_ids: texts, `(B, N)`.
            pixel_values: images, `(B, C, H, W)`, normalised.
            attention_mask: of the texts, `(B, N)`, may be left out.
            pixel_values_videos: videos, `(B, C, T, H, W)` or `(B, clips, C, T, H, W)`, normalised.
            input_features: audio clips, `(B, C, bins, frames)` or `(B, clips, C, bins, frames)`.
            depth_values: depth maps, `(B, C, H, W)`.
            thermal_values: thermal images, `(B, C, H, W)`.
            imu_values: motion, `(B, 6, N)` or `(B, clips, 6, N)`.
            return_loss: also compute the loss, `contrast`.
        """
        given = {
            "image": pixel_values,
            "video": pixel_values_videos,
            "text": input_ids,
            "audio": input_features,
            "depth": depth_values,
            "thermal": thermal_values,
            "imu": imu_values,
        }
        output = MultiEncoderOutput()
        for modality, values in given.items():
            if values is not None:
                options: dict[str, Any] = dict(kwargs)
                if self.training:
                    options = for_pooled(self.tower(modality), options)
                if modality == "text":
                    options["attention_mask"] = attention_mask
                features = self.encode(modality, values, **options)
                output[f"{modality}_embeds"] = features.pooler_output
                output[f"{modality}_scale"] = self.scale(modality)
                output["vision_model_output" if modality == "image" else f"{modality}_model_output"] = features
        if not output.modalities:
            raise ValueError(f"{type(self).__name__} was given nothing to embed.")
        for modality in output.modalities:
            other = "image" if modality == "text" else "text"
            if other in output.modalities:
                output[f"logits_per_{modality}"] = output.logits(modality, other)
        return MultiEncoderOutput(loss=self.contrast(output) if return_loss else None, **output)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.encode("text", input_ids, attention_mask=attention_mask, **kwargs)

    def logits_with(self, text: Any, **media: Any) -> Tensor:
        output = self(**media)
        (modality,) = output.modalities
        output["text_embeds"], output["text_scale"] = text.pooler_output, self.scale("text")
        return output.logits(modality, "text")

    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        """Average the losses of the `pairs` of what was given; the temperature of a pair is the larger of its two
        scales.

        Raises:
            ValueError: fewer than two modalities were given.
        """
        pairs = self.pairs(output.modalities)
        if not pairs:
            raise ValueError(f"A loss needs two modalities in different towers, not {', '.join(output.modalities)}.")
        losses = [
            pair_loss(
                output[f"{a}_embeds"],
                output[f"{b}_embeds"],
                torch.maximum(output[f"{a}_scale"], output[f"{b}_scale"]),
                None,
                group=group,
            )
            for a, b in pairs
        ]
        return torch.stack(losses).mean()

    def pairs(self, given: tuple[str, ...]) -> list[tuple[str, str]]:
        """Pair the modalities that are compared: the anchor's tower with every other, or, without it, all."""
        anchors = [m for m in given if self.towers[m] == self.config.towers[self.anchor]]
        if anchors:
            return list(product(anchors, (m for m in given if m not in anchors)))
        return list(combinations(given, 2))
