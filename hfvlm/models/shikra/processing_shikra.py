"""Inputs of Shikra, and regions in its answers.

Source: mllm/dataset of https://github.com/shikras/shikra at ff79a4c.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken

from hfvlm.media.images import to_8_bits
from hfvlm.models.llava.conversations import CONVERSATIONS as LLAVA
from hfvlm.models.llava.processing_llava import pad_to_square
from hfvlm.models.shikra.regions import Bins, Coordinates, Decimals, Square
from hfvlm.processing.conversations import Conversation, Encoder
from hfvlm.processing.grounding import Grounding, Region, ordered_box
from hfvlm.processing.image_patches import ImagePatchesProcessor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, HfvlmImageProcessor
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import or_none, square, string, whole
from hfvlm.processing.tokenization import PieceTokenizer

WHITE = (255, 255, 255)
MARKS = {"boxes": "<boxes>", "points": "<points>"}

# Images stand where their message has `<image>`, or at its front; in a message without images it has no effect.
CONTENT = (
    "{%- macro text_of(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    "{%- if not images -%}{{- texts | replace('<image>', '') -}}"
    "{%- elif '<image>' in texts -%}{{- texts -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image> ' if loop.first and not loop.last else '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endif -%}{%- endmacro -%}"
)
CONVERSATION: Conversation = replace(LLAVA["v1"], content=CONTENT)


class HfvlmShikraImageProcessor(HfvlmImageProcessor):
    """Images in the middle of a white square.

    Args:
        size: the tower's `{"height", "width"}` in pixels, or one edge.
    """

    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    size: Annotated[dict[str, int], square] = {"height": 224, "width": 224}

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        return super().pixels(to_8_bits(image, name).convert("RGB"), settings, name)

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        return pad_to_square(image, settings["size"]["height"], settings["resample"], WHITE)


class HfvlmShikraTokenizer(PieceTokenizer):
    """LLaMA's, with a placeholder for images and tokens around them."""


def brackets_around(value: Any) -> str:
    """Check an opening and a closing bracket."""
    if len(string(value)) != 2:
        raise ValueError("must be two characters")
    return value


