"""Painter (https://arxiv.org/abs/2212.02499): a generalist of vision that is shown its task by one painted image."""

from typing import Any

from hfvlm.registry import Architecture

architecture = Architecture(
    __name__,
    configs={"hfvlm_painter": "HfvlmPainterConfig"},
    models={
        "AutoModel": ("HfvlmPainterModel",),
        "AutoModelForImageToImage": ("HfvlmPainterModel",),
    },
    processor="HfvlmPainterProcessor",
    image_processors=("HfvlmPainterImageProcessor",),
)


def __getattr__(name: str) -> Any:
    return getattr(architecture, name)
