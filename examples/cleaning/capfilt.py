"""The trial of `hfvlm data capfilt`: a small BLIP that learned from clean pairs mends noisy ones."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, set_seed

import hfvlm
from cleaning.choosing import with_noise
from cleaning.trials import Measures, Trial, fit, names_of_kinds
from hfvlm.conversion.blip import processor_for
from hfvlm.data.bootstrapping import bootstrap
from hfvlm.data.report import Report
from hfvlm.inference.capfilt import CAPTIONS
from hfvlm.media.rows import load_rows
from hfvlm.models.blip import HfvlmBLIPForImageTextRetrieval
from hfvlm.modules.context import Context
from hfvlm.samples import scenes

WRONG = 0.6
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# New images of each kind, by which the filter's threshold is chosen.
CHOOSE = 4
SORTS = (scenes.COLOURS, scenes.SHAPES, scenes.SIZES)


def parts(folder: Path) -> tuple[Any, Any]:
    """Return the configuration and the processor of a small BLIP with a vocabulary of the captions' words."""
    preset = hfvlm.load_preset("blip/tiny")
    texts = [kind.caption(template) for kind in scenes.all_scenes() for template in scenes.TEMPLATES]
    pieces = [*BERT, ",", *sorted({word for text in texts for word in text.replace(",", "").split()})]
    path, size = folder / "vocab.txt", len(pieces)
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    ids = {"vocab_size": size + 2, "bos_token_id": size, "encoder_token_id": size + 1}
    ids |= {"eos_token_id": BERT.index("[SEP]"), "pad_token_id": BERT.index("[PAD]")}
    text = preset.config["text_config"] | SMALL | ids | {"context_size": SMALL["hidden_size"]}
    vision = preset.config["vision_config"] | SMALL
    config = type(preset.make_config())(**preset.config | {"vision_config": vision, "text_config": text})
    return config, processor_for(config, preset.processor, path)


class Clean:
    """Clean pairs: some images of each kind, each with all of its captions, as COCO's.

    Args:
        processor: of the models.
        each: images of a kind.
        random: of what is drawn.
    """

    def __init__(self, processor: Any, each: int, random: np.random.RandomState):
        kinds, self.random = scenes.all_scenes(), random
        self.kinds, self.each = len(kinds), each * len(scenes.TEMPLATES)
        images = [image for kind in kinds for image in renders(kind, each, random) for _ in scenes.TEMPLATES]
        texts = [kind.caption(template) for kind in kinds for _ in range(each) for template in scenes.TEMPLATES]
        self.inputs = dict(processor.captions(images, texts))

    def batch(self) -> dict[str, Any]:
        """Draw a pair of each kind, so that no pair is among another's negatives."""
        rows = np.arange(self.kinds) * self.each + self.random.randint(self.each, size=self.kinds)
        return {name: values[torch.from_numpy(rows)] for name, values in self.inputs.items()}

    def pairs(self) -> dict[str, Any]:
        """Draw a batch without labels."""
        drawn = self.batch()
        drawn.pop("labels")
        return drawn


def renders(kind: scenes.Scene, count: int, random: np.random.RandomState) -> list[Any]:
    return [kind.render(random) for _ in range(count)]


def bootstrapped(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    """Train a captioner and a filter on clean pairs, and bootstrap the noisy ones."""
    set_seed(options.seed)
    folder, random = rows.parent, np.random.RandomState(20_000 + options.seed)
    config, processor = parts(folder)
    clean = Clean(processor, max(1, options.rows // 60), random)
    steps = options.steps * 5 // 2
    captioner: Any = AutoModelForImageTextToText.from_config(config)
    fit(captioner, clean.batch, steps)
    judge: Any = HfvlmBLIPForImageTextRetrieval(config)
    judge.load_state_dict(begun(judge.state_dict(), captioner.state_dict()))
    fit(judge, clean.pairs, steps, return_loss=True)
    for name, model in (("captioner", captioner), ("judge", judge)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    least = threshold(judge, processor, random)
    (report,) = bootstrap(
        rows, output, folder / "captioner", folder / "judge", {}, threshold=least, batch_size=64, seed=options.seed
    )
    return report


def begun(state: dict[str, Any], captioner: dict[str, Any]) -> dict[str, Any]:
    """Begin the filter with the captioner's weights: all of BLIP's parts come from one pre-training."""
    names = {name: name.replace("text_model.", "text_decoder.") for name in state}
    return state | {
        name: captioner[other]
        for name, other in names.items()
        if other in captioner and captioner[other].shape == state[name].shape
    }


@torch.inference_mode()
def threshold(judge: Any, processor: Any, random: np.random.RandomState) -> float:
    """Return the probability of a match by which captions of new clean images are best separated from others'.

    With two hard negatives to each pair and few steps, the probabilities are low, and 0.5 is not in their middle.
    """
    kinds = scenes.all_scenes()
    shown = [kind for kind in kinds for _ in range(CHOOSE)]
    others = [kinds[(kinds.index(kind) + random.randint(1, len(kinds))) % len(kinds)] for kind in shown]
    texts = [kind.caption(random.choice(scenes.TEMPLATES)) for kind in [*shown, *others]]
    images = [kind.render(random) for kind in shown] * 2
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    context = Context(judge.vision_model(inputs["pixel_values"]).last_hidden_state)
    logits = judge.match(inputs["input_ids"], inputs["attention_mask"], context)
    own, other = logits.softmax(dim=-1)[:, 1].double().numpy().reshape(2, -1)
    return float(max(np.concatenate([own, other]), key=lambda least: (own >= least).mean() + (other < least).mean()))


def truths(rows: Path, output: Path, options: argparse.Namespace) -> Measures:
    """Count the texts that are true of their images, given, generated and kept, and their words."""
    from pyarrow import parquet

    labels = [row["label"] for row in load_rows(str(rows), split="train")]
    counts: dict[str, list[float]] = {}
    for shard in sorted((output / "round-1" / "captions").glob(f"{CAPTIONS}-*.parquet")):
        for row in parquet.read_table(shard).to_pylist():
            for kind, name in (("given", "given"), ("written", "generated")):
                share, kept = true_words(row[kind], labels[row["row"]]), row[kind] in row["kept"]
                sort = "true" if share == 1 else "false"
                counts.setdefault(f"{sort} {name} texts that are kept", []).append(kept)
                for group in (name, *["kept"] * kept):
                    counts.setdefault(f"{group} texts that are true", []).append(share == 1)
                    counts.setdefault(f"words of {group} texts that are true", []).append(share)
    return {name: float(np.mean(found)) for name, found in sorted(counts.items())}


def true_words(text: str, label: str) -> float:
    """Return the share of a label's colour, shape and size that a text names, and no other one of the sort."""
    said, truth = ({*each.replace(",", " ").split()} for each in (text, label))
    return float(np.mean([said & set(sort) == truth & set(sort) for sort in SORTS]))


TRIAL = Trial(with_noise({"wrong": WRONG}), bootstrapped, names_of_kinds, written="round-1/pairs", measure=truths)
