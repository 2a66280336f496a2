"""Models that answer in conversations about images and videos."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import hfvlm
from hfvlm.inference.captioner import Captioner
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.samples import scenes
from hfvlm.training.chat import ChatCollator, in_conversation
from learning.entries import Scores, learns
from learning.fitting import count_of, equal, example, fit, grey, rows_of, steps_of, untrained

KINDS = list(product(scenes.COLOURS, scenes.SHAPES))
HELD_OUT, TRAIN, TESTS = 6, 5000, 200
BLIND = "the same model on grey images"
SHIPPED = str(files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt")
# The authors' own would be most of what is read.
SYSTEM = {"role": "system", "content": "A picture."}


@dataclass(frozen=True)
class Question:
    """One question about an image or a video, with its answer."""

    media: Any
    text: str
    answer: str


Draw = Callable[[list[tuple[str, str]], np.random.RandomState], Question]


def conversation(question: Question, modality: str, *, system: bool, answered: bool) -> list[dict[str, Any]]:
    content = [{"type": modality}, {"type": "text", "text": question.text}]
    messages: list[dict[str, Any]] = [SYSTEM] if system else []
    messages.append({"role": "user", "content": content})
    return [*messages, {"role": "assistant", "content": question.answer}] if answered else messages


def ask(
    parts: tuple[Any, Any],
    draw: Draw,
    seed: int,
    effort: float,
    steps: int,
    *,
    modality: str = "image",
    system: bool = True,
) -> Scores:
    """Train a model on questions, and ask it about kinds that are held out.

    Args:
        parts: the model and its processor.
        draw: makes a question about one of some kinds.
        seed: of what is drawn.
        effort: share of the steps, and of fewer examples.
        steps: of training.
        modality: image or video.
        system: begin with SYSTEM.
    """
    model, processor = parts
    random = np.random.RandomState(seed)
    order = random.permutation(len(KINDS))
    seen, unseen = ([KINDS[i] for i in part] for part in (order[HELD_OUT:], order[:HELD_OUT]))
    train = [draw(seen, random) for _ in range(count_of(TRAIN, effort))]
    test = [draw(unseen, random) for _ in range(count_of(TESTS, effort))]
    rows = [
        {"messages": conversation(each, modality, system=system, answered=True), f"{modality}s": [each.media]}
        for each in train
    ]
    fit(model, rows_of(ChatCollator(processor)(rows), random), steps_of(steps, effort))
    truth, media = [each.answer for each in test], [each.media for each in test]
    prompts = [
        processor.apply_chat_template(
            conversation(each, modality, system=system, answered=False), add_generation_prompt=True
        )
        for each in test
    ]
    return Scores(
        *(equal(answers(model, processor, given, prompts, modality), truth) for given in (media, grey(media)))
    )


def answers(model: Any, processor: Any, media: Sequence[Any], prompts: list[str], modality: str) -> list[str]:
    if modality == "image":
        return Captioner(model, processor, do_sample=False, max_new_tokens=8)(list(media), prompts, batch_size=50)
    said: list[str] = []
    for i in range(0, len(prompts), 50):
        inputs = processor(videos=list(media[i : i + 50]), text=prompts[i : i + 50])
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        said += processor.batch_decode(ids, new_tokens_only=inputs)
    return said


def about_groups(kinds: list[tuple[str, str]], random: np.random.RandomState) -> Question:
    """Ask for the colour, the number or the place of equal shapes."""
    colour, shape = kinds[random.randint(len(kinds))]
    sort = ("colour", "count", "position")[random.randint(3)]
    most = 1 if sort == "position" else 4
    places = random.permutation(list(scenes.PLACES))[: random.randint(1, most + 1)]
    scene = scenes.SceneGroup(colour, shape, tuple(map(str, places)))
    return Question(scene.render(random), *scene.questions()[sort])


MIXED = "right answers about colours, numbers and places of kinds that are held out"


@learns("llava", "answers questions about images in a conversation", BLIND)
def llava(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    model, processor = untrained("llava", seed)
    processor = in_conversation(processor, "mistral_instruct")  # the shortest
    return {MIXED: ask((model, processor), about_groups, seed, effort, 400, system=False)}


@learns("qwen_vl", "the same, behind a resampler of few tokens", BLIND)
def qwen_vl(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    model, processor = untrained("qwen_vl", seed)
    processor = in_conversation(processor, "pretraining")
    return {MIXED: ask((model, processor), about_groups, seed, effort, 800, system=False)}


def about_regions(kinds: list[tuple[str, str]], random: np.random.RandomState) -> Question:
    """Ask for the colour of one of four shapes, which a box names."""
    shapes, places = [], list(scenes.PLACES)
    colours = random.permutation(list(scenes.COLOURS))[: len(places)]
    for place, colour in zip(places, colours, strict=True):
        fitting = [kind for kind in kinds if kind[0] == colour] or kinds
        shapes.append((str(colour), fitting[random.randint(len(fitting))][1], place))
    image = None
    for colour, shape, place in shapes:
        drawn = scenes.SceneGroup(colour, shape, (place,)).render(random)
        image = drawn if image is None else quarter(image, drawn, place)
    colour, _, place = shapes[random.randint(len(shapes))]
    x, y = scenes.PLACES[place]
    box = ",".join(f"{max(0, value):.1f}" for value in (x - 0.2, y - 0.2, x + 0.2, y + 0.2))
    return Question(image, f"what colour is [{box}] ?", colour)


def quarter(image: Any, other: Any, place: str) -> Any:
    """Replace a quarter of an image by the other's."""
    half = image.width // 2
    left, top = (half * (share > 0.5) for share in scenes.PLACES[place])
    image.paste(other.crop((left, top, left + half, top + half)), (left, top))
    return image


