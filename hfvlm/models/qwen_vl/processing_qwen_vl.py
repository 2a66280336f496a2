"""Inputs of Qwen-VL, and regions in its answers (the code released with Qwen/Qwen-VL-Chat; finetune.py of
https://github.com/QwenLM/Qwen-VL at aa00ed0)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken

from hfvlm.media.images import to_8_bits
from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.grounding import Grounding, Region, ordered_box
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, FixedSizeImageProcessor
from hfvlm.processing.protection import Protected, unprotected
from hfvlm.processing.settings import one_of, string, whole
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import tiktoken_bpe

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROLS = (END, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
REGION_MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE = ("<img>", "<imgpad>", "</img>")
# Coordinates are in thousandths of the image's width and height.
SCALE = 1000

# Put into each "<|" of a message, so that it contains no token that controls the conversation.
JOINER = "\N{WORD JOINER}"
CHAT_TEMPLATES = {
    "chatml": (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
        "{%- for message in messages -%}{{- '<|im_start|>' ~ message['role'] ~ '\n' -}}"
        "{%- if message['role'] == 'assistant' -%}{% generation %}CONTENT{{- '<|im_end|>' -}}{% endgeneration %}"
        "{%- else -%}CONTENT{{- '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "raw": (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{% generation %}CONTENT{{- '<|endoftext|>' -}}{% endgeneration %}{%- else -%}CONTENT{%- endif -%}"
        "{%- endfor -%}"
    ),
}
# As in the authors' pretraining: a text with its images, which have no numbers, and its end.
CHAT_TEMPLATES["pretraining"] = CHAT_TEMPLATES["raw"]
# Parts in their order; images are counted through the conversation, as in the authors' demonstration.
NUMBERED = "{{- 'Picture ' ~ count.images ~ COLON ~ IMAGE ~ '\n' -}}"
CONTENT = (
    "{%- if message['content'] is string -%}{{- message['content'] | replace('<|', MARKED) -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{%- set count.images = count.images + 1 -%}"
    + NUMBERED
    + "{%- elif part['type'] == 'text' -%}{{- part['text'] | replace('<|', MARKED) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)


class HfvlmQwenVLImageProcessor(FixedSizeImageProcessor):
    """Images squashed to a square, after they became RGB."""

    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    size = {"height": 448, "width": 448}
    resize_mode = "squash"

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        return super().pixels(to_8_bits(image, name).convert("RGB"), settings, name)


class HfvlmQwenVLTokenizer(HfvlmTokenizer):
    """Byte pairs, and tokens that begin and end turns, names, regions and images.

    Decoding with `skip_special_tokens=True` leaves names and regions in.
    """

    DEFAULTS = {"padding_side": "left", "pad_token": END, "eos_token": END}
    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(cls, path: str | Path, **kwargs: Any) -> Any:
        """Build it from the authors' `qwen.tiktoken`; the other tokens follow its last.

        Raises:
            ValueError: the file is not such a list.
        """
        engine = tiktoken_bpe(path)
        special = {*CONTROLS, *IMAGE}
        tokens = (*CONTROLS, *REGION_MARKS, IMAGE[0], IMAGE[2], IMAGE[1])
        engine.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in tokens])
        return cls(tokenizer_object=engine, **kwargs)


class HfvlmQwenVLProcessor(ImageTextProcessor, Grounding):
    """Conversations with images in Qwen-VL's format, and the regions in its answers.

    A path or an address in a text is text: images are inputs of their own. `<ref>`, `<box>` and `<quad>` in a text are
    the model's tokens; those that control the conversation are so in prompts, not in messages.

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default the conversation's.
        conversation: "chatml" of Qwen-VL-Chat; "raw" of Qwen-VL, which continues a text; or "pretraining", the same
            without the images' numbers, as in the two stages before (https://arxiv.org/abs/2308.12966, appendix B).
        picture_colon: text between an image's number and the image. The revision of October 2023 has ":".
        num_queries: tokens of an image.
    """

    image_token = "<img><imgpad></img>"
    conversation: Annotated[str, one_of(*CHAT_TEMPLATES)]
    picture_colon: Annotated[str, string]
    num_queries: Annotated[int, whole(1, 2**16)]

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
        """Make the Jinja template of the conversation."""
        names = {"COLON": self.picture_colon, "IMAGE": self.image_token, "MARKED": f"<{JOINER}|"}
        form = CONTENT.replace(NUMBERED, "{{- IMAGE -}}") if self.conversation == "pretraining" else CONTENT
        content = re.sub("|".join(names), lambda name: f"'{names[name[0]]}'", form)
        return "{%- set count = namespace(images=0) -%}" + CHAT_TEMPLATES[self.conversation].replace(
            "CONTENT", content
        )

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE[1])

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.num_queries] * len(image_sizes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text, with one `image_token_id` for each image.

        As trained, the name of a turn's role and the line break after it are encoded apart from the message.
        """
        ids: list[int] = []
        for piece in re.split(r"(<\|im_start\|>\w+\n|<\|\w+\|>|<img><imgpad></img>)", text):
            role = re.fullmatch(r"<\|im_start\|>(\w+)\n", piece)
            if role:
                ids += [self.token_id(TURN_START), *self.text_ids(role[1]), *self.text_ids("\n")]
            elif piece == self.image_token:
                ids += map(self.token_id, IMAGE)
            elif piece in CONTROLS:
                ids.append(self.token_id(piece))
            elif piece:
                ids += self.text_ids(piece.replace(f"<{JOINER}|", "<|"))
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Encode a text in which nothing is special but names and regions."""
        return list(self.tokenizer(unprotected(text), split_special_tokens=True, padding=False)["input_ids"])

    def token_id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        """Label as in training: the answers, and where turns begin and end, whoever speaks."""
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
            learned = range(head, len(row)) if answers else range(len(row) - 2, len(row))
            labels += [label if i == 0 or i in learned else IGNORE for i, label in enumerate(row)]
            ids += row
        return ids, labels

    # Regions

    def regions(self, text: str, size: tuple[int, int]) -> list[Region]:
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

    def locating(self, expression: str) -> str:
        """Begin a box after a name, in no conversation (https://github.com/QwenLM/Qwen-VL at 10cb904,
        eval_mm/evaluate_grounding.py)."""
        return f"{self.image_token}<ref>{expression.replace('<|', f'<{JOINER}|')}</ref><box>"

    def answered_box(self, answer: str, size: tuple[int, int]) -> list[float] | None:
        return super().answered_box(f"<box>{answer}", size)

    def grounding_text(
        self, label: str | None, boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None
    ) -> str:
        """Format boxes, see `Grounding`; the model's own unit is thousandths of the image's width and height."""
        width, height = (SCALE, SCALE) if size is None else size
        corners = (
            [min(int(value * SCALE / side), SCALE - 1) for value, side in zip(box, (width, height) * 2, strict=True)]
            for box in map(ordered_box, boxes)
        )
        name = f"<ref>{label}</ref>" if label else ""
        return name + "".join(f"<box>({x1},{y1}),({x2},{y2})</box>" for x1, y1, x2, y2 in corners)
