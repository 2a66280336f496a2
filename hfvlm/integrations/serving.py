"""vLLM and SGLang, which build a model by `AutoModel` and score its last hidden states themselves.

`register` is the entry point of vLLM's plugins (`vllm.general_plugins`). SGLang has none: import this module, call
`register`, and start its server from the same script.
"""

from typing import Any

from hfvlm import registry
from hfvlm.modeling.headless import headless
from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.image_text_seq2seq import Seq2SeqImageTextModel
from hfvlm.registry import Architecture, architectures

# Those whose language model attends to images in its inputs alone, each token to those before it.
SERVED = ("llava", "blip2", "qwen_vl", "shikra", "video_chatgpt", "pg_video_llava")


def register() -> None:
    """Have `AutoModel` make models that chat without their output layers, in this process."""
    if _leave_out_head not in registry.after_load:
        registry.after_load.append(_leave_out_head)
        for name in SERVED:
            if architectures()[name].is_loaded:
                _leave_out_head(architectures()[name])


def _leave_out_head(architecture: Architecture) -> None:
    if architecture.name not in SERVED:
        return
    from transformers import AutoModel

    mapping: Any = AutoModel._model_mapping
    for name in architecture.models["AutoModelForImageTextToText"]:
        kind = getattr(architecture, name)
        if issubclass(kind, ImageTextModel) and not issubclass(kind, Seq2SeqImageTextModel):
            found: Any = mapping[kind.config_class]
            several = isinstance(found, tuple)
            entry = type(found)([headless(kind), *found[1:]]) if several else headless(kind)
            mapping.register(kind.config_class, entry, exist_ok=True)
