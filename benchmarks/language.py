"""Generation of captions and answers next to transformers' own classes, and the further turns of a conversation.

python -m benchmarks.language [--quick] [--rounds 7] [--device cuda] [--output language.json]
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import hfvlm
from benchmarks.measuring import Item, Row, Run, Size
from benchmarks.models import config, native_of, pixels, seeded
from benchmarks.report import main
from hfvlm.modeling.compat import new_cache
from hfvlm.models.blip import HfvlmBLIPForConditionalGeneration
from tests.models.llava.tiny import TEXT, VISION, converted


def rows(size: Size) -> Iterator[Item]:
    with TemporaryDirectory() as folder:
        path = converted(Path(folder), **{} if size.quick else larger())
        model = AutoModelForImageTextToText.from_pretrained(path).to(size.device).eval()
        processor = AutoProcessor.from_pretrained(path)
        yield Row("LLaVA, three turns of 8 tokens", turns(model, processor))
        native = hfvlm.export(path, Path(folder) / "native")
        theirs = LlavaForConditionalGeneration.from_pretrained(native).to(size.device).eval()
        inputs = processor(images=image(), text="<image>\nWhat is it?", return_tensors="pt").to(size.device)
        for beams in (1, 4):
            ways = {name: answer(kind, dict(inputs), beams) for name, kind in both(model, theirs)}
            yield Row(f"LLaVA, answers of 16 tokens, {beams} beams", ways, tolerance=0.0)
    captioner = make_captioner(size)
    theirs = native_of(captioner, "blip", "BlipForConditionalGeneration")
    for beams in (1, 4):
        ways = {name: caption(kind, pixels(captioner, 2), beams) for name, kind in both(captioner, theirs)}
        yield Row(f"BLIP, captions of 2 images, {beams} beams", ways, tolerance=0.0)


def both(ours: Any, theirs: Any) -> Iterator[tuple[str, Any]]:
    """Name the models, with the same ends of what they generate."""
    theirs.generation_config = ours.generation_config
    yield from {"hfvlm": ours, "transformers": theirs}.items()


def answer(model: Any, inputs: dict[str, Any], beams: int) -> Run:
    """Generate token ids, those of the prompt left out."""
    length = inputs["input_ids"].shape[1]
    return lambda: model.generate(**inputs, num_beams=beams, min_new_tokens=16, max_new_tokens=16)[:, length:]


def caption(model: Any, batch: Tensor, beams: int) -> Run:
    return lambda: model.generate(pixel_values=batch, num_beams=beams, min_new_tokens=12, max_new_tokens=12)


def make_captioner(size: Size) -> HfvlmBLIPForConditionalGeneration:
    settings = config("blip", size)
    settings.architectures = ["HfvlmBLIPForConditionalGeneration"]
    settings.vision_config.projection_dim = settings.text_config.projection_dim = None
    return seeded(HfvlmBLIPForConditionalGeneration, settings, size)


def image() -> Image.Image:
    return Image.new("RGB", (64, 48), "red")


def larger() -> dict[str, Any]:
    vision = VISION | {"hidden_size": 256, "intermediate_size": 1024, "image_size": 224, "num_attention_heads": 4}
    text = TEXT | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "max_position_embeddings": 1024,
    }
    return {"vision_config": vision, "text_config": text}


def turns(model: Any, processor: Any) -> dict[str, Run]:
    """Ask three times about an image; by hand, each answer computes the whole conversation again."""

    def ask(*, keep: bool) -> Run:
        def run() -> list[str]:
            chat = hfvlm.Chat(model, processor, max_new_tokens=8)
            answers = [chat.ask("What is it?", images=[image()])]
            for question in ("And the colour?", "And the shape?"):
                if not keep:
                    chat.cache, chat.cached = new_cache(model), []
                answers.append(chat.ask(question))
            return answers

        return run

    return {"hfvlm": ask(keep=True), "careful": ask(keep=False)}


if __name__ == "__main__":
    main({"language": rows}, __doc__)
