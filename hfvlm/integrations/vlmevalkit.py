"""VLMEvalKit (https://github.com/open-compass/VLMEvalKit, vlmeval/vlm/base.py): its model interface over `hfvlm.Chat`.

`vlmeval.config.supported_VLM["mine"] = partial(ChatModel, "llava-v1.5-7b")`, then `run.py --model mine`. The interface
is a few methods, which this class has without its base class.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.inference.chat import Chat


class ChatModel:
    """A chat model that answers VLMEvalKit's messages, `[{"type": "image" | "video" | "text", "value": ...}]`.

    Args:
        folder: a model's or an adapter's, or a Hub id.
        max_new_tokens: of an answer.
        **kwargs: of `Chat.from_pretrained`: `system`, `dtype`, `device_map`.
    """

    is_api = False
    INTERLEAVE = False

    def __init__(self, folder: str | Path, *, max_new_tokens: int = 512, **kwargs: Any):
        self.chat = Chat.from_pretrained(folder, **kwargs)
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        self.allowed_types = ["text", self.chat.processor.modality]
        self.dump_image: Callable[..., Any] | None = None

    def use_custom_prompt(self, dataset: str) -> bool:
        """Return False: each data set asks in its own way."""
        return False

    def set_dump_image(self, dump_image: Callable[..., Any]) -> None:
        """Take the function that writes a row's images to files, which VLMEvalKit gives every model."""
        self.dump_image = dump_image

    def generate(self, message: str | Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answer one message, in a conversation of its own.

        Args:
            message: a text, or parts: `type` and `value`, a text or the path of a file.
            dataset: the data set's name, which changes nothing.

        Raises:
            ValueError: a part of a type that the model does not take.
        """
        parts = [{"type": "text", "value": message}] if isinstance(message, str) else list(message)
        if foreign := sorted({part["type"] for part in parts} - set(self.allowed_types)):
            raise ValueError(f"The model takes {', '.join(self.allowed_types)}, not {', '.join(foreign)}.")
        values = {kind: [part["value"] for part in parts if part["type"] == kind] for kind in self.allowed_types}
        text, media = "\n".join(values.pop("text")), {f"{kind}s": paths for kind, paths in values.items()}
        self.chat.reset()
        return self.chat.ask(text, **media, **self.options)
