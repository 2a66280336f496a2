"""Models that write about images: captions, and answers to questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfvlm.inference.captioner import Captioner
from hfvlm.samples import scenes
from learning.dual_encoders import NAMES, Pairs, loss_of_pairs
from learning.entries import Scores, learns
from learning.fitting import count_of, equal, fit, grey, rows_of, steps_of, untrained

BLIND = "the same model on grey images"
WRITES = "colours, shapes and sizes that captions name, of kinds that are held out"
ANSWERS = "right answers about kinds that are held out"
HELD_OUT, TRAIN, TESTS = 8, 30, 20
QUESTIONS = {"colour": "what colour is the shape ?", "shape": "what shape is in the picture ?"}


def split(random: np.random.RandomState, effort: float) -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    """Repeat every kind, for training and, of others, for the test; less often at a small effort."""
    kinds = scenes.all_scenes()
    order = random.permutation(len(kinds))
    train, test = ([kinds[i] for i in part] for part in (order[HELD_OUT:], order[:HELD_OUT]))
    views, tests = count_of(TRAIN, effort), count_of(TESTS, effort)
    return [kind for kind in train for _ in range(views)], [kind for kind in test for _ in range(tests)]


def named(captions: Sequence[str], kinds: Sequence[scenes.Scene]) -> np.ndarray:
    """Compute the share of a kind's colour, shape and size that its caption names, and no other one of the sort."""
    sorts = {"colour": set(scenes.COLOURS), "shape": set(scenes.SHAPES), "size": set(scenes.SIZES)}
    found = []
    for caption, kind in zip(captions, kinds, strict=True):
        said = set(caption.replace(",", " ").split())
        found.append(np.mean([said & words == {getattr(kind, sort)} for sort, words in sorts.items()]))
    return np.array(found, dtype=float)


def written(
    model: Any, processor: Any, kinds: Sequence[scenes.Scene], images: Sequence[Any], **options: Any
) -> Scores:
    """Let a model caption images, and grey ones."""
    caption = Captioner(model, processor, do_sample=False, **options)
    return Scores(*(named(caption(given), kinds) for given in (list(images), grey(images))))


def compared_and_written(name: str, seed: int, effort: float) -> dict[str, Scores]:
    """Train a model by both of its losses at once."""
    torch.manual_seed(seed)
    model, processor = untrained(name, seed)
    pairs = Pairs(processor, np.random.RandomState(seed), effort=effort)
    fit(model, pairs.batch, steps_of(500, effort), loss_of=loss_of_pairs)
    found = written(model, processor, pairs.asked, pairs.shown, max_new_tokens=16)
    return {WRITES: found, NAMES: pairs.named(model)}


@learns("coca", "compares and captions with one model", BLIND)
def coca(seed: int, effort: float) -> dict[str, Scores]:
    return compared_and_written("coca", seed, effort)


@learns("mammut", "compares and captions with one decoder of two passes", BLIND)
def mammut(seed: int, effort: float) -> dict[str, Scores]:
    return compared_and_written("mammut", seed, effort)


