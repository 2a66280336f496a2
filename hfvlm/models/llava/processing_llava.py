"""Inputs of LLaVA (https://github.com/haotian-liu/LLaVA at c121f04: mm_utils.py, train/train.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import to_8_bits
from hfvlm.media.resizing import contain, squash
from hfvlm.media.sources import parallel
from hfvlm.models.llava.anyres import COUNTS, Tiling, best_resolution, fitted
from hfvlm.models.llava.conversations import CONVERSATIONS
from hfvlm.processing.conversations import Conversation, Encoder
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD, FOREIGN_OPTIONS, HfvlmImageProcessor, on_device
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import Flag, one_of, or_none, square, string, whole
from hfvlm.processing.settings import edge as length
from hfvlm.processing.tokenization import PieceTokenizer
from hfvlm.processing.vocabularies import VocabularyError, cleans_up, engine_from_json, template

# Padding to a square makes a long image's area grow with the square of its length; longer ones are resized first.
LONGEST_PADDED_EDGE = 8192


def pinpoints(value: Any) -> list[list[int]]:
    """Check heights and widths in pixels."""
    try:
        points = [[length(edge) for edge in point] for point in value]
    except (TypeError, ValueError):
        points = []
    if not points or any(len(point) != 2 for point in points):
        raise ValueError("must be a list of [height, width] in pixels")
    return points


def tiles(image: Image.Image, pinpoints: Sequence[Sequence[int]], edge: int, resample: int) -> list[Image.Image]:
    """Cut the image, in the middle of its best pinpoint with black around it, into tiles, row by row."""
    size = (image.height, image.width)
    height, width = best_resolution(size, pinpoints)
    inner = squash(image, fitted(size, (height, width)), resample)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    corners = [(x, y) for y in range(0, height, edge) for x in range(0, width, edge)]
    return [canvas.crop((x, y, x + edge, y + edge)) for x, y in corners]


def pad_to_square(image: Image.Image, edge: int, resample: int, color: tuple[int, ...]) -> Image.Image:
    longest = max(image.size)
    if longest > LONGEST_PADDED_EDGE:
        return contain(image, (edge, edge), resample, color)
    canvas = Image.new("RGB", (longest, longest), color)
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return squash(canvas, (edge, edge), resample)


def crop_centre(image: Image.Image, edge: int, resample: int) -> Image.Image:
    """Crop as transformers' CLIPImageProcessor, whose crop of an odd margin lies one pixel off torchvision's."""
    short, long = sorted(image.size)
    stretched = int(edge * long / short)
    width, height = (edge, stretched) if image.width <= image.height else (stretched, edge)
    left, top = (width - edge) // 2, (height - edge) // 2
    across, down = image.width / width, image.height / height
    if width * height > 2**26:  # only what the crop leaves is computed
        box = (left * across, top * down, (left + edge) * across, (top + edge) * down)
        return image.resize((edge, edge), resample, box=box)
    return squash(image, (height, width), resample).crop((left, top, left + edge, top + edge))


def centre_view(image: Image.Image, settings: Mapping[str, Any]) -> list[Image.Image]:
    return [crop_centre(image, settings["size"]["height"], settings["resample"])]


def padded_view(image: Image.Image, settings: Mapping[str, Any]) -> list[Image.Image]:
    # Cut, not rounded: the border of the image is not exactly zero once it is normalised.
    color = tuple(int(value * 255) for value in settings["image_mean"])
    return [pad_to_square(image, settings["size"]["height"], settings["resample"], color)]


def tiled_views(image: Image.Image, settings: Mapping[str, Any]) -> list[Image.Image]:
    edge, resample = settings["size"]["height"], settings["resample"]
    return [squash(image, (edge, edge), resample), *tiles(image, settings["grid_pinpoints"], edge, resample)]


# The views of an image, by `resize_mode`.
VIEWS = {"crop": centre_view, "pad": padded_view, "tiles": tiled_views}


class HfvlmLLaVAImageProcessor(HfvlmImageProcessor):
    """Images at the size of CLIP's tower.

    Args:
        size: the tower's `{"height", "width"}` in pixels, or one edge.
        resize_mode: "crop" covers the size and crops the centre (v1), "pad" makes a square with CLIP's mean colour
            around the image (v1.5), "tiles" adds to the squashed image tiles of it at a higher resolution (v1.6).
        grid_pinpoints: heights and widths in pixels of which "tiles" chooses one for each image.
    """

    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    size: Annotated[dict[str, int], square] = {"height": 336, "width": 336}
    resize_mode: Annotated[str, one_of(*VIEWS)] = "pad"
    grid_pinpoints: Annotated[list[list[int]] | None, or_none(pinpoints)] = None

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if (settings["resize_mode"] == "tiles") != bool(settings["grid_pinpoints"]):
            raise ValueError(f"{type(self).__name__}: grid_pinpoints and resize_mode 'tiles' go together.")
        edge = settings["size"]["height"]
        if any(length % edge for point in settings["grid_pinpoints"] or () for length in point):
            raise ValueError(f"{type(self).__name__}: grid_pinpoints must be multiples of size, {edge}.")
        return settings

    @property
    def model_input_names(self) -> list[str]:  # type: ignore[override]
        """`image_sizes` are the model's inputs only where images are cut into tiles."""
        return ["pixel_values", *(["image_sizes"] if self.grid_pinpoints else [])]

    def preprocess(
        self, images: Any, return_tensors: str | None = None, *, allow_urls: Any = False, **kwargs: Any
    ) -> BatchFeature:
        """Prepare images as `pixel_values` `(B, 3, H, W)`; or, with tiles, `(views, 3, H, W)`, each whole image first,
        and `image_sizes` `(B, 2)`, their heights and widths in pixels."""
        settings = self.settings_for(kwargs, FOREIGN_OPTIONS)
        if not settings["grid_pinpoints"]:
            return super().preprocess(images, return_tensors, allow_urls=allow_urls, **kwargs)
        named = list(enumerate(self.sources(images, kwargs)))
        read = parallel(lambda item: self.read(item, settings, allow_urls), named)
        inputs = super().preprocess(read, return_tensors, **kwargs | {"input_data_format": None})
        inputs["image_sizes"] = [[image.height, image.width] for image in read]
        return on_device(BatchFeature(inputs.data, tensor_type=return_tensors), kwargs.get("device"))

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """Prepare the views of one image, (V, 3, H, W), float32."""
        image = to_8_bits(image, name).convert("RGB")
        views = VIEWS[settings["resize_mode"]](image, settings) if settings["do_resize"] else [image]
        ready = dict(settings) | {"do_resize": False}
        return np.stack([super(HfvlmLLaVAImageProcessor, self).pixels(view, ready, name) for view in views])

    def batch(self, arrays: list[np.ndarray], settings: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
        return super().batch([view for views in arrays for view in views], settings, return_tensors)


class HfvlmLLaVATokenizer(PieceTokenizer):
    """The language model's own, with a placeholder for images."""

    @classmethod
    def from_vocabulary(
        cls, path: str | Path, *, add_bos_token: bool = True, added: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """Make a tokenizer from LLaMA's files, as `PieceTokenizer`, or from the tokenizer.json of a language model
        that merges bytes: Llama 3, Qwen 1.5 or MPT, whose special tokens the keywords name.

        Raises:
            VocabularyError: the file is not such a model, or lacks a token that is named.
        """
        path = Path(path)
        engine = engine_from_json(path) if path.suffix == ".json" else None
        if engine is None or not cleans_up(engine):
            return super().from_vocabulary(path, add_bos_token=add_bos_token, added=added, **kwargs)
        tokens = {name: value for name, value in kwargs.items() if name.endswith("_token")}
        if missing := [token for token in tokens.values() if engine.token_to_id(token) is None]:
            raise VocabularyError(f"{path}: has no {', '.join(missing)}: this is the vocabulary of another model.")
        engine.add_special_tokens([AddedToken(token, normalized=False) for token in (*tokens.values(), *added)])
        engine.post_processor = template(engine, tokens.get("bos_token", "") if add_bos_token else "", "")
        plain = {"clean_up_tokenization_spaces": False, "legacy": True} | kwargs
        return cls(tokenizer_object=engine, add_bos_token=add_bos_token, **plain)


class HfvlmLLaVAProcessor(ImageTextProcessor):
    """Conversations with images in LLaVA's format.

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default the conversation's.
        conversation: the authors' name of the conversation that the checkpoint was trained in; `labels` follow it.
        image_start: token before each image, of checkpoints trained with `mm_use_im_start_end`.
        image_end: token after each image.
        patch_size: of the vision tower, in pixels.
        keep_class_token: as in the model's configuration.
        patch_merge: likewise.
    """

    # Images of examples for training may come after a question.
    places_images = True
    item_inputs = ("image_sizes",)
    conversation: Annotated[str, one_of(*CONVERSATIONS)]
    image_start: Annotated[str, string]
    image_end: Annotated[str, string]
    patch_size: Annotated[int, whole(1, 2**10)]
    keep_class_token: Flag
    patch_merge: Annotated[str, one_of(*COUNTS)]

    def __init__(  # noqa: PLR0913 (what is saved with a processor are the arguments by their names)
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        conversation: str = "v1",
        image_start: str = "",
        image_end: str = "",
        patch_size: int = 14,
        keep_class_token: bool = False,  # noqa: FBT001, FBT002
        patch_merge: str = "flat",
        **kwargs: Any,
    ):
        self.set_arguments(conversation=conversation, image_start=image_start, image_end=image_end)
        self.set_arguments(patch_size=patch_size, keep_class_token=keep_class_token, patch_merge=patch_merge)
        chat_template = chat_template or CONVERSATIONS[conversation].chat_template()
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def style(self) -> Conversation:
        return CONVERSATIONS[self.conversation]

    @property
    def stop_strings(self) -> list[str]:
        return list(self.style.stop)

    @property
    def turn_marks(self) -> set[str]:
        return self.style.marks

    @property
    def tiling(self) -> Tiling:
        """How images are divided."""
        pixels = self.image_processor
        merge = (pixels.grid_pinpoints, self.patch_merge, self.keep_class_token)
        return Tiling(pixels.size["height"], self.patch_size, *merge)

    def count_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.tiling.count_tokens(size) for size in image_sizes]

    def count_views(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        tiles = [self.tiling.tiles(size) for size in image_sizes]
        return [1 + down * across for down, across in tiles]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        marked = f"{self.image_start}{self.image_token}{self.image_end}"
        return super().encode(text.replace(self.image_token, marked), add_special_tokens=add_special_tokens)

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        turns = [(message["role"], self.text_of(message["content"])) for message in messages]
        system = [turn for turn in turns if turn[0] == "system"]
        turns = turns[len(system) :]
        if turns and turns[0][0] == "assistant" and self.style.skips_first_answer:
            turns = turns[1:]
        text = self.style.text(turns, lambda turns: self.render(_messages([*system, *turns])))
        encode = self.encode if self.style.marks_images else super().encode
        ids = encode(text)
        return ids, self.style.labels(text, turns, ids, Encoder(encode, self.tokenizer.legacy))

    def text_of(self, content: Any) -> str:
        """Return a message's text, its image first, where the authors put it, or after it where a part says so."""
        if isinstance(content, str):
            if self.image_token not in content:
                return content
            images, text = content.count(self.image_token), content.replace(self.image_token, "")
        else:
            images = sum(part["type"] == "image" for part in content)
            text = "".join(part["text"] for part in content if part["type"] == "text")
            if not images:
                return text
        token = f"<Image>{self.image_token}</Image>" if self.style.tagged else self.image_token
        if not isinstance(content, str) and any(part.get("place") == "after" for part in content):
            return (text.strip() + f"\n{token}" * images).strip()
        return (f"{token}\n" * images + text.strip()).strip()


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]
