"""lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval): its tasks answered by `hfvlm.Chat`.

`lmms_eval --model hfvlm --model_args pretrained=FOLDER --tasks mme`; the entry point `lmms_eval.models` names
`manifest`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from hfvlm.inference.chat import Chat

# Options of `generate` among those of a task.
OPTIONS = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")


def manifest() -> ModelManifest:
    """Name the model `hfvlm` for lmms-eval."""
    return ModelManifest("hfvlm", chat_class_path=f"{__name__}.ChatModel")


class ChatModel(lmms):
    """A chat model of hfvlm's, one request at a time.

    Args:
        pretrained: a model's or an adapter's folder, or a Hub id.
        batch_size: 1.
        device: where the model is put; by default where its weights were loaded.
        **kwargs: of `Chat.from_pretrained`: `system`, `dtype`, `device_map`.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **kwargs: Any):
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size must be 1, not {batch_size}: each request is a conversation of its own.")
        self.chat = Chat.from_pretrained(pretrained, **kwargs)
        if device is not None and "device_map" not in kwargs:
            self.chat.model.to(device)
        self.system = self.chat.system

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests in their order."""
        answers = []
        for request in requests:
            context, to_messages, options, row, task, split = request.args
            answer = self.answer(to_messages(self.task_dict[task][split][row]), options)
            self.cache_hook.add_partial("generate_until", (context, options), answer)
            answers.append(answer)
        return answers

    def answer(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Answer the messages of one request, a user's after at most one of the system's.

        Raises:
            ValueError: there are others, or media that the model does not take.
        """
        *before, last = messages
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise ValueError(f"A request has the messages of {roles}; hfvlm answers one of a user's.")
        system = "".join(part["text"] for message in before for part in message["content"])
        parts = [(part["type"], part["text" if part["type"] == "text" else "url"]) for part in last["content"]]
        media = {f"{kind}s": [value for own, value in parts if own == kind] for kind in ("image", "video")}
        if foreign := {kind for kind, _ in parts} - {"text", "image", "video"}:
            raise ValueError(f"hfvlm's chat models take no {', '.join(sorted(foreign))}.")
        self.chat.system = system or self.system
        self.chat.reset()
        text = "".join(value for kind, value in parts if kind == "text")
        answer = self.chat.ask(text, **media, **generation(options))
        for end in listed(options.get("until")):
            answer = answer.partition(end)[0] if end else answer
        return answer.strip()

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refuse tasks that compare likelihoods of given answers, which `hfvlm.Chat` does not compute."""
        raise NotImplementedError("hfvlm.Chat answers, and computes no likelihoods: choose tasks of generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refuse tasks whose next question depends on the answer, which only their own code can make."""
        raise NotImplementedError("hfvlm.Chat is asked once a request: choose tasks of generate_until.")


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options of `generate` among those of a task; a temperature of 0 takes the likeliest tokens."""
    found = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    if not found.get("temperature"):
        found = {name: value for name, value in found.items() if name not in ("temperature", "top_p")}
        return found | {"do_sample": False}
    return {"do_sample": True} | found


def listed(value: Any) -> list[str]:
    """Return the texts at which an answer ends."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
