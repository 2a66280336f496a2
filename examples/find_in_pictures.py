"""Find what texts name in images: boxes as JSON lines, and each image with its boxes drawn.

python examples/find_in_pictures.py qwen-vl-chat beach.jpg street.jpg --name "the dog" --name "a red car" -o found
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import hfvlm
from hfvlm.media.images import read_image

# The question that each model was trained with.
QUESTIONS = {
    "hfvlm_qwen_vl": "Frame {} in the picture.",
    "hfvlm_shikra": "Can you point out {} in the image <image> and provide the coordinates of its location?",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Qwen-VL-Chat or a Shikra")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--name", action="append", required=True, help="what to find; may be repeated")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    chat = hfvlm.Chat.from_pretrained(options.model, dtype="auto")
    question = QUESTIONS[chat.model.config.model_type]
    with (options.output / "places.jsonl").open("w", encoding="utf-8") as lines:
        for path in options.pictures:
            picture, found = read_image(path), []
            for i, name in enumerate(options.name):
                again = i > 0 and "<image>" not in question  # one conversation, in which the image is encoded once
                if not again:
                    chat.reset()
                answer = chat.ask(question.format(name), images=[] if again else [picture], max_new_tokens=64)
                places = chat.processor.post_process_grounding(answer, sizes=[picture.size])
                found += [place | {"label": place["label"] or name} for place in places]
            lines.write(json.dumps({"picture": str(path), "places": found}, ensure_ascii=False) + "\n")
            hfvlm.draw_boxes(picture, found).save(options.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
