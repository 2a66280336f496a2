"""Train a small Video-ChatGPT to predict which way a shape moves, which no single frame of its videos shows.

The small CLIP reads each frame and stays as it is; the projector and a language model of 350,000 parameters learn from
questions about videos alone. Of the 24 kinds of coloured shapes, six are held out, and the model is asked about these:
about videos of them, about one of their frames alone (as a still video), and about videos whose frames are shuffled,
which leaves only whether they move vertically or horizontally. Chance is one in four.

    python examples/tell_motion.py --output motion        # some minutes on two cores

Needs `pip install 'hfvlm[convert,train]'`.
"""

import argparse
import json
from collections.abc import Callable
from importlib.resources import files
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sentencepiece
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import hfvlm
from hfvlm.conversion.video_chatgpt import processor_for
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.samples import scenes
from hfvlm.training import ChatCollator, ChatTrainer, short_run

KINDS = list(product(scenes.COLOURS, scenes.SHAPES))
HELD_OUT = 6
FRAMES = 8
VOCABULARY = 120
LANGUAGE_MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": VOCABULARY + 3}
SYSTEM = {"role": "system", "content": "A film."}  # the authors' would be most of what is read
Message = dict[str, Any]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--films", type=int, default=4000, help="in training")
    parser.add_argument("--tests", type=int, default=200, help="videos to ask about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    order = random.permutation(len(KINDS))
    seen, unseen = ([KINDS[i] for i in part] for part in (order[HELD_OUT:], order[:HELD_OUT]))
    model, processor = new_model()
    fit(model, processor, [example(scene, random) for scene in draw(seen, options.films, random)], options)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    found = judge(options.output, draw(unseen, options.tests, random), random)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


# What is trained on


def draw(kinds: list[tuple[str, str]], count: int, random: np.random.RandomState) -> list[scenes.MovingScene]:
    directions = list(scenes.DIRECTIONS)
    return [scenes.MovingScene(*kinds[random.randint(len(kinds))], directions[i % 4]) for i in range(count)]


def question(scene: scenes.MovingScene) -> list[Message]:
    text = f"Which way does the {scene.colour} {scene.shape} go?"
    return [SYSTEM, {"role": "user", "content": [{"type": "text", "text": text}, {"type": "video"}]}]


def example(scene: scenes.MovingScene, random: np.random.RandomState) -> dict[str, Any]:
    answer = {"role": "assistant", "content": scene.direction}
    return {"messages": [*question(scene), answer], "videos": [scene.render(random, FRAMES)]}


# Training


def new_model() -> tuple[Any, Any]:
    """A Video-ChatGPT of which the vision tower alone is trained, with a vocabulary of the answers."""
    preset = hfvlm.load_preset("video_chatgpt/tiny")
    with TemporaryDirectory() as folder:
        clip = files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt"
        tower = HfvlmCLIPVisionModel.from_pretrained(hfvlm.convert(clip, "clip/tiny", Path(folder) / "clip"))
        changes = {"vision_config": tower.config.to_dict(), "video_token_id": VOCABULARY, "temporal_tokens": FRAMES}
        changes["text_config"] = preset.config["text_config"] | LANGUAGE_MODEL
        config = type(preset.make_config())(**preset.config | changes)
        settings = preset.processor | {"conversation": "vicuna_v1_1", "training_conversation": "vicuna_v1_1"}
        processor = processor_for(config, settings, write_vocabulary(Path(folder)))
    model = AutoModelForImageTextToText.from_config(config)
    model.vision_model.load_state_dict(tower.state_dict())
    return model, processor


def write_vocabulary(folder: Path) -> Path:
    """A sentencepiece model, as LLaMA's is."""
    every = [scenes.MovingScene(*kind, way) for kind, way in product(KINDS, scenes.DIRECTIONS)]
    texts = [
        f"A film. USER: {question(scene)[1]['content'][0]['text']} ASSISTANT: {scene.direction}" for scene in every
    ]
    (folder / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "words"), vocab_size=VOCABULARY, model_type="bpe",
        character_coverage=1.0, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "words.model"


def fit(model: Any, processor: Any, examples: list[dict[str, Any]], options: argparse.Namespace) -> None:
    model.vision_model.requires_grad_(requires_grad=False)
    arguments = short_run(options.output / "run", options.steps, seed=options.seed)
    ChatTrainer(model, arguments, ChatCollator(processor), train_dataset=examples).train()


# Judging


def judge(folder: Path, tests: list[scenes.MovingScene], random: np.random.RandomState) -> dict[str, float]:
    """Shares of right answers about videos of the held-out kinds, and about what is left of them."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    films = [scene.render(random, FRAMES) for scene in tests]
    shown: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "films": lambda film: film,
        "one frame of each": lambda film: np.repeat(film[[random.randint(FRAMES)]], FRAMES, axis=0),
        "frames in disorder": lambda film: film[random.permutation(FRAMES)],
    }
    found = {}
    for name, change in shown.items():
        said = answers(model, processor, [change(film) for film in films], tests)
        found[name] = float(np.mean([text == scene.direction for text, scene in zip(said, tests, strict=True)]))
    return found


def answers(model: Any, processor: Any, films: list[np.ndarray], tests: list[scenes.MovingScene]) -> list[str]:
    texts = [processor.apply_chat_template(question(scene), add_generation_prompt=True) for scene in tests]
    predicted = []
    for i in range(0, len(texts), 50):
        inputs = processor(videos=films[i : i + 50], text=texts[i : i + 50])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        predicted += [text.strip() for text in processor.batch_decode(ids, new_tokens_only=inputs)]
    return predicted


if __name__ == "__main__":
    main()