@learns("shikra", "reads regions of an image as numbers in the text", BLIND)
def shikra(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    found = ask(on_clip(*untrained("shikra", seed)), about_regions, seed, effort, 600)
    return {"colours of the one of four shapes that a box means": found}


def about_motion(kinds: list[tuple[str, str]], random: np.random.RandomState) -> Question:
    """Ask which way a shape moves."""
    direction = list(scenes.DIRECTIONS)[random.randint(len(scenes.DIRECTIONS))]
    scene = scenes.MovingScene(*kinds[random.randint(len(kinds))], direction)
    return Question(scene.render(random, 8), f"where is the {scene.shape} on ?", direction)


MOTION = "the way, of four, that a shape moves, of kinds that are held out"


@learns(
    "video_chatgpt", "answers questions about videos, from means over time and space", "the same model on grey videos"
)
def video_chatgpt(seed: int, effort: float) -> dict[str, Scores]:
    return moving("video_chatgpt", seed, effort)


@learns("pg_video_llava", "the same, with a deeper projector", "the same model on grey videos")
def pg_video_llava(seed: int, effort: float) -> dict[str, Scores]:
    return moving("pg_video_llava", seed, effort)


def moving(name: str, seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    return {MOTION: ask(on_clip(*untrained(name, seed)), about_motion, seed, effort, 400, modality="video")}


def on_clip(model: Any, processor: Any) -> tuple[Any, Any]:
    """Put the shipped CLIP's vision tower into a model, where it stays as it is, as in the papers."""
    tower = shipped_tower()
    config = copy.deepcopy(model.config)
    config.vision_config = copy.deepcopy(tower.config)
    begun: Any = type(model)(config)
    begun.vision_model.load_state_dict(tower.state_dict())
    begun.vision_model.requires_grad_(requires_grad=False)
    return begun, processor


@functools.cache
def shipped_tower() -> Any:
    """Convert the shipped CLIP's vision tower."""
    with TemporaryDirectory() as folder:
        return HfvlmCLIPVisionModel.from_pretrained(hfvlm.convert(SHIPPED, "clip/tiny", Path(folder) / "clip"))


@learns("paligemma", "detects: answers with the pieces of a box", BLIND)
def paligemma(seed: int, effort: float) -> dict[str, Scores]:
    script = example("paligemma_shapes")
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    model, processor = script.new_model(48)
    images, prompts, boxes = zip(*(script.example(random) for _ in range(count_of(1500, effort))), strict=True)
    size = (script.PIXELS, script.PIXELS)
    suffixes = [processor.grounding_text(None, [box], size) for box in boxes]
    inputs = dict(processor(images=list(images), text=list(prompts), suffix=suffixes))
    fit(model, rows_of(inputs, random), steps_of(400, effort))
    tests = [script.example(random) for _ in range(count_of(TESTS, effort))]
    overlaps = [script.test(model, processor, tests, blind=blind) for blind in (False, True)]
    return {"overlap of the box with that of the named one of two shapes, mean IoU": Scores(*overlaps)}
