"""Special tokens that somebody typed are words: they are marked in a message's text, before a template renders it.

A mark is a character of Unicode's private use after a token's first letter, so that no
search for the token finds it: no template, no tokenizer, no separator of turns. `HfvlmTokenizer` removes the marks as
it encodes. Others stand, in a rendered text, where a template says that what the assistant generates begins and ends.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from itertools import accumulate
from typing import Any

# Plane 15, private use.
PROTECTED = "\U000ffffd"
GENERATED, ENDED = "\U000ffffb", "\U000ffffc"
# Parts of a message without a text: a template renders a placeholder for them.
MEDIA = frozenset({"image", "image_url", "video", "audio"})


class Protected(list[Any]):
    """Messages in whose texts every special token stands for itself."""


def unprotected(text: str) -> str:
    """Remove the marks from a text."""
    return text.translate({ord(mark): None for mark in (PROTECTED, GENERATED, ENDED)})


def marks_generation(template: str) -> str | None:
    """Make a template that marks what the assistant generates; None for one that does not say it."""
    for word, mark in (("generation", GENERATED), ("endgeneration", ENDED)):
        template, count = re.subn(rf"{{%(-?)\s*{word}\s*(-?)%}}", rf"{{{{\1 '{mark}' \2}}}}", template)
        if not count:
            return None
    return template


def generated_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without the marks of what the assistant generates, and begin and end of each part of it."""
    pieces = re.split(f"{GENERATED}([^{GENERATED}{ENDED}]*){ENDED}", text)
    ends = list(accumulate(map(len, pieces)))
    return "".join(pieces), list(zip(ends[:-1:2], ends[1::2], strict=True))


class Protector:
    """Marks special tokens in texts.

    Args:
        tokens: that a text cannot contain.
    """

    def __init__(self, tokens: Iterable[str]):
        known = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        # Overlapping matches too.
        self.pattern = re.compile(f"(?=({'|'.join(map(re.escape, known))}))" if known else r"(?!)")

    def text(self, text: str, skip: str = "", count: int = 0) -> str:
        """Mark tokens in one text, but for the first `count` of `skip`."""
        return self.texts([text], skip, count)[0]

    def texts(self, texts: list[str], skip: str = "", count: int = 0) -> list[str]:
        """Mark tokens in texts that may be joined: a token may be spread over several."""
        texts = [unprotected(text) for text in texts]
        whole = "".join(texts)
        meant = [match.span() for match in re.finditer(re.escape(skip), whole)][:count] if skip else []
        ends = [
            match.start() + 1
            for match in self.pattern.finditer(whole)
            if not any(start <= match.start() < end for start, end in meant)
        ]
        marked, start = [], 0
        for text in texts:
            own = [end - start for end in ends if start < end <= start + len(text)]
            for end in reversed(own):
                text = text[:end] + PROTECTED + text[end:]
            marked.append(text)
            start += len(unprotected(text))
        return marked

    def message(self, message: Any, skip: str = "", count: int = 0) -> Any:
        """Mark tokens in a message's texts, but for the first `count` of `skip` in its content; media, their paths
        included, stay as they are."""
        if not isinstance(message, Mapping):
            if hasattr(message, "model_dump"):
                message = message.model_dump()
            elif is_dataclass(message) and not isinstance(message, type):
                message = asdict(message)
            else:
                return message
        meant = {"content": self.content(message["content"], skip, count)} if "content" in message else {}
        return {key: self.nested(value) for key, value in message.items() if key not in meant} | meant

    def content(self, content: Any, skip: str = "", count: int = 0) -> Any:
        """Mark tokens in a message's content: a text, or parts."""
        if not isinstance(content, list | tuple):
            return self.text(content, skip, count) if isinstance(content, str) else self.nested(content)
        parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        for part in parts:
            if isinstance(part, dict) and part.get("type") not in MEDIA:
                part |= {key: self.nested(value) for key, value in part.items() if key != "text"}
        for part, text in zip(texts, self.texts([part["text"] for part in texts], skip, count), strict=True):
            part["text"] = text
        return [self.text(part) if isinstance(part, str) else part for part in parts]

    def nested(self, value: Any) -> Any:
        """Mark tokens in texts inside of anything: tools, documents, template variables."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.nested(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.nested(item) for item in value]
        return value
