"""What Qwen-VL is fed, and what it says of places (the code released with Qwen/Qwen-VL-Chat; finetune.py of
https://github.com/QwenLM/Qwen-VL at aa00ed0)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken

from hfvlm.media.images import to_8_bits
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor
from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.base import FixedSizeImageProcessor
from hfvlm.processing.grounding import Grounding, Place
from hfvlm.processing.media_text import ImageTextProcessor
from hfvlm.processing.protection import Protected, unprotected
from hfvlm.processing.settings import one_of, string, whole
from hfvlm.processing.tokenization import HfvlmTokenizer, tiktoken_bpe

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROLS = (END, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
PLACES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
PICTURE = ("<img>", "<imgpad>", "</img>")
# Coordinates are in thousandths of the picture's width and height.
SCALE = 1000

# Written into "<|" of what somebody says, so that no token that controls the conversation can be said.
SAID = "\N{WORD JOINER}"
CHAT_TEMPLATES = {
    "chatml": (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
        "{%- for message in messages -%}{{- '<|im_start|>' ~ message['role'] ~ '\n' -}}CONTENT"
        "{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "raw": (
        "{%- for message in messages -%}CONTENT"
        "{%- if message['role'] == 'assistant' -%}{{- '<|endoftext|>' -}}{%- endif -%}{%- endfor -%}"
    ),
}
# Parts in the order they are given; pictures are counted through the conversation, as in the authors' demonstration.
CONTENT = (
    "{%- if message['content'] is string -%}{{- message['content'] | replace('<|', MARKED) -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{%- set seen.pictures = seen.pictures + 1 -%}{{- 'Picture ' ~ seen.pictures ~ COLON ~ PLACE ~ '\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] | replace('<|', MARKED) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)


class HfvlmQwenVLImageProcessor(FixedSizeImageProcessor):
    """Pictures squashed to a square, after they became RGB."""

    image_mean = HfvlmCLIPImageProcessor.image_mean
    image_std = HfvlmCLIPImageProcessor.image_std
    size: dict[str, int] = {"height": 448, "width": 448}
    resize_mode: str = "squash"

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        return super().pixels(to_8_bits(image, name).convert("RGB"), settings, name)


class HfvlmQwenVLTokenizer(HfvlmTokenizer):
    """Byte pairs, and tokens that begin and end turns, names, places and pictures.

    Decoding with `skip_special_tokens=True` keeps names and places.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, *args: Any, **kwargs: Any):
        defaults = {"padding_side": "left", "pad_token": END, "eos_token": END}
        super().__init__(*args, **defaults | kwargs)

    def __call__(
        self, text: Any = None, *args: Any, padding: Any = False, truncation: Any = False, **kwargs: Any
    ) -> Any:
        """As every tokenizer: nothing is padded or cut unless asked for."""
        return super().__call__(text, *args, padding=padding, truncation=truncation, **kwargs)

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> Any:
        """From the authors' `qwen.tiktoken`; the other tokens follow its last.

        Raises:
            ValueError: the file is not such a list.
        """
        engine = tiktoken_bpe(path)
        special = {*CONTROLS, *PICTURE}
        tokens = (*CONTROLS, *PLACES, PICTURE[0], PICTURE[2], PICTURE[1])
        engine.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in tokens])
        return cls(tokenizer_object=engine, **kwargs)


