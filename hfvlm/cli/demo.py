"""`hfvlm demo`: from an authors' checkpoint to a fine-tuned model with a card, on real handwriting, in minutes."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments, pipeline, set_seed

from hfvlm.cli.console import note, print_table, progress
from hfvlm.cli.outputs import foreign_files, is_empty, written_here
from hfvlm.logs import shows_progress
from hfvlm.modeling.base import unit
from hfvlm.release.converter import convert
from hfvlm.release.hub import write_card
from hfvlm.samples import digits, scenes
from hfvlm.samples.digits import TEMPLATES, Digit, caption
from hfvlm.training.lora import lora
from hfvlm.writing import new_folder

KNOWN, NEW = list(range(8)), [8, 9]
EVERY = [*KNOWN, *NEW]
RELEASED, TUNED = "clip-tiny", "clip-tiny-ten-digits"
MEASURED = {
    "one_prompt": "0-7 among eight, one prompt",
    "ensemble": "0-7 among eight, ensemble",
    "known": "0-7 among ten",
    "new": "8 and 9 among ten",
}
DRAWN = ("confusion.png", "retrieval.png")
SHOTS, STEPS, RANK, LEARNING_RATE = 24, 300, 16, 2e-3


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of a model on held-out images."""

    one_prompt: float  # known digits, among the eight, one prompt a class
    ensemble: float  # the same with all prompt templates
    known: float  # known digits, among all ten
    new: float  # the two new digits, among all ten
    predictions: list[int]  # of every held-out image, among all ten


def demo(output: Path, seed: int = 0) -> Path:
    """Run the demo; return the folder, which replaces an earlier demo's.

    Raises:
        FileExistsError: the folder has something that no demo wrote.
        ImportError: the demo's libraries are not installed; the message names the pip line.
        RuntimeError: the reloaded model gives other logits than the saved one.
    """
    check_libraries()
    check_own(output)
    start = time.perf_counter()
    set_seed(seed)
    with new_folder(output, overwrite=True) as folder:
        released, tuned = folder / RELEASED, folder / TUNED
        convert_shipped(released)
        held_out = digits.load_digits("test")
        before = measure(released, held_out, "before")
        model, processor = fine_tune(released, seed)
        model.save_pretrained(tuned)
        processor.save_pretrained(tuned)
        after = measure(tuned, held_out, "after")
        results = report(before, after, held_out)
        write_card(tuned, name=tuned.name, results=results, text=f"Trained with seed {seed}.")
        draw_confusion(before, after, held_out, tuned / DRAWN[0])
        draw_retrieval(model, processor, held_out, tuned / DRAWN[1])
        same_after_reload(model, processor, tuned, held_out)
    print_table(summary(before, after), (f"{len(held_out)} held-out images", "before", "after LoRA"))
    note(f"{output}: two model folders, cards and images; {time.perf_counter() - start:.0f} s", err=False)
    return output


def check_libraries() -> None:
    """Refuse to begin without the demo's libraries.

    Raises:
        ImportError: one is not installed; the message names the pip line.
    """
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The demo needs {error.name}: `pip install 'hfvlm[demo]'`.") from error


def check_own(output: Path) -> None:
    """Refuse a folder with anything but an earlier demo's two models.

    Raises:
        FileExistsError: it has something else; the message names it.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output}: is no folder: choose another output.")
    for entry in sorted(output.iterdir()):
        if entry.name not in (RELEASED, TUNED) or not entry.is_dir() or entry.is_symlink():
            raise FileExistsError(f"{output}: has {entry.name}, which no demo wrote: choose another output.")
        if foreign := foreign_files(entry, DRAWN):
            raise FileExistsError(f"{entry}: has {foreign[0]}, which no demo wrote: choose another output.")
        if not is_empty(entry) and not written_here(entry):
            raise FileExistsError(f"{entry}: no demo wrote it: choose another output.")


def convert_shipped(folder: Path) -> None:
    """Convert the checkpoint that ships with hfvlm, in OpenAI's layout."""
    note("convert the authors' checkpoint")
    with as_file(files("hfvlm.samples").joinpath("clip-tiny")) as shipped:
        convert(shipped / "clip-tiny.pt", "clip/tiny", folder)
    note(f"{folder.name}: config.json, model.safetensors, processor, card")


