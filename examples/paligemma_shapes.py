"""Train a small PaliGemma to detect shapes: of two on an image, the prompt names one, and the answer is its box.

"detect red circle" is answered with four `<loc>` pieces: top, left, bottom and right. A blind model is trained in the
same way on gray images: it learns where boxes are likely, and no more.

    python examples/paligemma_shapes.py --output shapes          # minutes on a core
    python examples/paligemma_shapes.py --output shapes --blind

After 400 steps, 200 new images give

    model     mean IoU   boxes that overlap by half
    seeing    0.46       0.46
    blind     0.14       0.09
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, set_seed

import hfvlm
from hfvlm.models.paligemma import HfvlmPaliGemmaConfig, HfvlmPaliGemmaForConditionalGeneration
from hfvlm.processing.grounding import intersection_over_union

PIXELS, PATCH = 64, 16
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square")
GRAY = (128, 128, 128)
Example = tuple[Image.Image, str, list[float]]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--blind", action="store_true", help="train and test on gray images")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=3000, help="in training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    model, processor = new_model(options.width)
    losses = fit(model, processor, random, options)
    boxes = [example(random) for _ in range(options.tested)]
    overlaps = test(model, processor, boxes, blind=options.blind)
    results = {
        "first loss": losses[0],
        "last loss": float(np.mean(losses[-10:])),
        "mean IoU": float(overlaps.mean()),
        "accuracy@0.5": float((overlaps >= 0.5).mean()),
    }
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
    return results


def new_model(width: int) -> tuple[HfvlmPaliGemmaForConditionalGeneration, Any]:
    """Make a model without weights from the web, and a processor whose words are those of the scenes' captions."""
    with TemporaryDirectory() as folder:
        processor = AutoProcessor.from_pretrained(hfvlm.untrained("paligemma", Path(folder) / "untrained"))
    processor.patch_size, processor.image_processor.size = PATCH, {"height": PIXELS, "width": PIXELS}
    vocabulary = processor.image_token_id
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "gemma", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width}
    text |= {
        "initializer_range": 0.1,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": width // 4,
    }
    config = HfvlmPaliGemmaConfig(
        vision_config=vision | {"image_size": PIXELS, "patch_size": PATCH},
        text_config=text | {"max_position_embeddings": 256},
        image_token_id=vocabulary,
    )
    return HfvlmPaliGemmaForConditionalGeneration(config), processor


def example(random: np.random.RandomState) -> Example:
    """Draw two shapes of different colours beside each other -> the image, the prompt for one, and its box."""
    image = Image.new("RGB", (PIXELS, PIXELS), (20, 20, 20))
    draw, named, boxes = ImageDraw.Draw(image), [], list[list[float]]()
    colours = random.permutation(list(COLOURS))[:2]
    for i, colour in enumerate(colours):
        shape, edge = SHAPES[random.randint(2)], PATCH * random.randint(1, 3)
        # One is in the left half, the other in the right one, each on a grid of sixteen pixels.
        left = (i * PIXELS // 2) + PATCH * random.randint(0, (PIXELS // 2 - edge) // PATCH + 1)
        top = PATCH * random.randint(0, (PIXELS - edge) // PATCH + 1)
        box = [left, top, left + edge, top + edge]
        paint = draw.ellipse if shape == "circle" else draw.rectangle
        paint([left, top, left + edge - 1, top + edge - 1], fill=COLOURS[colour])
        named.append(f"{colour} {shape}")
        boxes.append([float(value) for value in box])
    if random.rand() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = [[PIXELS - right, top, PIXELS - left, bottom] for left, top, right, bottom in boxes]
    chosen = random.randint(2)
    return image, f"<image>detect {named[chosen]}", boxes[chosen]


def fit(model: Any, processor: Any, random: np.random.RandomState, options: argparse.Namespace) -> list[float]:
    """Train on images that are drawn and prepared once -> the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm, total = max(1, options.steps // 20), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * np.cos(np.pi * step / total))
    )
    images, prompts, boxes = zip(*(example(random) for _ in range(options.images)), strict=True)
    answers = [processor.grounding_text(None, [box], (PIXELS, PIXELS)) for box in boxes]
    inputs = processor(images=seen(images, blind=options.blind), text=list(prompts), suffix=answers)
    losses, order = [], np.array([], dtype=int)
    model.train()
    for step in range(options.steps):
        if len(order) < options.batch:
            order = np.concatenate([order, random.permutation(len(images))])
        chosen, order = order[: options.batch], order[options.batch :]
        loss = model(**{name: value[chosen] for name, value in inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return losses


def seen(images: Sequence[Image.Image], *, blind: bool) -> list[Image.Image]:
    return [Image.new("RGB", (PIXELS, PIXELS), GRAY)] * len(images) if blind else list(images)


@torch.no_grad()
def test(model: Any, processor: Any, examples: list[Example], *, blind: bool) -> np.ndarray:
    """Compare the boxes in the answers with those that were drawn -> the overlap of each."""
    model.eval()
    overlaps = []
    for start in range(0, len(examples), 50):
        images, prompts, boxes = zip(*examples[start : start + 50], strict=True)
        inputs = processor(images=seen(images, blind=blind), text=list(prompts))
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for answer, box in zip(processor.batch_decode(ids, new_tokens_only=inputs), boxes, strict=True):
            found = processor.answered_box(answer, (PIXELS, PIXELS))
            overlaps.append(0.0 if found is None else intersection_over_union(found, box))
    return np.array(overlaps)


if __name__ == "__main__":
    main()
