"""Train a small ViLBERT to answer questions about the regions of an image and to find the region that a text means.

An image has four shapes, one in each quarter. Its regions are the boxes around them, in any order, and their features
the pixels of the box, shrunk to 6 x 6. A token in the text says which of two tasks is meant, as in 12-in-1: questions
about colours, shapes and places, with 12 answers, and expressions that refer to one of the regions. Four of the 24
pairs of a colour and a shape never occur in training.

    python examples/vilbert_regions.py --output vilbert-regions        # minutes on a core

With `--blind` the model is trained and tested on the texts alone: its regions are empty. After 1,000 steps, on new
images:

    questions       with regions   blind
    colour          0.67           0.21
    shape           0.47           0.24
    place           0.42           0.25
    presence        0.68           0.68
    references      0.92           0.00

Colours and shapes of things that are named by the other, the shape in a quarter of the image, whether a pair is there
(where "yes" is right for 68 %), and the region that an expression means, of 0.25 by chance among the four, and of none
where every region is empty. Of the four pairs that never occurred, 0.92 of the references are found, but no colour and
no shape is answered.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, set_seed

from hfvlm.conversion.vilbert import processor_for
from hfvlm.models.vilbert import HfvlmViLBERTConfig, HfvlmViLBERTForVisionLanguageTasks
from hfvlm.models.vilbert.processing_vilbert_tasks import classified, grounded
from hfvlm.models.vilbert.regions import Regions
from hfvlm.models.vilbert.tasks import Task
from hfvlm.samples.scenes import COLOURS, SHAPES, all_scenes

EDGE, PIXELS = 100, 6
PLACES = {"top left": (0, 0), "top right": (50, 0), "bottom left": (0, 50), "bottom right": (50, 50)}
ANSWERS = [*COLOURS, *SHAPES, "yes", "no"]
# Sizes of these texts and images, under the numbers of VQA's and RefCOCO's tokens.
ASKED, MEANT = Task(1, "answer", 12, 5), Task(9, "grounding", 12, 5)
QUESTIONS = ("colour", "shape", "place", "presence")
HELD_OUT = {("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--blind", action="store_true", help="show no regions")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tests", type=int, default=1000, help="new images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    tiles = rendered(random)
    options.output.mkdir(parents=True, exist_ok=True)
    model, processor = new_model(options.output / "vocab.txt")
    fit(model, processor, tiles, random, options)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    found = judge(options, tiles, random)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


def rendered(random: np.random.RandomState, count: int = 12) -> dict[tuple[str, str], list[np.ndarray]]:
    """Features of each kind of shape, which differ in size, place and shade."""
    tiles: dict[tuple[str, str], list[np.ndarray]] = {}
    for scene in all_scenes():
        for _ in range(count):
            image = scene.render(random).resize((PIXELS, PIXELS))
            pixels = np.asarray(image, dtype=np.float32).ravel() / 127.5 - 1
            tiles.setdefault((scene.colour, scene.shape), []).append(pixels)
    return tiles


def draw(tiles: Any, random: np.random.RandomState, kinds: list[tuple[str, str]]) -> tuple[Regions, list[Any]]:
    """An image of four shapes -> its regions, and the kind and the place of each, in their order."""
    chosen = [kinds[i] for i in random.permutation(len(kinds))[: len(PLACES)]]
    placed = [(chosen[i], name) for i, name in enumerate(PLACES)]
    placed = [placed[i] for i in random.permutation(len(placed))]
    corners = [np.array(PLACES[place]) + random.uniform(2, 8, 2) for _, place in placed]
    boxes = np.array([[*corner, *(corner + random.uniform(36, 42, 2))] for corner in corners])
    features = np.stack([tiles[kind][random.randint(len(tiles[kind]))] for kind, _ in placed])
    return Regions(features, boxes, EDGE, EDGE), placed


def ask(placed: list[Any], random: np.random.RandomState, kind: str) -> tuple[str, str] | None:
    """A question of a kind and its answer; None where the image has no such question."""
    (colour, shape), place = placed[random.randint(len(placed))]
    kinds = [each for each, _ in placed]
    if kind == "colour" and [each[1] for each in kinds].count(shape) == 1:
        return f"what colour is the {shape} ?", colour
    if kind == "shape" and [each[0] for each in kinds].count(colour) == 1:
        return f"which shape is {colour} ?", shape
    if kind == "place":
        return f"which shape is in the {place} ?", shape
    if kind == "presence":
        if random.rand() < 0.5:
            return f"is there a {colour} {shape} ?", "yes"
        # Both are there, but not of one thing.
        colour, shape = kinds[random.randint(4)][0], kinds[random.randint(4)][1]
        return None if (colour, shape) in kinds else (f"is there a {colour} {shape} ?", "no")
    return None


def new_model(vocabulary: Path, depth: int = 3) -> tuple[Any, Any]:
    """A model of a few hundred thousand parameters that knows nothing, and its words."""
    words = (
        f"what which colour shape is the there a in top bottom left right ? {' '.join((*COLOURS, *SHAPES))}".split()
    )
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n", encoding="utf-8")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    sizes |= {"initializer_range": 0.1}
    config = HfvlmViLBERTConfig(
        text_config=sizes
        | {"intermediate_size": 128, "num_hidden_layers": depth, "vocab_size": 5 + len(words), "num_tasks": 20}
        | {"max_position_embeddings": 16},
        vision_config=sizes | {"intermediate_size": 64, "num_hidden_layers": depth - 1, "feature_size": 3 * PIXELS**2},
        connection_size=64,
        num_connection_heads=4,
        vision_connections=list(range(depth - 1)),
        text_connections=list(range(1, depth)),
        target_size=8,
        num_answers=len(ANSWERS),
        num_gqa_answers=1,
        head_dropout=0.0,
        initializer_range=0.1,
    )
    return HfvlmViLBERTForVisionLanguageTasks(config), processor_for(config, {}, vocabulary)


def example(processor: Any, tiles: Any, random: np.random.RandomState, kind: str, kinds: list[Any]) -> Any:
    """An example of a kind of question, or a reference to a region."""
    regions, placed = draw(tiles, random, kinds)
    if kind == "reference":
        target = random.randint(len(placed))
        (colour, shape), _ = placed[target]
        return grounded(processor, MEANT, f"the {colour} {shape}", regions, regions.boxes[target])
    asked = ask(placed, random, kind)
    while asked is None:
        regions, placed = draw(tiles, random, kinds)
        asked = ask(placed, random, kind)
    question, answer = asked
    return classified(processor, ASKED, question, regions, {ANSWERS.index(answer): 1.0}, len(ANSWERS))


def hidden(batch: dict[str, torch.Tensor], *, blind: bool) -> dict[str, torch.Tensor]:
    """Empty the regions of a batch for a model that is to see none."""
    if blind:
        for name in ("region_features", "region_locations"):
            batch[name] = torch.zeros_like(batch[name])
    return batch


def fit(model: Any, processor: Any, tiles: Any, random: np.random.RandomState, options: argparse.Namespace) -> None:
    kinds = [kind for kind in tiles if kind not in HELD_OUT]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps + 1, pct_start=0.1)
    model.train()
    for step in range(options.steps):
        task, names = (MEANT, ["reference"]) if step % 3 == 2 else (ASKED, QUESTIONS)
        rows = [example(processor, tiles, random, names[i % len(names)], kinds) for i in range(options.batch)]
        batch = hidden(processor.collate(rows), blind=options.blind)
        labels = batch.pop("labels")
        output = model(**batch)
        logits = output.answer_logits if task is ASKED else output.grounding_logits
        loss = task.loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def judge(options: argparse.Namespace, tiles: Any, random: np.random.RandomState) -> dict[str, float]:
    """Accuracies on new images, of kinds that were seen and of all four that were not."""
    model, processor = AutoModel.from_pretrained(options.output), AutoProcessor.from_pretrained(options.output)
    found = {}
    for group, kinds in (("seen", [k for k in tiles if k not in HELD_OUT]), ("held out", sorted(HELD_OUT))):
        for kind in (*QUESTIONS, "reference"):
            task = MEANT if kind == "reference" else ASKED
            rows = [example(processor, tiles, random, kind, kinds) for _ in range(options.tests // len(QUESTIONS))]
            batch = hidden(processor.collate(rows), blind=options.blind)
            labels = batch.pop("labels")
            output = model(**batch)
            logits = output.answer_logits if task is ASKED else output.grounding_logits
            found[f"{kind}, {group}"] = task.score(logits, labels).mean().item()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