def measure(folder: Path, held_out: Sequence[Digit], when: str) -> Accuracy:
    """Classify held-out handwriting with transformers' own pipeline."""
    note(f"zero-shot classification {when} fine-tuning")
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    known = [digit for digit in held_out if digit.label in KNOWN]
    among_ten = [name_one(classify, digit, EVERY, TEMPLATES[:1]) for digit in progress(held_out, "ten digits")]
    one = [name_one(classify, digit, KNOWN, TEMPLATES[:1]) for digit in progress(known, "one prompt")]
    every = [name_one(classify, digit, KNOWN, TEMPLATES) for digit in progress(known, "all prompt templates")]
    hits = {
        label: [p == label for p, d in zip(among_ten, held_out, strict=True) if d.label == label] for label in EVERY
    }
    return Accuracy(
        one_prompt=np.mean([p == d.label for p, d in zip(one, known, strict=True)]).item(),
        ensemble=np.mean([p == d.label for p, d in zip(every, known, strict=True)]).item(),
        known=np.mean([hit for label in KNOWN for hit in hits[label]]).item(),
        new=np.mean([hit for label in NEW for hit in hits[label]]).item(),
        predictions=among_ten,
    )


def name_one(classify: Any, digit: Digit, labels: Sequence[int], templates: Sequence[str]) -> int:
    """Return the label whose captions together get the highest probability."""
    captions = {caption(label, template): label for label in labels for template in templates}
    share = dict.fromkeys(labels, 0.0)
    for answer in classify(digit.image, candidate_labels=list(captions), hypothesis_template="{}"):
        share[captions[answer["label"]]] += answer["score"]
    return max(share, key=lambda label: share[label])


class TenDigits(torch.utils.data.Dataset[list[tuple[Any, str]]]):
    """Items are whole batches: one captioned image of each digit, so that no caption fits two of them."""

    def __init__(self, seed: int):
        every = digits.load_digits("train")
        self.seed = seed
        self.few = {label: [d.image for d in every if d.label == label] for label in EVERY}
        self.few |= {label: self.few[label][:SHOTS] for label in NEW}

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> list[tuple[Any, str]]:
        random = np.random.RandomState(self.seed * STEPS + index)
        return [
            (self.few[label][random.randint(len(self.few[label]))], caption(label, random.choice(TEMPLATES)))
            for label in EVERY
        ]


def collate(processor: Any, batches: list[list[tuple[Any, str]]]) -> dict[str, Any]:
    """Make the model's inputs of one batch."""
    images, texts = zip(*(pair for batch in batches for pair in batch), strict=True)
    return dict(processor(images=list(images), text=list(texts))) | {"return_loss": True}


def fine_tune(folder: Path, seed: int) -> tuple[PreTrainedModel, Any]:
    """Adapt with LoRA to a few examples of 8 and 9, among images of the digits that the model was trained on."""
    note(f"LoRA with the Trainer, {SHOTS} examples each of 8 and 9")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tuned = lora(model, "vision+text", r=RANK, quiet=not shows_progress())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        collator = partial(collate, processor)
        Trainer(tuned, arguments, data_collator=collator, train_dataset=TenDigits(seed)).train()
    return tuned.merge_and_unload().eval(), processor


