"""Caption images as a few examples do, with a Flamingo: captions, or answers to a question, as JSON lines.

python examples/few_shot_captions.py openflamingo-3b examples.jsonl photos/*.jpg > captions.jsonl

A line of the examples has an image, whose path is relative to the file, and its answer:
{"image": "cats.jpg", "answer": "two cats on a pink couch."}. With --task vqa --question "How many?", a line also has
its own "question".
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm  # noqa: F401 (registers the models)
from hfvlm.media.images import read_image


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Flamingo")
    parser.add_argument("examples", type=Path, help="JSON lines")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--task", default="caption", help="caption, vqa, classify, or a text with <image> in it")
    parser.add_argument("--question", help="the question of vqa about every image")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--beams", type=int, default=3)
    options = parser.parse_args(arguments)

    shots = [json.loads(line) for line in options.examples.read_text(encoding="utf-8").splitlines() if line]
    shown = [read_image(options.examples.parent / shot["image"]) for shot in shots]
    query = {"question": options.question} if options.question else {}

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").eval()
    model = model.to(torch.accelerator.current_accelerator() or "cpu")
    processor = AutoProcessor.from_pretrained(options.model)
    prompt = processor.few_shot(options.task, shots, **query)
    for i in range(0, len(options.pictures), options.batch_size):
        paths = options.pictures[i : i + options.batch_size]
        inputs = processor(images=[[*shown, path] for path in paths], text=[prompt] * len(paths))
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=options.max_new_tokens, num_beams=options.beams, do_sample=False)
        for path, answer in zip(paths, processor.batch_decode(ids, new_tokens_only=inputs), strict=True):
            # The authors cut what begins another example.
            answer = answer.partition("Output")[0].partition("Question")[0].strip()
            sys.stdout.write(json.dumps({"image": str(path), "answer": answer}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