@learns("blip", "answers questions about images with its image-grounded encoder and decoder", BLIND)
def blip(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model, processor = untrained("blip", seed, "HfvlmBLIPForQuestionAnswering")
    train, test = split(random, effort)
    shown, asked, truth = questions(train, random)
    inputs = dict(processor(images=shown, text=asked, padding=True, return_tensors="pt"))
    inputs["labels"] = processor.answers(truth)
    fit(model, rows_of(inputs, random), steps_of(1600, effort), rate=1e-3)
    shown, asked, truth = questions(test, random)
    answer = Captioner(model, processor, do_sample=False, max_new_tokens=4)
    return {ANSWERS: Scores(*(equal(answer(images, asked), truth) for images in (shown, grey(shown))))}


def questions(kinds: Sequence[scenes.Scene], random: np.random.RandomState) -> tuple[list[Any], list[str], list[str]]:
    """Render images, and ask about each one thing -> images, questions and answers."""
    sorts = [list(QUESTIONS)[random.randint(len(QUESTIONS))] for _ in kinds]
    answers = [getattr(kind, sort) for kind, sort in zip(kinds, sorts, strict=True)]
    return [kind.render(random) for kind in kinds], [QUESTIONS[sort] for sort in sorts], answers


@learns("blip2", "teaches a Q-Former to show images to a language model that stays as it is", BLIND)
def blip2(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model, processor = untrained("blip2", seed)
    train, test = split(random, effort)
    texts = [kind.caption() for kind in train]
    inputs = dict(processor.captions([kind.render(random) for kind in train], texts))
    read_then_see(model, inputs, random, steps_of(150, effort), steps_of(500, effort))
    return {WRITES: written(model, processor, test, [kind.render(random) for kind in test], max_new_tokens=24)}


def read_then_see(model: Any, inputs: dict[str, Any], random: np.random.RandomState, read: int, see: int) -> None:
    """Train the language model alone on captions of grey images, then all else, with the language model frozen."""
    blind = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    language = list(model.language_model.parameters())
    fit(model, rows_of(blind, random), read)
    model.requires_grad_(requires_grad=True)
    for parameter in language:
        parameter.requires_grad_(requires_grad=False)
    fit(model, rows_of(inputs, random), see)


@learns("flamingo", "conditions a frozen language model on images by gated layers, by pages of two images", BLIND)
def flamingo(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model, processor = untrained("flamingo", seed)
    train, test = split(random, effort)
    order = random.permutation(len(train))
    pairs = [(train[i], train[j]) for i, j in zip(order, np.roll(order, 1), strict=True)]
    images = [[kind.render(random) for kind in pair] for pair in pairs]
    pages = ["".join(f"<image>{kind.caption()}" for kind in pair) for pair in pairs]
    inputs = dict(processor.captions(images, pages))
    per_page = len(inputs["pixel_values"]) // len(pages)
    if per_page > 1:
        inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(pages), per_page))
    inputs["input_ids"], shapes = inputs["input_ids"], inputs["pixel_values"].shape

    def batch() -> dict[str, Any]:
        rows = drawn()
        if len(shapes) > 1 and per_page > 1:
            rows["pixel_values"] = rows["pixel_values"].flatten(0, 1)
        return rows

    drawn = rows_of(inputs, random)
    language = list(model.language_model.parameters())
    fit(model, batch, steps_of(150, effort))
    for parameter in language:
        parameter.requires_grad_(requires_grad=False)
    fit(model, batch, steps_of(400, effort))
    return {WRITES: shot(model, processor, test, random)}


def shot(model: Any, processor: Any, test: Sequence[scenes.Scene], random: np.random.RandomState) -> Scores:
    """Let it continue pages whose first image has its caption, and whose second has none yet."""
    shown = [[test[-1 - i].render(random), kind.render(random)] for i, kind in enumerate(test)]
    prompts = [f"<image>{test[-1 - i].caption()}<|endofchunk|><image>" for i in range(len(test))]
    found = []
    for images in (shown, [[first, *grey([second])] for first, second in shown]):
        inputs = processor(images=images, text=prompts)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        found.append(named(processor.batch_decode(ids, new_tokens_only=inputs), test))
    return Scores(*found)


@learns("pali", "answers in the language that the prompt names", BLIND)
def pali(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model, processor = untrained("pali", seed)
    train, test = split(random, effort)
    shown, asked, truth = in_languages(train, random)
    inputs = dict(processor(images=shown, text=asked, suffix=truth))
    fit(model, rows_of(inputs, random), steps_of(500, effort))
    shown, asked, truth = in_languages(test, random)
    answer = Captioner(model, processor, do_sample=False, max_new_tokens=8)
    return {ANSWERS: Scores(*(equal(answer(images, asked), truth) for images in (shown, grey(shown))))}


FRENCH = dict(zip(scenes.COLOURS, ("rouge", "vert", "bleu", "jaune", "violet", "blanc"), strict=True))


def in_languages(kinds: Sequence[Any], random: np.random.RandomState) -> tuple[list[Any], list[str], list[str]]:
    """Ask for the colour, in English or in French -> images, prompts and answers."""
    languages = [("EN", "FR")[random.randint(2)] for _ in kinds]
    prompts = [f"<image>Answer in {language}: what colour ?" for language in languages]
    answers = [
        kind.colour if language == "EN" else FRENCH[kind.colour]
        for kind, language in zip(kinds, languages, strict=True)
    ]
    return [kind.render(random) for kind in kinds], prompts, answers
