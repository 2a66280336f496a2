"""PaliGemma's inputs, and the regions in its answers.

Source: https://github.com/google-research/big_vision at 0127fb6, pp/proj/paligemma and
configs/proj/paligemma/finetune_paligemma.ipynb.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch.nn.functional import interpolate
from transformers.image_processing_base import BatchFeature

from hfvlm.media.images import to_8_bits
from hfvlm.models.paligemma.regions import PIECES, STEPS, find, format_box, paste_mask
from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.batches import texts_of
from hfvlm.processing.grounding import Region
from hfvlm.processing.image_patches import ImagesFirstProcessor, box_in_pixels
from hfvlm.processing.images import HfvlmImageProcessor
from hfvlm.processing.protection import Protected, unprotected
from hfvlm.processing.settings import Flag, square
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import VocabularyError, sentencepiece_engine, template

# Between the prompt and the answer; encoded by itself, so that it never joins the prompt's last piece.
SEPARATOR = "\n"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] != ['user', 'assistant'][loop.index0] | default('') -%}"
    "{{- raise_exception('PaliGemma reads one message of the user, and an answer to train on.') -}}{%- endif -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set words = content -%}{%- else -%}"
    "{{- '<image>' * (content | selectattr('type', 'equalto', 'image') | list | length) -}}"
    "{%- set words = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
    "{%- if loop.first -%}{{- words ~ '\n' -}}{%- else -%}"
    "{% generation %}{{- words ~ eos_token -}}{% endgeneration %}{%- endif -%}"
    "{%- endfor -%}"
)


class HfvlmPaliGemmaImageProcessor(HfvlmImageProcessor):
    """Images squashed to a square, bilinear, in floating point as TensorFlow resizes.

    Args:
        size: the tower's `{"height", "width"}` in pixels, or one edge.
        antialias: False samples between four pixels, as some of the authors' transfers do.
        whole: cut the fractions of the resized values, as the authors' transfers do (and the notebook does not).
    """

    size: Annotated[dict[str, int], square] = {"height": 224, "width": 224}
    resample = 2
    antialias: Flag = True
    whole: Flag = False

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resample"] != Image.Resampling.BILINEAR:
            raise ValueError(f"{type(self).__name__}: resample must be 2, bilinear, which the model was trained with.")
        return settings

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        image = to_8_bits(image, name).convert("RGB")
        if not settings["do_resize"]:
            return super().pixels(image, settings, name)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        size = (settings["size"]["height"], settings["size"]["width"])
        if tuple(values.shape[2:]) != size:
            options = {"mode": "bilinear", "align_corners": False, "antialias": settings["antialias"]}
            values = interpolate(values, size=size, **options)
        values = values.clamp(0, 255)
        return self.scaled((values.floor() if settings["whole"] else values)[0].numpy(), settings)


class HfvlmPaliGemmaTokenizer(HfvlmTokenizer):
    """Gemma's byte pairs, the pieces of regions, and a placeholder for images. Texts begin with <bos>; nothing is
    padded or cut by default."""

    DEFAULTS = {"padding_side": "left"}
    default_padding = False
    default_truncation = False

    @classmethod
    def from_vocabulary(cls, path: str | Path, *, regions: bool = True, **kwargs: Any) -> "HfvlmPaliGemmaTokenizer":
        """Make a tokenizer from Gemma's sentencepiece `.model` or a tokenizer.json.

        Args:
            path: the file.
            regions: add <loc0000> to <loc1023> and <seg000> to <seg127>, where they are not there yet, and the
                placeholder; False is the tokenizer of Gemma alone.
            **kwargs: of the tokenizer.

        Raises:
            VocabularyError: the file is no such vocabulary, or has some of these pieces alone.
        """
        engine = sentencepiece_engine(Path(path))
        engine.no_padding()
        engine.no_truncation()
        names = dict(
            zip(("pad_token", "eos_token", "bos_token", "unk_token"), map(engine.id_to_token, range(4)), strict=True)
        )
        if regions:
            known = [engine.token_to_id(piece) is not None for piece in PIECES]
            if any(known) and not all(known):
                raise VocabularyError(
                    f"{path}: this vocabulary has {sum(known)} of the {len(known)} pieces of regions."
                )
            engine.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
            engine.add_special_tokens([AddedToken("<image>", normalized=False)])
        engine.post_processor = template(engine, str(names["bos_token"]), "")
        return cls(tokenizer_object=engine, **names | kwargs)


class HfvlmPaliGemmaProcessor(ImagesFirstProcessor):
    """Prompts about images, answers to train on, and the regions in answers.

    A text is `<image>caption en`: images come first, as many as there are, then the prompt and a line break, which is
    added where it is missing. The prompts that the authors train with are "caption {language}", "ocr", "answer
    {language} {question}", "question {language} {answer}", "detect {things}" and "segment {things}", of several things
    with " ; " between them.

    Args:
        image_processor: of the images.
        tokenizer: of the texts.
        chat_template: by default one for a message and its answer.
        patch_size: of the vision tower, in pixels.
    """

    caption = "caption en"
    system = "PaliGemma"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        patch_size: int = 14,
        **kwargs: Any,
    ):
        self.set_arguments(patch_size=patch_size)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **kwargs)

    # Texts

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a prompt: a placeholder for each image, <bos>, the prompt and the line break.

        Raises:
            ValueError: an image comes after words.
        """
        images, words = self.divided(text)
        begin = [self.tokenizer.bos_token_id] if add_special_tokens else []
        return [
            *[self.image_token_id] * images,
            *begin,
            *self.pieces(words.removesuffix(SEPARATOR)),
            *self.pieces(SEPARATOR),
        ]

    def pieces(self, text: str) -> list[int]:
        """Encode words without special tokens around them."""
        return list(self.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]) if text else []

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        ids = self.encode(self.render(messages[:1]))
        labels = [IGNORE] * len(ids)
        for message in messages[1:]:
            content = message["content"]
            words = content if isinstance(content, str) else "".join(part["text"] for part in content)
            answer = [*self.pieces(words), self.tokenizer.eos_token_id]
            ids, labels = [*ids, *answer], [*labels, *answer]
        self.render(messages)  # which refuses other conversations
        return ids, labels

    def __call__(self, images: Any = None, text: Any = None, *, suffix: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare prompts and their images as inputs of the model, padded where there are several.

        Args:
            images: one image, a list, or a list of lists, one for each text; see `hfvlm.media.read_image`.
            text: one prompt or a list, which begins with `image_token` for each of its images; by default "caption en"
                for each image.
            suffix: the answer to each prompt, to train on: the inputs have `labels`.
            **kwargs: see `ImageTextProcessor`.

        Raises:
            ValueError: texts and images do not fit each other, or a row does not fit `max_length`.
        """
        text = self.asking(images, text)
        if suffix is None:
            return super().__call__(images, text, **kwargs)
        prompts = [text] if isinstance(text, str) else list(texts_of(text))
        answers = self.answers_to(len(prompts), suffix)
        options, words = self.call_options(kwargs)
        return_tensors = words.pop("return_tensors", "pt")
        allow_urls = options.pop("allow_urls", False)
        rows = self.assemble(
            [self.example(*pair) for pair in zip(prompts, answers, strict=True)],
            images,
            train=True,
            allow_urls=allow_urls,
            **options,
        )
        # Fixed here: what is padded is behind the answers, or in front of the prompts, in ids and labels alike.
        rows, data = self.batch(
            rows, words | {"padding": words.get("padding", len(rows) > 1)}, "image", self.image_token_id
        )
        data.pop("assistant_masks", None)
        side = words.get("padding_side") or self.tokenizer.padding_side
        padded = [[IGNORE] * (len(ids) - len(row.labels)) for ids, row in zip(data["input_ids"], rows, strict=True)]
        data["labels"] = [
            [*row.labels, *rest] if side == "right" else [*rest, *row.labels]
            for row, rest in zip(rows, padded, strict=True)
        ]
        if media := [each for row in rows for each in row.media]:
            data |= self.image_processor(media, **{"return_tensors": return_tensors} | options)
        return BatchFeature(data, tensor_type=return_tensors)

    def example(self, prompt: str, answer: str) -> list[dict[str, Any]]:
        """Make the messages of a prompt with `image_token` and its answer."""
        images, words = self.divided(prompt)
        content: list[dict[str, Any]] = [{"type": "image"}] * images
        question = [*content, {"type": "text", "text": words.removesuffix(SEPARATOR)}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    # Regions

    def regions(self, text: str, size: tuple[int, int]) -> list[Region]:
        """Find regions; those with a mask have its codes as "mask_codes", see `post_process_masks`."""
        found: list[Region] = []
        for match in find(text):
            box = box_in_pixels([step / STEPS for step in match.box], size)
            region: Region = {"label": match.label, "box_xyxy": box}
            found.append(region | ({"mask_codes": list(match.codes)} if match.codes else {}))
        return found

    def box_text(self, shares: Sequence[float]) -> str:
        return format_box(shares)

    def locating(self, expression: str) -> str:
        """Ask as the authors' README does of the mix models."""
        return self.asked(f"detect {expression}")

    def post_process_masks(self, text: str, size: tuple[int, int], model: Any) -> list[Region]:
        """Find the regions with masks in an answer.

        Args:
            text: the answer.
            size: width and height of the image.
            model: `HfvlmPaliGemmaMaskModel`, which decodes the codes.

        Returns:
            As `regions`, each with a "mask": `(H, W)` booleans. Boxes thinner than a pixel are left out.
        """
        matches = [match for match in find(unprotected(text)) if match.codes]
        if not matches:
            return []
        codes = torch.tensor([match.codes for match in matches], device=model.device)
        pasted = [paste_mask(m, match.box, size) for m, match in zip(model.decode_codes(codes), matches, strict=True)]
        regions = [region for region in self.regions(text, size) if "mask_codes" in region]
        return [region | {"mask": mask} for region, mask in zip(regions, pasted, strict=True) if mask is not None]


def plain(text: str) -> str:
    """Take the pieces of regions out of an answer, and the blanks that they leave."""
    return " ".join(re.sub(r"<(?:loc\d{4}|seg\d{3})>", " ", text).split())
