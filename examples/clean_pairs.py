"""Measure what each procedure of `hfvlm data` is worth: a small CLIP, trained on what it reads and on what it writes.

For each procedure a set of noisy pairs is generated, with the noise that it is for. Two models with the same start,
the same steps and batches of the same size learn from the set as it is and from the procedure's output. Both then
classify new images of all 48 kinds of scenes by their captions; 2 % would be right by chance.

    python examples/clean_pairs.py --output clean-pairs           # all, with two seeds: some minutes on a core
    python examples/clean_pairs.py --output clean-pairs --only filter --seeds 1
    python examples/clean_pairs.py --output clean-pairs --page docs/data.md

A trial that is there already is not repeated. `--page` writes the numbers and the reports into a page, between its
two marks.
"""

import argparse
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, set_seed

import hfvlm
from hfvlm.conversion.clip import processor_for
from hfvlm.data.balance import balance
from hfvlm.data.dedupe import dedupe
from hfvlm.data.filtering import Thresholds, filter_pairs
from hfvlm.data.nouns import nouns
from hfvlm.data.queries import FromWords
from hfvlm.data.report import Report
from hfvlm.evaluation.bootstrap import interval
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.media.rows import first_caption, load_rows
from hfvlm.samples import scenes
from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs

SIDES = ("input", "output")
BATCH = 48
BEGIN, END = "<!-- measured: examples/clean_pairs.py -->", "<!-- end -->"
Procedure = Callable[[Path, Path, argparse.Namespace], Report]


def filtered(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    """ALIGN's thresholds, where images have 32 pixels and captions of 192 kinds repeat."""
    return filter_pairs(rows, output, Thresholds(min_edge=9, max_images=options.rows // 50, min_count=2))


def deduplicated(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    return dedupe(rows, output)


def balanced(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    """A query for each kind of scene would be too kind: single words and pairs of neighbours are what a user has."""
    return balance(
        rows, output, method="clip", most=options.rows // 60, queries=FromWords(2, information=0.0), seed=options.seed
    )


def by_phrases(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    return nouns(rows, output, most=options.rows // 200, by="rules", seed=options.seed)


@dataclass(frozen=True)
class Trial:
    """A procedure and the noise that it is for."""

    run: Procedure
    shares: dict[str, float] = field(default_factory=dict)
    skew: float = 0.0


JUNK = ("boilerplate", "gibberish", "short", "long", "tiny", "elongated", "damaged")
TRIALS = {
    "filter": Trial(filtered, dict.fromkeys(JUNK, 0.1)),
    "dedupe": Trial(deduplicated, {"duplicate": 0.85}),
    "balance": Trial(balanced, skew=2.0),
    "nouns": Trial(by_phrases, skew=2.0),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=list(TRIALS), nargs="*", default=list(TRIALS))
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    logging.getLogger("hfvlm").setLevel(logging.ERROR)  # damaged images are there on purpose
    found = {name: [trial(name, seed, options) for seed in range(options.seeds)] for name in options.only}
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    if options.page:
        write_page(options.page, found, options)
    return found


def trial(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the models of one procedure with one seed."""
    options.seed, folder = seed, options.output / f"{name}-{seed}-{options.rows}-{options.steps}"
    chosen, done = TRIALS[name], folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    rows = folder / "rows"
    if not rows.exists():
        write_pairs(rows, noisy_pairs(options.rows, chosen.shares, skew=chosen.skew, seed=seed))
    report = chosen.run(rows, folder / "cleaned", options)
    result = {"rows": report.rows, "written": report.written, "report": report.tables(), "seed": seed}
    for which, data in (("input", rows), ("output", folder / "cleaned")):
        right = accuracy(*trained(data, options), seed)
        low, high = interval(lambda drawn, right=right: float(right[drawn].mean()), len(right))
        result[which] = {"accuracy": float(right.mean()), "low": low, "high": high}
    done.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}, seed {seed}: {result['input']['accuracy']:.3f} -> {result['output']['accuracy']:.3f}", flush=True)
    return result


def trained(rows: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """Train a CLIP of a quarter of a million parameters, from nothing."""
    set_seed(options.seed)
    preset = hfvlm.load_preset("clip/tiny")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    parts = {f"{part}_config": preset.config[f"{part}_config"] | small for part in ("vision", "text")}
    config = type(preset.make_config())(**preset.config | parts)
    model = AutoModel.from_config(config)
    processor = processor_for(config, preset.processor, files("hfvlm.samples") / "clip-tiny/bpe_simple_vocab.txt.gz")
    inputs = read(rows, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    random, order = np.random.default_rng(options.seed), np.empty(0, np.int64)
    model.train()
    for _ in range(options.steps):
        while len(order) < BATCH:
            order = np.concatenate([order, random.permutation(len(inputs["input_ids"]))])
        chosen, order = torch.from_numpy(order[:BATCH]), order[BATCH:]
        model(**{name: values[chosen] for name, values in inputs.items()}, return_loss=True).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, processor


def read(rows: Path, processor: Any) -> dict[str, torch.Tensor]:
    """Read all pairs whose images can be read, each with its first caption; a model trains on nothing else."""
    images, texts = [], []
    for row in load_rows(str(rows), split="train"):
        with suppress(MediaError):
            images.append(read_image(row["image"]))
            texts.append(first_caption(row["text"]))
    return dict(processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt"))


def accuracy(model: Any, processor: Any, seed: int, each: int = 10) -> np.ndarray:
    """Of new images of each kind of scene, which are nearest to their own caption."""
    random, kinds = np.random.RandomState(10_000 + seed), scenes.all_scenes()
    embedder = hfvlm.Embedder(model, processor)
    texts = embedder.encode(text=[kind.caption() for kind in kinds])
    images = embedder.encode(image=[kind.render(random) for kind in kinds for _ in range(each)], batch_size=128)
    return (images @ texts.T).argmax(axis=1) == np.repeat(np.arange(len(kinds)), each)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a row for each procedure and seed."""
    lines = ["| procedure | seed | rows read | rows written | trained on what it reads | trained on what it writes |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, results in found.items():
        for each in results:
            shown = [f"{each[k]['accuracy']:.3f} ({each[k]['low']:.3f} to {each[k]['high']:.3f})" for k in SIDES]
            cells = [f"`{name}`", each["seed"], each["rows"], each["written"], *shown]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_page(page: Path, found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Write the numbers and the reports of the first seed between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    gains = {k: fmean(each["output"]["accuracy"] - each["input"]["accuracy"] for each in v) for k, v in found.items()}
    lines = [
        f"{options.rows} pairs, {options.steps} steps of {BATCH}; accuracy on 480 new images of 48 kinds, with the",
        "interval of 95 % by bootstrap over images. Mean gains over the seeds: "
        + ", ".join(f"`{name}` {gain:+.3f}" for name, gain in gains.items())
        + ".",
        "",
        table(found),
    ]
    for name, results in found.items():
        report = results[0]["report"].partition("\n## ")[0].replace("# ", "", 1)  # without the table of keys
        lines += ["", f"### The report of {name}", "", "```text", report.rstrip(), "```"]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
