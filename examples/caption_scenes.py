"""Train a small CoCa to name images and to write about them, with both of its losses at once.

The scenes have six colours, four shapes and two sizes. Of the 48 kinds, eight are held out: the model is asked to
write about them without ever having seen such a combination. What it writes is judged attribute by attribute, beside
what it writes about a grey image, and the same weights classify the held-out images by names alone.

    python examples/caption_scenes.py --output coca-scenes        # some minutes on two cores
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, set_seed

import hfvlm
from hfvlm.conversion.coca import processor_for
from hfvlm.samples import scenes
from hfvlm.training import short_run

HELD_OUT = 8


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--pictures", type=int, default=30, help="of each kind in training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    train, test = split(random)
    model, processor = new_model()
    fit(model, processor, rows(train, random, options.pictures), options)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    found = judge(options.output, test, random)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


def split(random: np.random.RandomState) -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    """Every colour, shape and size occurs in training, but not all together."""
    kinds = scenes.all_scenes()
    order = random.permutation(len(kinds))
    return [kinds[i] for i in order[HELD_OUT:]], [kinds[i] for i in order[:HELD_OUT]]


def rows(kinds: list[scenes.Scene], random: np.random.RandomState, count: int) -> list[dict[str, Any]]:
    captions = [[kind.caption(template) for template in scenes.TEMPLATES] for kind in kinds]
    pairs = zip(kinds, captions, strict=True)
    return [{"image": kind.render(random), "text": texts} for kind, texts in pairs for _ in range(count)]


def new_model() -> tuple[Any, Any]:
    """A CoCa of half a million parameters that knows nothing, with the small CLIP's vocabulary."""
    preset = hfvlm.load_preset("coca/tiny")
    config = preset.make_config()
    vocabulary = files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz"
    return AutoModel.from_config(config), processor_for(config, preset.processor, vocabulary)


def fit(model: Any, processor: Any, pictures: list[dict[str, Any]], options: argparse.Namespace) -> None:
    changes = {"per_device_train_batch_size": 40, "warmup_steps": 0.1, "weight_decay": 0.1, "adam_beta2": 0.98}
    arguments = short_run(
        options.output / "run", options.steps, hfvlm.ContrastiveTrainingArguments, seed=options.seed, **changes
    )
    hfvlm.ContrastiveTrainer(model, arguments, train_dataset=pictures, processing_class=processor).train()


def judge(folder: Path, test: list[scenes.Scene], random: np.random.RandomState) -> dict[str, float]:
    """Shares of attributes that captions of unseen kinds name, with and without the image, and of names."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    kinds = [kind for kind in test for _ in range(10)]
    pictures = [kind.render(random) for kind in kinds]
    captioner = hfvlm.Captioner(model, processor, max_new_tokens=16)
    written = captioner(pictures)
    blind = captioner([Image.new("RGB", (32, 32), "gray")] * len(kinds))
    names = sorted({(kind.colour, kind.shape, kind.size) for kind in scenes.all_scenes()})
    labels = [scenes.Scene(*name).caption() for name in names]
    classifier = hfvlm.ZeroShotClassifier(hfvlm.Embedder(model, processor), labels, "name")
    chosen = [best[0][0] for best in classifier.predict(pictures)]
    return {
        "attributes named": named(written, kinds),
        "attributes named blindly": named(blind, kinds),
        "zero-shot accuracy among 48": float(np.mean([a == b.caption() for a, b in zip(chosen, kinds, strict=True)])),
    }


def named(captions: list[str], kinds: list[scenes.Scene]) -> float:
    """The share of colours, shapes and sizes that captions say, and no other one of the same sort."""
    sorts = [("colour", set(scenes.COLOURS)), ("shape", set(scenes.SHAPES)), ("size", set(scenes.SIZES))]
    right = [
        set(caption.replace(",", " ").split()) & words == {getattr(kind, sort)}
        for caption, kind in zip(captions, kinds, strict=True)
        for sort, words in sorts
    ]
    return float(np.mean(right))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
