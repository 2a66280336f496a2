"""Models with a task of their own: they draw, paint, listen, and read regions."""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

import hfvlm
from hfvlm.evaluation.painting import psnr
from hfvlm.training import PaintingCollator, RowTrainer
from learning.entries import Scores, learns
from learning.fitting import count_of, example, fit, rows_of, steps_of

TESTS = 200


@learns("dalle_mini", "draws what a text says", "the same model by the empty text")
def dalle_mini(seed: int, effort: float) -> dict[str, Scores]:
    script = example("draw_scenes")
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    kinds = [kind for kind in script.scenes.all_scenes() if kind.size == "large" and kind.shape in ("square", "cross")]
    train = [kind for kind in kinds for _ in range(count_of(40, effort))]
    pixels = script.rendered(train, random)
    with TemporaryDirectory() as folder:
        model, processor = script.new_model(Path(folder))
    script.fit_codec(model.codec, pixels, steps_of(200, effort))
    script.fit(model, processor, train, pixels, steps_of(300, effort))
    judge = script.fit_judge(kinds, random, steps_of(150, effort))
    asked = [kind for kind in kinds for _ in range(count_of(TESTS // len(kinds), effort))]
    found = []
    for texts, options in (([kind.caption() for kind in asked], {}), ([""] * len(asked), {"guidance_scale": 1})):
        drawn = model.draw(**processor(text=texts), top_k=0, **options)
        found.append(both_right(script, judge, drawn, asked))
    return {"drawings whose colour and shape, among twelve kinds, a classifier takes for the text's": Scores(*found)}


@torch.no_grad()
def both_right(script: Any, judge: Any, pixels: Tensor, kinds: list[Any]) -> np.ndarray:
    """Mark the images whose colour and shape are those of the kinds."""
    right = [scores.argmax(-1) == answer for scores, answer in zip(judge(pixels), script.answers(kinds), strict=True)]
    return (right[0] & right[1]).numpy().astype(float)


@learns("painter", "does with an image what a pair shows", "the same model, shown a pair that changes nothing")
def painter(seed: int, effort: float) -> dict[str, Scores]:
    script = example("painter_scenes")
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    colours = script.palette()[:: script.COLOURS // 4]
    tasks = {f"colour {i}": script.painted(colour, shape=False) for i, colour in enumerate(colours)}
    rows = [
        {"image": image, "target": paint(image, mask), "task": name}
        for _ in range(count_of(60, effort))
        for name, paint in tasks.items()
        for image, mask in [script.scene(random)]
    ]
    model, processor = painter_of(script)
    paint_rows(model, processor, rows, steps_of(300, effort), seed)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        engine = hfvlm.Painter.from_pretrained(folder, device="cpu")
    seeing, blind = [], []
    for name, paint in list(tasks.items()) * count_of(TESTS // 4 // len(tasks), effort):
        (shown, mask), (query, of_query) = script.scene(random), script.scene(random)
        for found, target in ((seeing, paint(shown, mask)), (blind, shown)):
            image = np.asarray(engine(query, (shown, target), task="image"))
            scores = {other: psnr(image, each(query, of_query)) for other, each in tasks.items()}
            found.append(float(max(scores, key=scores.__getitem__) == name))
    return {"paintings nearest to the shown one of four tasks": Scores(np.array(seeing), np.array(blind))}


def painter_of(script: Any) -> tuple[Any, Any]:
    """Make a small Painter with few patches."""
    patch, script.PATCH = script.PATCH, 16
    try:
        return script.new_model()
    finally:
        script.PATCH = patch


def paint_rows(model: Any, processor: Any, rows: list[dict[str, Any]], steps: int, seed: int) -> None:
    """Train on pairs of rows of a task."""
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, lr_scheduler_type="cosine",
            warmup_steps=0.05, weight_decay=0.05, adam_beta2=0.98, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, seed=seed, use_cpu=True,
        )  # fmt: skip
        collator = PaintingCollator(processor, 16, rows, half=0.5, augment=False)
        RowTrainer(model, arguments, data_collator=collator, train_dataset=rows).train()


@learns("merlot_reserve", "finds masked audio of a video by its frames", "the same model on black frames")
def merlot_reserve(seed: int, effort: float) -> dict[str, Scores]:
    script = example("merlot_reserve_sounds")
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder:
        model, processor = script.new_model(Path(folder) / "vocabulary.json")
        videos = script.Videos(processor, np.random.default_rng(seed), blind=False)
        script.fit(model, videos, Namespace(steps=steps_of(200, effort), batch=12))
        model.save_pretrained(folder)
        found = []
        for blind in (False, True):
            new = script.Videos(processor, np.random.default_rng(1000 + seed), blind=blind)
            found.append(np.array(script.masks_found(Path(folder), new, count_of(60, effort)), dtype=float))
    return {"masks whose tone, of six, is found": Scores(*found)}


@learns(
    "vilbert",
    "answers questions about regions, and finds the region that a text means",
    "the same model on empty regions",
)
def vilbert(seed: int, effort: float) -> dict[str, Scores]:
    script = example("vilbert_regions")
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    with TemporaryDirectory() as folder:
        model, processor = script.new_model(Path(folder) / "vocab.txt")
    tiles = script.rendered(random)
    kinds = [kind for kind in tiles if kind not in script.HELD_OUT]

    def rows(sort: str, count: int) -> dict[str, Tensor]:
        return processor.collate([script.example(processor, tiles, random, sort, kinds) for _ in range(count)])

    drawn = {sort: rows_of(rows(sort, count_of(1500, effort)), random) for sort in ("colour", "reference")}
    turns = iter(range(10**9))

    def batch() -> dict[str, Tensor]:
        sort = ("colour", "reference")[next(turns) % 2]
        return drawn[sort]() | {"sort": torch.tensor(sort == "reference")}

    def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        refers, labels = bool(inputs.pop("sort")), inputs.pop("labels")
        output = model(**inputs)
        if refers:
            return script.MEANT.loss(output.grounding_logits, labels)
        return script.ASKED.loss(output.answer_logits, labels)

    fit(model, batch, steps_of(500, effort), rate=1e-3, loss_of=loss_of)
    found = {}
    for sort, name in (("colour", "colours that are asked for"), ("reference", "regions that are meant, of four")):
        tests = rows(sort, count_of(TESTS, effort))
        labels = tests.pop("labels")
        found[name] = Scores(*(answered(script, model, tests, labels, sort, blind=blind) for blind in (False, True)))
    return found


@torch.no_grad()
def answered(
    script: Any, model: Any, tests: dict[str, Tensor], labels: Tensor, sort: str, *, blind: bool
) -> np.ndarray:
    """Score each example of a sort."""
    output = model(**script.hidden(dict(tests), blind=blind))
    if sort == "reference":
        return script.MEANT.score(output.grounding_logits, labels).numpy().astype(float)
    return script.ASKED.score(output.answer_logits, labels).numpy().astype(float)