class HfvlmShikraProcessor(ImagePatchesProcessor, Grounding):
    """Conversations about an image in Shikra's format, and the regions in them.

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default the conversation's.
        image_patch: token that is the placeholder.
        image_start: token before each image, of checkpoints trained with `mm_use_im_start_end`.
        image_end: token after each image.
        patch_size: of the vision tower, in pixels.
        digits: of each coordinate, after the point.
        brackets: the two around regions.
        num_bins: of a model that predicts regions in tokens of their own, how many steps they have.
    """

    # The authors' tokenizer drops the blanks around images.
    media_mark = AddedToken("<image>", lstrip=True, rstrip=True, normalized=False)
    image_patch: Annotated[str, string]
    image_start: Annotated[str, string]
    image_end: Annotated[str, string]
    digits: Annotated[int, whole(0, 15)]
    brackets: Annotated[str, brackets_around]
    num_bins: Annotated[int | None, or_none(whole(2, 2**20))]

    def __init__(  # noqa: PLR0913 (what is saved with a processor are the arguments by their names)
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        image_patch: str = "<im_patch>",
        image_start: str = "<im_start>",
        image_end: str = "<im_end>",
        patch_size: int = 14,
        digits: int = 3,
        brackets: str = "[]",
        num_bins: int | None = None,
        **kwargs: Any,
    ):
        self.set_arguments(image_patch=image_patch, image_start=image_start, image_end=image_end)
        self.set_arguments(patch_size=patch_size, digits=digits, brackets=brackets, num_bins=num_bins)
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or CONVERSATION.chat_template(), **kwargs
        )

    # Texts

    @property
    def turn_marks(self) -> set[str]:
        return CONVERSATION.marks

    def meant(self, content: Any, *, of_data: bool = False) -> int:
        """Count the `<image>` of a message with images that are not at its front, as in training: `Where in <image> is
        it?`. In a data set, a message without images may have one, too, and the authors drop it."""
        if not isinstance(content, list | tuple):
            return 0
        parts = [part for part in content if isinstance(part, Mapping)]
        images = sum(part.get("type") == "image" for part in parts)
        spelt = sum(part["text"].count(self.image_token) for part in parts if isinstance(part.get("text"), str))
        return spelt if of_data else images if spelt >= images else 0

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_patch)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text, with one `image_token_id` for each image. The authors' tokenizer drops the blanks around
        images."""
        marked = f"{self.image_start}{self.image_token}{self.image_end}"
        text = re.sub(rf"\s*{re.escape(self.image_token)}\s*", marked, text)
        return super().encode(text, add_special_tokens=add_special_tokens)

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        text = self.render(messages, add_generation_prompt=messages[-1]["role"] == "user")
        ids = self.encode(text)
        return ids, CONVERSATION.labels(text, (), ids, Encoder(self.encode, self.tokenizer.legacy))

    # Regions

    @property
    def notation(self) -> Decimals | Bins:
        """The format of regions."""
        return Bins(self.num_bins) if self.num_bins else Decimals(self.digits, self.brackets)

    def regions(self, text: str, size: tuple[int, int]) -> list[Region]:
        square, found, before = Square(*size), list[Region](), 0
        for start, end, regions in self.notation.find(text):
            # Nothing marks the beginning of a name: it is the text since the last region or the last stop.
            label = re.split(r"[.,:;?!()\"\n]", text[before:start])[-1].strip() or None
            for region in regions:
                found.append({"label": label, "box_xyxy" if len(region) == 4 else "point_xy": square.pixels(region)})
            before = end
        return found

    def locating(self, expression: str) -> str:
        """Ask by the first of the prompts that the paper lists (https://arxiv.org/abs/2306.15195, table 9)."""
        return self.asked(
            f"In the given {self.image_token}, could you find and tell me the coordinates of {expression}?"
        )

    def grounding_text(
        self, label: str | None, boxes: Sequence[Coordinates], size: tuple[int, int] | None = None
    ) -> str:
        """Format boxes, see `Grounding`; the model's own unit is the side of the square around the image. Points, `[x,
        y]`, may replace boxes."""
        known = [box if len(box) == 2 else ordered_box(box) for box in boxes]
        regions = known if size is None else [Square(*size).share(box) for box in known]
        return f"{label} {self.notation.format(regions)}" if label else self.notation.format(regions)

    def refer(
        self,
        text: str,
        size: tuple[int, int],
        *,
        boxes: Sequence[Coordinates] = (),
        points: Sequence[Coordinates] = (),
        boxes_seq: Sequence[Sequence[int]] | None = None,
        points_seq: Sequence[Sequence[int]] | None = None,
    ) -> str:
        """Put regions of an image into a text, for questions and for training.

        Example:
            >>> processor.refer("What is the person <boxes> scared of?", (97, 61), boxes=[[10, 5, 60, 40]])
            'What is the person [0.103,0.237,0.619,0.598] scared of?'

        Args:
            text: with `<boxes>` and `<points>` where regions belong.
            size: width and height of the image, in PIL's order.
            boxes: left, top, right and bottom in pixels of the image.
            points: x and y likewise.
            boxes_seq: for each `<boxes>` which of the boxes; by default one each, in their order.
            points_seq: likewise.

        Raises:
            ValueError: the text has not as many marks as there are regions, or a box is none.
        """
        square, boxes = Square(*size), [ordered_box(box) for box in boxes]
        for kind, known, chosen in (("boxes", boxes, boxes_seq), ("points", points, points_seq)):
            groups = [[i] for i in range(len(known))] if chosen is None else chosen
            first, *rest = text.split(MARKS[kind])
            if len(rest) != len(groups) or any(not 0 <= i < len(known) for group in groups for i in group):
                raise ValueError(
                    f"{text!r} has {len(rest)} {MARKS[kind]} for {kind}_seq {groups} of {len(known)} {kind}."
                )
            formatted = [self.notation.format([square.share(known[i]) for i in group]) for group in groups]
            text = first + "".join(region + piece for region, piece in zip(formatted, rest, strict=True))
        return text
