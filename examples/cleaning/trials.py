"""What trials share: how they are described, how small models are trained, and a CLIP that learns from pairs."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, set_seed

import hfvlm
from hfvlm.conversion.clip import processor_for
from hfvlm.data.report import Report
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.media.rows import captions_of, load_rows
from hfvlm.samples import scenes

BATCH = 48
Batch = dict[str, torch.Tensor]
Measures = dict[str, float]


def no_measures(rows: Path, output: Path, options: argparse.Namespace) -> Measures:
    return {}


@dataclass(frozen=True)
class Trial:
    """A procedure, the data that it is for, and what is learned from them.

    Args:
        write: writes the data into a folder, of `options.rows` and `options.seed`.
        run: the procedure: the folder of the data, the output, and the options.
        right: trains on a folder, or on some rows of it, and returns for each test example by name of the score
            whether it was right; the first score is compared.
        written: the folder of the rows in the output.
        chooses: rows are chosen, as which as many can be drawn by chance.
        measure: what else is known of the output: the folder of the data, the output, and the options.
    """

    write: Callable[[Path, argparse.Namespace], None]
    run: Callable[[Path, Path, argparse.Namespace], Report]
    right: Callable[[Path, argparse.Namespace, int | None], dict[str, np.ndarray]]
    written: str = "."
    chooses: bool = False
    measure: Callable[[Path, Path, argparse.Namespace], Measures] = no_measures


def fit(model: Any, batch: Callable[[], Batch], steps: int, **keywords: Any) -> None:
    """Train a model by its own loss, and leave it in inference mode; `keywords` are of its forward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        model(**batch(), **keywords).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def batches(inputs: Batch, seed: int, size: int = BATCH) -> Callable[[], Batch]:
    """Return a function that draws batches of rows; all of them, before one comes again."""
    random, order = np.random.default_rng(seed), np.empty(0, np.int64)
    count = len(next(iter(inputs.values())))

    def draw() -> Batch:
        nonlocal order
        while len(order) < size:
            order = np.concatenate([order, random.permutation(count)])
        chosen, order = torch.from_numpy(order[:size]), order[size:]
        return {name: values[chosen] for name, values in inputs.items()}

    return draw


def names_of_kinds(rows: Path, options: argparse.Namespace, count: int | None) -> dict[str, np.ndarray]:
    """Train a CLIP on pairs, and let it classify new images of all kinds of scenes by their captions."""
    return {"accuracy": accuracy(*trained(rows, options, count), options.seed)}


def trained(rows: Path, options: argparse.Namespace, count: int | None) -> tuple[Any, Any]:
    """Train a CLIP of a quarter of a million parameters, from nothing, on all rows or on as many by chance."""
    set_seed(options.seed)
    preset = hfvlm.load_preset("clip/tiny")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    parts = {f"{part}_config": preset.config[f"{part}_config"] | small for part in ("vision", "text")}
    config = type(preset.make_config())(**preset.config | parts)
    model = AutoModel.from_config(config)
    processor = processor_for(config, preset.processor, files("hfvlm.samples") / "clip-tiny/bpe_simple_vocab.txt.gz")
    found = load_rows(str(rows), split="train")
    if count is not None:
        found = found.select(np.random.default_rng(options.seed).permutation(len(found))[:count])
    fit(model, batches(read(found, processor), options.seed), options.steps, return_loss=True)
    return model, processor


def read(rows: Any, processor: Any) -> Batch:
    """Read all pairs whose images can be read, an image with several captions several times."""
    images, texts = [], []
    for row in rows:
        with suppress(MediaError):
            image = read_image(row["image"])
            for text in captions_of(row["text"]):
                images.append(image)
                texts.append(text)
    return dict(processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt"))


def accuracy(model: Any, processor: Any, seed: int, each: int = 10) -> np.ndarray:
    """Of new images of each kind of scene, which are nearest to their own caption."""
    random, kinds = np.random.RandomState(10_000 + seed), scenes.all_scenes()
    embedder = hfvlm.Embedder(model, processor)
    texts = embedder.encode(text=[kind.caption() for kind in kinds])
    images = embedder.encode(image=[kind.render(random) for kind in kinds for _ in range(each)], batch_size=128)
    return (images @ texts.T).argmax(axis=1) == np.repeat(np.arange(len(kinds)), each)
