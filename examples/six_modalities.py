"""Train a small ImageBind or LanguageBind from nothing on events that seven sensors perceive, and show what emerges.

Each event is a coloured shape: an image of it, a video in which it moves, a caption, a tone (its pitch tells the
colour, its rhythm the shape), a depth map, a thermal image, and the trace of a motion sensor. As in the papers,
ImageBind is trained on pairs with an image alone, LanguageBind, which has no sense of motion, on pairs with a caption
alone. Afterwards audio clips find depth maps, which it never saw together:

    python examples/six_modalities.py --output imagebind-scenes
    python examples/six_modalities.py --output languagebind-scenes --preset languagebind/tiny

writes the model, `recall.json`, and `recall.png`, a heat map of how often each modality finds another.
Needs `pip install 'hfvlm[eval]'`; a few minutes on two cores.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from hfvlm.presets import Preset, load_preset
from hfvlm.release.sources import conversion_of
from hfvlm.samples.events import EVENTS, perceive

VOCABULARY = files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz"


def prepare(processor: Any, seeds: range) -> dict[str, dict[str, Tensor]]:
    """Every event once for each seed -> each modality's inputs, `(seeds, events, ...)`."""
    rows = [perceive(event, 1000 * seed + i) for seed in seeds for i, event in enumerate(EVENTS)]
    inputs = {}
    for modality in processor.modalities:
        options = {"padding": "max_length"} if modality == "text" else {}
        batch = processor.prepare(modality, [row[modality] for row in rows], **options)
        inputs[modality] = {k: v.unflatten(0, (len(seeds), len(EVENTS))) for k, v in batch.items()}
    return inputs


def train(model: Any, inputs: dict[str, dict[str, Tensor]], steps: int, rate: float) -> None:
    """Each step takes one perception of every event in every modality, and binds them as the model's loss does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    views = len(inputs["image"]["pixel_values"])
    model.train()
    for step in range(steps):
        pick = int(torch.randint(views, ()))
        batch = {name: value[pick] for part in inputs.values() for name, value in part.items()}
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def recall(model: Any, inputs: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """How often the nearest perception in another modality is of the same event; each against one of every event."""
    model.eval()
    embeds = {}
    for modality, parts in inputs.items():
        flat = {name: value.flatten(0, 1) for name, value in parts.items()}
        features = getattr(model, f"get_{modality}_features")(**flat).pooler_output
        embeds[modality] = torch.nn.functional.normalize(features, dim=-1).unflatten(0, (-1, len(EVENTS)))
    truth = torch.arange(len(EVENTS))
    # Positives come from another view, so that equal positions in the image do not help.
    return {
        a: {b: ((x @ y.roll(1, 0).mT).argmax(-1) == truth).float().mean().item() for b, y in embeds.items()}
        for a, x in embeds.items()
    }


def build(preset: Preset) -> tuple[Any, Any]:
    """A new model, and a processor that suits these events; its defaults are of the released models' data."""
    config = preset.make_config()
    processor = conversion_of(preset.architecture).processor_for(config, preset.processor, VOCABULARY)
    if preset.architecture == "imagebind":
        config.imu_config.drop_path_rate = config.audio_config.drop_path_rate = 0.0
        config.imu_config.projection_dropout = 0.0
        processor.feature_extractor.num_clips = processor.video_feature_extractor.num_clips = 1
        processor.video_feature_extractor.num_crops = 1
        processor.depth_feature_extractor.mean, processor.depth_feature_extractor.std = 10.0, 6.0
        processor.thermal_feature_extractor.mean, processor.thermal_feature_extractor.std = 0.2, 0.2
    return AutoModel.from_config(config), processor


def draw(table: dict[str, dict[str, float]], path: Path, anchor: str) -> None:
    from matplotlib.figure import Figure

    names = list(table)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    values = np.array([[table[a][b] for b in names] for a in names])
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="found", ylabel="asked with")
    chance = 1 / len(EVENTS)
    axes.set_title(f"Recall at 1 among {len(EVENTS)} events (chance {chance:.0%}),\ntrained in pairs with {anchor}s")
    figure.colorbar(picture)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=("imagebind/tiny", "languagebind/tiny"), default="imagebind/tiny")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--views", type=int, default=120, help="of each event in training")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    model, processor = build(load_preset(options.preset))
    train(model, prepare(processor, range(options.views)), options.steps, options.rate)
    table = recall(model, prepare(processor, range(options.views, options.views + 10)))
    options.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    (options.output / "recall.json").write_text(json.dumps(table, indent=2) + "\n")
    draw(table, options.output / "recall.png", model.anchor)
    for a, row in table.items():
        print(f"{a:>8} " + " ".join(f"{b} {value:4.0%}" for b, value in row.items()))
    return table


if __name__ == "__main__":
    main()
