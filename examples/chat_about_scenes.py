"""Train a small LLaVA from a CLIP that sees and a language model that only ever read, and ask it about images.

A small language model learns to answer questions about scenes that are described in words. Then a projector and the
language model learn on captions to see through the small CLIP, which stays as it is. (The paper trains the projector
alone there; its language model has words for everything already.) At last they learn to answer questions about
images: which colour the shapes have, how many there are, and where one is. They do so twice, once with all their
weights, and once by adapters in the language model.

Of the 24 kinds of coloured shapes, six are held out from all of it. Both models are asked about these, beside the same
questions about a grey image, and beside the one answer to a question that is right most often.

    python examples/chat_about_scenes.py --output llava-scenes          # some minutes on two cores

writes the model, `llava`; the adapters, `adapter`; and the model that these belong to, `base`.
Needs `pip install 'hfvlm[convert,train]'`.
"""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sentencepiece
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import hfvlm
from hfvlm.conversion.llava import processor_for
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.samples import scenes
from hfvlm.training import ChatCollator, ChatTrainer, short_run

KINDS = list(product(scenes.COLOURS, scenes.SHAPES))
HELD_OUT = 6
VOCABULARY = 300
LANGUAGE_MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
CONVERSATION = "mistral_instruct"  # the shortest
LEARNERS = ["projector", "language_model"]
GREY = Image.new("RGB", (32, 32), "gray")
Example = dict[str, Any]


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=3, default=(150, 300, 200), help="of the three stages")
    parser.add_argument("--scenes", type=int, default=6000, help="in training")
    parser.add_argument("--tests", type=int, default=200, help="images to ask about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    order = random.permutation(len(KINDS))
    seen, unseen = ([KINDS[i] for i in part] for part in (order[HELD_OUT:], order[:HELD_OUT]))
    train = [compose(seen, random) for _ in range(options.scenes)]
    model, processor = new_model([told(scene, random) for scene in train[:500]])
    read, described, asked = options.steps

    fit(model, processor, [told(scene, random) for scene in train], ["language_model"], read, options)
    pictures = [(scene, scene.render(random)) for scene in train]
    fit(model, processor, [shown(*pair) for pair in pictures], LEARNERS, described, options)
    model.save_pretrained(options.output / "base")

    conversations = [asked_about(*pair, random) for pair in pictures]
    adapted = hfvlm.lora(copy.deepcopy(model), "language+projection", r=16)
    fit(adapted, processor, conversations, None, asked, options)
    adapted.save_pretrained(options.output / "adapter")
    fit(model, processor, conversations, LEARNERS, asked, options)
    model.save_pretrained(options.output / "llava")
    for name in ("base", "llava"):
        processor.save_pretrained(options.output / name)
    found = judge(options.output, unseen, options.tests, random)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, values in found.items():
        print(f"{name:>16}: " + ", ".join(f"{sort} {value:.2f}" for sort, value in values.items()))
    return found


# What is trained on


def compose(kinds: list[tuple[str, str]], random: np.random.RandomState, most: int = 4) -> scenes.SceneGroup:
    """A scene of shapes of one of these kinds, `most` of them at most."""
    colour, shape = kinds[random.randint(len(kinds))]
    places = random.permutation(list(scenes.PLACES))[: random.randint(1, most + 1)]
    return scenes.SceneGroup(colour, shape, tuple(map(str, places)))


def questions(scene: scenes.SceneGroup, random: np.random.RandomState) -> list[tuple[str, str]]:
    every = list(scene.questions().values())
    return [every[i] for i in random.permutation(len(every))]


def caption(scene: scenes.SceneGroup) -> tuple[str, str]:
    return "What is there?", scene.caption()


def conversation(opening: str, pairs: list[tuple[str, str]], **media: Any) -> Example:
    messages = []
    for i, (question, answer) in enumerate(pairs):
        messages.append({"role": "user", "content": question if i else opening + question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages} | media


def told(scene: scenes.SceneGroup, random: np.random.RandomState) -> Example:
    """A scene in words, and questions about it."""
    return conversation(f"You see {scene.caption()}. ", [caption(scene), *questions(scene, random)])


def shown(scene: scenes.SceneGroup, picture: Image.Image) -> Example:
    """An image and its caption."""
    return conversation("<image>\n", [caption(scene)], images=[picture])


def asked_about(scene: scenes.SceneGroup, picture: Image.Image, random: np.random.RandomState) -> Example:
    """An image, and questions about it."""
    return conversation("<image>\n", questions(scene, random), images=[picture])


# Training


def new_model(texts: list[Example]) -> tuple[Any, Any]:
    """A LLaVA of which the vision tower alone is trained, with a vocabulary of the answers."""
    preset = hfvlm.load_preset("llava/tiny")
    with TemporaryDirectory() as folder:
        clip = files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt"
        tower = HfvlmCLIPVisionModel.from_pretrained(hfvlm.convert(clip, "clip/tiny", Path(folder) / "clip"))
        changes = {"vision_config": tower.config.to_dict(), "image_token_id": VOCABULARY}
        changes["text_config"] = preset.config["text_config"] | LANGUAGE_MODEL
        config = type(preset.make_config())(**preset.config | changes)
        vocabulary = write_vocabulary(texts, Path(folder))
        processor = processor_for(config, preset.processor | {"conversation": CONVERSATION}, vocabulary)
    model = AutoModelForImageTextToText.from_config(config)
    model.vision_model.load_state_dict(tower.state_dict())
    return model, processor


def write_vocabulary(texts: list[Example], folder: Path) -> Path:
    """A sentencepiece model, as LLaMA's is."""
    said = [message["content"] for example in texts for message in example["messages"]]
    (folder / "corpus.txt").write_text("\n".join(f"[INST] {text} [/INST]" for text in said))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "words"), vocab_size=VOCABULARY, model_type="bpe",
        character_coverage=1.0, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "words.model"


def fit(
    model: Any,
    processor: Any,
    examples: list[Example],
    parts: list[str] | None,
    steps: int,
    options: argparse.Namespace,
) -> None:
    """Train the named parts of the model alone; or, of None, what asks for gradients."""
    if parts is not None:
        model.requires_grad_(requires_grad=False)
        for name in parts:
            getattr(model, name).requires_grad_(requires_grad=True)
    arguments = short_run(options.output / "run", steps, seed=options.seed)
    ChatTrainer(model, arguments, ChatCollator(processor), train_dataset=examples).train()


# Judging


def judge(
    folder: Path, kinds: list[tuple[str, str]], count: int, random: np.random.RandomState
) -> dict[str, dict[str, float]]:
    """Shares of right answers about images of these kinds, by what is asked."""
    processor = AutoProcessor.from_pretrained(folder / "llava")
    model, base = (AutoModelForImageTextToText.from_pretrained(folder / name) for name in ("llava", "base"))
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found: dict[str, dict[str, float]] = {}
    for sort in ("colour", "count", "position"):
        tests = [compose(kinds, random, 1 if sort == "position" else 4) for _ in range(count)]
        pictures = [scene.render(random) for scene in tests]
        asked, truth = zip(*(scene.questions()[sort] for scene in tests), strict=True)
        given = {
            "all weights": answers(model, processor, pictures, asked),
            "adapters": answers(adapted, processor, pictures, asked),
            "a grey image": answers(model, processor, [GREY] * count, asked),
            "the usual answer": [Counter(truth).most_common(1)[0][0]] * count,
        }
        for name, said in given.items():
            right = [a == b for a, b in zip(said, truth, strict=True)]
            found.setdefault(name, {})[sort] = float(np.mean(right))
    return found


def answers(model: Any, processor: Any, pictures: list[Image.Image], asked: Sequence[str]) -> list[str]:
    contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in asked]
    messages = [[{"role": "user", "content": content}] for content in contents]
    texts = [processor.apply_chat_template(own, add_generation_prompt=True) for own in messages]
    said = []
    for i in range(0, len(texts), 50):
        inputs = processor(images=pictures[i : i + 50], text=texts[i : i + 50])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        said += [text.strip() for text in processor.batch_decode(ids, new_tokens_only=inputs)]
    return said


if __name__ == "__main__":
    main()
