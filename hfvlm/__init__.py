"""hfvlm: vision-language models as transformers-native models.

`import hfvlm` registers every architecture with transformers' Auto classes, PEFT and the pipelines.
"""

import importlib
from pathlib import Path
from typing import Any

# In a checkout the folders beside this one are its sub-packages; a wheel carries them inside.
if not (Path(__file__).parent / "conversion").exists():
    __path__.append(str(Path(__file__).parent.parent))

from hfvlm.auto import register
from hfvlm.logs import logger as logger  # which follows transformers' verbosity
from hfvlm.registry import architectures, find_class
from hfvlm.versions import __version__, warn_if_untested

_LAZY = {
    "convert": "hfvlm.release.converter",
    "export": "hfvlm.release.export",
    "merge": "hfvlm.release.merging",
    "untrained": "hfvlm.release.untrained",
    "verify": "hfvlm.release.verification",
    "list_presets": "hfvlm.presets",
    "load_preset": "hfvlm.presets",
    "lora": "hfvlm.training.lora",
    "Captioner": "hfvlm.inference.captioner",
    "ZeroShotClassifier": "hfvlm.inference.zero_shot",
    "evaluate": "hfvlm.evaluation.tasks",
    "rerank": "hfvlm.inference.rerank",
    "Embedder": "hfvlm.inference.embedder",
    "combine": "hfvlm.inference.embedder",
    "similarity": "hfvlm.inference.embedder",
    "optimize": "hfvlm.inference.optimization",
    "unoptimize": "hfvlm.inference.optimization",
    "Index": "hfvlm.inference.index",
    "FaissIndex": "hfvlm.inference.index",
    "LanceIndex": "hfvlm.inference.index",
    "load_index": "hfvlm.inference.index",
    "ContrastiveTrainer": "hfvlm.training",
    "ContrastiveTrainingArguments": "hfvlm.training",
    "push": "hfvlm.release.hub",
    "Chat": "hfvlm.inference.chat",
    "Painter": "hfvlm.inference.painter",
    "ImageGenerator": "hfvlm.inference.text_to_image",
    "image_grid": "hfvlm.inference.text_to_image",
    "draw_boxes": "hfvlm.inference.grounding",
    "VideoGrounder": "hfvlm.inference.video_grounding",
    "draw_tracks": "hfvlm.inference.video_grounding",
}

__all__ = ["__version__", "register", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if (found := find_class(name)) is not None:
        return found
    raise AttributeError(f"hfvlm has no {name!r}.")


def __dir__() -> list[str]:
    """Name what can be asked for: the functions, and every class of every architecture."""
    return sorted({*globals(), *_LAZY, *(name for each in architectures().values() for name in each.names)})


warn_if_untested()
register()
