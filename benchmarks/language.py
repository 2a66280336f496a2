"""The further turns of a conversation.

python -m benchmarks.language [--quick] [--rounds 7] [--device cuda] [--output language.json]
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from benchmarks.measuring import Item, Row, Run, Size
from benchmarks.report import main
from hfvlm.modeling.compat import new_cache
from tests.models.llava.tiny import TEXT, VISION, converted


def rows(size: Size) -> Iterator[Item]:
    with TemporaryDirectory() as folder:
        path = converted(Path(folder), **{} if size.quick else larger())
        model = AutoModelForImageTextToText.from_pretrained(path).to(size.device).eval()
        yield Row("LLaVA, three turns of 8 tokens", turns(model, AutoProcessor.from_pretrained(path)))


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
    image = Image.new("RGB", (64, 48), "red")

    def ask(*, keep: bool) -> Run:
        def run() -> list[str]:
            chat = hfvlm.Chat(model, processor, max_new_tokens=8)
            answers = [chat.ask("What is it?", images=[image])]
            for question in ("And the colour?", "And the shape?"):
                if not keep:
                    chat.cache, chat.cached = new_cache(model), []
                answers.append(chat.ask(question))
            return answers

        return run

    return {"hfvlm": ask(keep=True), "careful": ask(keep=False)}


if __name__ == "__main__":
    main({"language": rows}, __doc__)
