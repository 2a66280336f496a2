"""Vision towers that are models of timm, where timm is installed: the extra `hfvlm[timm]`."""

import importlib
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hfvlm.configuration import HfvlmConfig
from hfvlm.modeling.trunks import HfvlmVisionTrunkModel


class TimmMissingError(ImportError):
    """A tower is timm's, and timm or the torchvision that it needs does not load."""


def timm_wrapper_config(architecture: str, model_args: dict[str, Any]) -> PreTrainedConfig:
    """Make transformers' configuration of a model of timm.

    Raises:
        TimmMissingError: timm does not load; the message says why, and what to install.
    """
    try:
        # transformers asks no more than whether there are packages of timm's and torchvision's names.
        importlib.import_module("timm")
        from transformers import TimmWrapperConfig

        return TimmWrapperConfig(architecture=architecture, model_args=model_args)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise TimmMissingError(
            f"The vision tower {architecture} is a model of timm, which does not load ({reason}): "
            f"`pip install 'hfvlm[timm]'`, with the torchvision that belongs to torch {torch.__version__}."
        ) from error


@strict
class HfvlmTimmTrunkConfig(HfvlmConfig):
    """A vision model of timm as a vision tower.

    Args:
        architecture: timm's name of the model.
        model_args: what `timm.create_model` takes beside it: its `global_pool`, and sizes that are not the name's.
        image_size: one edge in pixels, or (height, width).
        hidden_size: width of the model's pooled output.
        projection_dim: width of the joint space; None leaves the projection out.
        projection_hidden_size: width between the projection's two layers; None for a projection of one layer.
        projection_bias: whether the projection's first layer has a bias.
    """

    model_type = "hfvlm_timm_trunk"
    base_config_key = "vision_config"

    architecture: str = "fastvit_mci0"
    model_args: dict[str, Any] | None = None
    image_size: int | list[int] | tuple[int, int] = 256
    hidden_size: int = 1024
    projection_dim: int | None = 512
    projection_hidden_size: int | None = None
    projection_bias: bool = False

    # What towers of transformers' models have as fields.
    pooling = "pooler"
    layer_norm_eps = None

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes."""
        return self.hidden_size

    @property
    def trunk_config(self) -> PreTrainedConfig:
        """transformers' configuration of the model; see `timm_wrapper_config`."""
        return timm_wrapper_config(self.architecture, dict(self.model_args or {}))


class HfvlmTimmTrunkModel(HfvlmVisionTrunkModel):
    """A vision model of timm, pooled and projected. It resizes no positions: images have `image_size`."""

    config: HfvlmTimmTrunkConfig  # type: ignore[assignment]

    def __init__(self, config: HfvlmTimmTrunkConfig):
        super().__init__(config)  # type: ignore[arg-type]
        width = self.model.num_features
        if width != config.hidden_size:
            raise ValueError(
                f"vision_config: hidden_size {config.hidden_size} is not {width}, the width of {config.architecture}."
            )

    @property
    def model(self) -> Any:
        """The model of timm, whatever it is."""
        return self.trunk.timm_model

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether timm recomputes its layers in training, which transformers turns on by this name."""
        return any(getattr(module, "grad_checkpointing", False) for module in self.model.modules())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.set_grad_checkpointing(value)