def same_after_reload(model: PreTrainedModel, processor: Any, folder: Path, held_out: Sequence[Digit]) -> None:
    """Compare the logits of a model with those of the folder that it was saved to.

    Raises:
        RuntimeError: they differ.
    """
    note("reload")
    inputs = processor(images=[d.image for d in held_out[:16]], text=[caption(label, TEMPLATES[0]) for label in EVERY])
    again = AutoModel.from_pretrained(folder).eval()
    fresh = AutoProcessor.from_pretrained(folder)
    repeat = fresh(images=[d.image for d in held_out[:16]], text=[caption(label, TEMPLATES[0]) for label in EVERY])
    with torch.no_grad():
        saved, loaded = model(**inputs).logits_per_image, again(**repeat).logits_per_image
    if not torch.equal(saved, loaded):
        raise RuntimeError(f"{folder}: the reloaded model's logits differ by {(saved - loaded).abs().max():.2e}.")
    note("the reloaded folder gives the same logits, bit by bit")


def report(before: Accuracy, after: Accuracy, held_out: Sequence[Digit]) -> list[dict[str, Any]]:
    """Return the measured numbers with their protocol, for the card."""
    new = sum(d.label in NEW for d in held_out)
    known = len(held_out) - new
    data = "scikit-learn digits, held-out quarter"
    one, every = f"prompt '{TEMPLATES[0]}'", f"{len(TEMPLATES)} prompt templates, probabilities summed"
    eight, ten = f"{known} images of 0-7 among 8 classes", f"{known} images of 0-7 among 10 classes"
    protocols = (
        f"{eight}, {one}",
        f"{eight}, {every}",
        f"{ten}, {one}",
        f"{new} images of 8 and 9 among 10 classes, {one}",
    )
    return [
        {
            "task": "zero-shot-image-classification",
            "dataset": data,
            "metric": "accuracy",
            "name": f"accuracy, {name}",
            "value": getattr(after, field),
            "protocol": f"{protocol}; {getattr(before, field):.1%} before fine-tuning; float32, CPU",
        }
        for (field, name), protocol in zip(MEASURED.items(), protocols, strict=True)
    ]


def summary(before: Accuracy, after: Accuracy) -> list[tuple[str, str, str]]:
    """Return the rows to print."""
    fields = MEASURED.items()
    return [(name, f"{getattr(before, field):.1%}", f"{getattr(after, field):.1%}") for field, name in fields]


def draw_confusion(before: Accuracy, after: Accuracy, held_out: Sequence[Digit], path: Path) -> None:
    """Draw the confusion matrices: rows are the handwritten digits, columns the predicted ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (title, result) in zip(figure.subplots(1, 2), (("before", before), ("after LoRA", after)), strict=True):
        counts = np.zeros((len(EVERY), len(EVERY)), dtype=int)
        for digit, predicted in zip(held_out, result.predictions, strict=True):
            counts[digit.label, predicted] += 1
        axes.imshow(counts / counts.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero(), strict=True):
            light = counts[row, column] > counts[row].sum() / 2
            axes.text(column, row, counts[row, column], ha="center", va="center", color="white" if light else "black")
        axes.set(title=title, xticks=EVERY, yticks=EVERY, xlabel="model", ylabel="handwriting")
    figure.savefig(path, dpi=120)


def draw_retrieval(model: Any, processor: Any, held_out: Sequence[Digit], path: Path) -> None:
    """Draw the six images that fit each text best, among handwriting and scenes."""
    from matplotlib.figure import Figure

    random = np.random.RandomState(0)
    gallery = [d.image for d in held_out] + [scene.render(random) for scene in scenes.all_scenes() for _ in range(6)]
    texts = [caption(label, TEMPLATES[0]) for label in (3, 8, 9)]
    texts += ["a large red circle", "a small blue triangle", "a large yellow cross"]
    with torch.no_grad():
        images = unit(model.get_image_features(**processor(images=gallery)).pooler_output)
        queries = unit(model.get_text_features(**processor(text=texts)).pooler_output)
    best = (queries @ images.t()).topk(6).indices.tolist()
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    for text, found, line in zip(texts, best, figure.subplots(len(texts), 6), strict=True):
        for axes, index in zip(line, found, strict=True):
            axes.imshow(gallery[index])
            axes.axis("off")
        line[0].set_title(text, loc="left", fontsize=9)
    figure.savefig(path, dpi=120)