class HfvlmQwenVLProcessor(Grounding, ImageTextProcessor):
    """Conversations with pictures as Qwen-VL reads them, and the places in its answers.

    A path or an address in a text is text: pictures are given beside it. `<ref>`, `<box>` and `<quad>` in a text are
    the model's tokens; those that control the conversation are so in prompts, not in what a message says.

    Args:
        image_processor: of the pictures.
        tokenizer: of the texts.
        chat_template: by default the conversation's.
        conversation: "chatml" of Qwen-VL-Chat, or "raw" of Qwen-VL, which goes on with a text.
        picture_colon: what stands between a picture's number and the picture. The revision of October 2023 has ":".
        num_queries: tokens of a picture.
    """

    image_token = "<img><imgpad></img>"
    conversation: str
    num_queries: int
    picture_colon: str

    CHECKS = {"conversation": one_of(*CHAT_TEMPLATES), "picture_colon": string, "num_queries": whole(1, 2**16)}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        conversation: str = "chatml",
        picture_colon: str = ": ",
        num_queries: int = 256,
        **kwargs: Any,
    ):
        self.set_arguments(conversation=conversation, picture_colon=picture_colon, num_queries=num_queries)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or self.template(), **kwargs)

    def template(self) -> str:
        """The Jinja template of the conversation."""
        names = {"COLON": self.picture_colon, "PLACE": self.image_token, "MARKED": f"<{SAID}|"}
        content = re.sub("|".join(names), lambda name: f"'{names[name[0]]}'", CONTENT)
        return "{%- set seen = namespace(pictures=0) -%}" + CHAT_TEMPLATES[self.conversation].replace(
            "CONTENT", content
        )

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(PICTURE[1])

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.num_queries] * len(image_sizes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text to ids, with one `image_token_id` for each picture.

        As trained, the name of a turn's role and the line break after it are encoded apart from what is said.
        """
        ids: list[int] = []
        for piece in re.split(r"(<\|im_start\|>\w+\n|<\|\w+\|>|<img><imgpad></img>)", text):
            role = re.fullmatch(r"<\|im_start\|>(\w+)\n", piece)
            if role:
                ids += [self.token_id(TURN_START), *self.said(role[1]), *self.said("\n")]
            elif piece == self.image_token:
                ids += map(self.token_id, PICTURE)
            elif piece in CONTROLS:
                ids.append(self.token_id(piece))
            elif piece:
                ids += self.said(piece.replace(f"<{SAID}|", "<|"))
        return ids

    def said(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special but names and places."""
        return list(self.tokenizer(unprotected(text), split_special_tokens=True)["input_ids"])

    def token_id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        """As trained: the answers, and where turns begin and end, whoever speaks."""
        if self.conversation != "chatml":
            return super().labelled(messages)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        if turns and turns[0]["role"] != "user":
            turns = turns[1:]
        ids, labels = list[int](), list[int]()
        text = self.render([*system, *turns])
        for turn in re.split(f"(?={re.escape(TURN_START)})", text)[1:]:
            row = self.encode(turn)
            head = len(self.encode(turn.partition("\n")[0] + "\n"))
            answers = turn.startswith(f"{TURN_START}assistant\n")
            kept = range(head, len(row)) if answers else range(len(row) - 2, len(row))
            labels += [label if i == 0 or i in kept else IGNORE for i, label in enumerate(row)]
            ids += row
        return ids, labels

    # Places

    def places(self, text: str, size: tuple[int, int]) -> list[Place]:
        width, height = size
        found = []
        pattern = re.compile(r"(?:<ref>(?P<label>[^<]*)</ref>)?<(?P<kind>box|quad)>(?P<points>[^<]*)</(?P=kind)>")
        for match in pattern.finditer(text):
            points = [
                [int(int(x) / SCALE * width), int(int(y) / SCALE * height)]
                for x, y in re.findall(r"\((\d+),\s*(\d+)\)", match["points"])
            ]
            label = None if match["label"] is None else match["label"].strip()
            if match["kind"] == "box" and len(points) == 2:
                found.append({"label": label, "box_xyxy": [*points[0], *points[1]]})
            elif match["kind"] == "quad" and len(points) == 4:
                found.append({"label": label, "quad_xy": points})
        return found

    def grounding_text(
        self, label: str | None, boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None
    ) -> str:
        """See `Grounding`; the model's own measure is thousandths of the picture's width and height."""
        width, height = (SCALE, SCALE) if size is None else size
        written = (
            [min(int(value * SCALE / side), SCALE - 1) for value, side in zip(box, (width, height) * 2, strict=True)]
            for box in boxes
        )
        name = f"<ref>{label}</ref>" if label else ""
        return name + "".join(f"<box>({x1},{y1}),({x2},{y2})</box>" for x1, y1, x2, y2 in written)
