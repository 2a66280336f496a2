"""Align a small LLaVA in three steps, so that it names fewer objects that an image does not show.

As in real data of instructions, six of ten captions that it learns from first name an object that is not there. Then

1. instruction: it learns these captions, and to make up objects with them;
2. reward: a copy of it, with a score, learns which of two captions of an image is better. Of each pair, one is
   right, and the other names an object too many, another object, or one too few;
3. reinforcement learning: it learns from the rewards of its own captions (RLOO); and, from the same pairs and without
   a reward, by DPO, to compare.

All are asked about images that show two kinds of shapes together that were together in none of the images before. What
is measured is how much is made up (CHAIR), and, as a model that says nothing makes nothing up, how much of what is
there is named (recall).

    python examples/align_chat_with_rewards.py --output aligned          # minutes on two cores
    python examples/align_chat_with_rewards.py --output silent --rejected added   # pairs that punish objects alone

writes the models `instructed`, `reward`, `dpo` and `rloo`, and `results.json`. The four steps are those of
`hfvlm train` with the tasks "chat", "reward", "preferences" and "rloo". A model that is there already is not trained
again, so that a run that was interrupted goes on, and `--only reward` trains one alone.
Needs `pip install 'hfvlm[convert,train,trl]'`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed
from trl import DPOConfig, RLOOConfig

import hfvlm
from hfvlm.conversion.llava import processor_for
from hfvlm.evaluation.hallucination import object_hallucination
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.samples import scenes
from hfvlm.training.alignment import train_preferences, train_reward, train_rloo
from hfvlm.training.recipe_arguments import (
    ChatDataArguments,
    ModelArguments,
    PreferenceDataArguments,
    RewardArguments,
)
from hfvlm.training.recipes import train_chat
from hfvlm.training.rewards import RewardFunction, load_reward

Kind = tuple[str, str]
KINDS: list[Kind] = list(product(scenes.COLOURS, scenes.SHAPES))
# Of the pairs of kinds, how many are together in images of the tests alone.
HELD_OUT = 40
MADE_UP = 0.6
PROMPT = "What is there?"
LEARNERS = ["projector", "language_model"]
LANGUAGE_MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
LONGEST = 24
STEPS = ("instructed", "reward", "dpo", "rloo")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=4, default=(400, 120, 60, 50), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--scenes", type=int, nargs=3, default=(2500, 1200, 400), help="captions, pairs, prompts")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="train these, and measure nothing")
    parser.add_argument("--tests", type=int, default=200, help="images to caption")
    parser.add_argument("--rejected", nargs="+", choices=REJECTED, default=list(REJECTED), help="what a pair is about")
    parser.add_argument("--beta", type=float, default=0.05, help="price of moving away from the model as it was")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    data = read_data(options.output) or write_data(options, np.random.RandomState(options.seed))
    if not is_there(options.output / "begun"):
        new_model(options.output / "begun", data["captions"])
    for name, step in steps(options).items():
        if not is_there(options.output / name) and name in (options.only or STEPS):
            step()
    if options.only:
        return {}
    found = judge(options.output, data["tests"], data["test_pairs"])
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, values in found.items():
        print(f"{name:>12}: " + ", ".join(f"{sort} {value:.3f}" for sort, value in values.items()))
    return found


def is_there(folder: Path) -> bool:
    return (folder / "config.json").exists()


# What is trained on


def read_data(folder: Path) -> dict[str, Any]:
    """Read the rows that an earlier run wrote last of all; none, if there was none."""
    names = ("captions", "tests", "test_pairs") if (folder / "test_pairs.json").exists() else ()
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def write_data(options: argparse.Namespace, random: np.random.RandomState) -> dict[str, Any]:
    """Draw the images, and write the rows of each step; return the rows of captions and of tests."""
    pairs = list(combinations(KINDS, 2))
    held_out = {frozenset(pairs[i]) for i in random.permutation(len(pairs))[:HELD_OUT]}
    folder = options.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "captions": instruction,
        "pairs": preference,
        "prompts": prompt,
        "tests": prompt,
        "test_pairs": preference,
    }
    counts = [*options.scenes, options.tests, options.tests]
    rows: dict[str, Any] = {}
    for (name, maker), count in zip(makers.items(), counts, strict=True):
        rows[name] = []
        for i in range(count):
            scene = compose(random, held_out, tested=name.startswith("test"))
            file = f"{name}-{i:05}.png"
            scene.render(random).save(folder / file)
            rows[name].append(maker(scene, random, options) | {"images": [file], "objects": scene.objects})
        (options.output / f"{name}.json").write_text(json.dumps(rows[name]))
    return rows


def compose(random: np.random.RandomState, held_out: set[frozenset[Kind]], *, tested: bool) -> scenes.ObjectScene:
    """Draw a scene of one kind or two, which are held out if it is for a test."""
    while True:
        count = random.randint(1, 3)
        objects = tuple(KINDS[i] for i in random.permutation(len(KINDS))[:count])
        places = tuple(map(str, random.permutation(list(scenes.PLACES))[:count]))
        if tested == any(frozenset(pair) in held_out for pair in combinations(objects, 2)):
            return scenes.ObjectScene(objects, places)


def instruction(scene: scenes.ObjectScene, random: np.random.RandomState, options: argparse.Namespace) -> Any:
    """A caption, often with an object that is not there."""
    made_up = [absent(scene, random)] if random.rand() < MADE_UP else []
    answer = {"role": "assistant", "content": scene.caption(made_up)}
    return {"messages": [{"role": "user", "content": PROMPT}, answer]}


def preference(scene: scenes.ObjectScene, random: np.random.RandomState, options: argparse.Namespace) -> Any:
    """The right caption, and a worse one."""
    names = [name for name in options.rejected if name != "left_out" or len(scene.objects) > 1] or ["added"]
    name = names[random.randint(len(names))]
    rejected = REJECTED[name](scene, random)
    return {"prompt": PROMPT, "chosen": scene.caption(), "rejected": rejected, "about": name}


def prompt(scene: scenes.ObjectScene, random: np.random.RandomState, options: argparse.Namespace) -> Any:
    return {"prompt": PROMPT}


def absent(scene: scenes.ObjectScene, random: np.random.RandomState) -> Kind:
    others = [kind for kind in KINDS if kind not in scene.objects]
    return others[random.randint(len(others))]


def exchanged(scene: scenes.ObjectScene, random: np.random.RandomState) -> str:
    """The caption with another object in the place of one."""
    objects = list(scene.objects)
    objects[random.randint(len(objects))] = absent(scene, random)
    return replace(scene, objects=tuple(objects)).caption()


def left_out(scene: scenes.ObjectScene, random: np.random.RandomState) -> str:
    return scene.caption(left_out=[scene.objects[random.randint(len(scene.objects))]])


def added(scene: scenes.ObjectScene, random: np.random.RandomState) -> str:
    return scene.caption([absent(scene, random)])


REJECTED: dict[str, Callable[[scenes.ObjectScene, np.random.RandomState], str]] = {
    "added": added,
    "exchanged": exchanged,
    "left_out": left_out,
}


# The model, and its training


def new_model(folder: Path, captions: Sequence[Any]) -> None:
    """Write a LLaVA of which the vision tower alone is trained, with a vocabulary of the captions."""
    preset = hfvlm.load_preset("llava/tiny")
    with TemporaryDirectory() as temporary:
        clip = files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt"
        converted = hfvlm.convert(clip, "clip/tiny", Path(temporary) / "clip")
        tower = HfvlmCLIPVisionModel.from_pretrained(converted)
        vocabulary, size = write_vocabulary(captions, Path(temporary))
        changes = {"vision_config": tower.config.to_dict(), "image_token_id": size}
        changes["text_config"] = preset.config["text_config"] | LANGUAGE_MODEL | {"vocab_size": size}
        config = type(preset.make_config())(**preset.config | changes)
        processor = processor_for(config, preset.processor | {"conversation": "mistral_instruct"}, vocabulary)
    model = AutoModelForImageTextToText.from_config(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_vocabulary(captions: Sequence[Any], folder: Path) -> tuple[Path, int]:
    """Write a sentencepiece model, as LLaMA's is, in which each word is a piece; return it and its size."""
    texts = [message["content"] for row in captions for message in row["messages"]]
    (folder / "corpus.txt").write_text("\n".join(f"[INST] {text} [/INST]" for text in texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "words"), vocab_size=160, model_type="bpe",
        character_coverage=1.0, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = folder / "words.model"
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def steps(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name what trains in each of the four steps, as `hfvlm train` does it."""
    output, (chat, reward, dpo, rloo) = options.output, options.steps
    pictures = str(output / "images")
    quiet: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 25,
        "seed": options.seed,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    of_trl = {"bf16": False, "gradient_checkpointing": False}
    begun, instructed = (
        ModelArguments(str(output / name), trained_parts=LEARNERS) for name in ("begun", "instructed")
    )
    scored = ModelArguments(instructed.model, trained_parts=[*LEARNERS, "score"])
    captions = str(output / "captions.json")
    preferences = PreferenceDataArguments(str(output / "pairs.json"), pictures=pictures)

    def at(name: str, steps: int, rate: float, size: int = 16) -> dict[str, Any]:
        sizes = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": size}
        return quiet | sizes | {"output_dir": str(output / name)}

    def chatting() -> Any:
        data = ChatDataArguments(captions, pictures=pictures)
        return train_chat(begun, data, TrainingArguments(**at("instructed", chat, 2e-3)))

    def rewarding() -> Any:
        return train_reward(scored, preferences, TrainingArguments(**at("reward", reward, 1e-3)))

    def comparing() -> Any:
        return train_preferences(instructed, preferences, DPOConfig(**at("dpo", dpo, 2e-4), **of_trl, beta=0.1))

    def reinforcing() -> Any:
        data = RewardArguments(str(output / "prompts.json"), str(output / "reward"), pictures, reward_batch_size=64)
        settings = {"num_generations": 8, "max_completion_length": LONGEST, "normalize_advantages": True, **of_trl}
        return train_rloo(instructed, data, RLOOConfig(**at("rloo", rloo, 3e-4, 32), **settings, beta=options.beta))

    return dict(zip(STEPS, (chatting, rewarding, comparing, reinforcing), strict=True))


# Judging


def judge(folder: Path, tests: list[Any], pairs: list[Any]) -> dict[str, dict[str, float]]:
    """Measure what each model makes up about images of the tests, and how the reward orders pairs about others."""
    processor = AutoProcessor.from_pretrained(folder / "reward")
    reward = RewardFunction(load_reward(str(folder / "reward")), processor, 64)
    found: dict[str, dict[str, float]] = {}
    for name in ("instructed", "dpo", "rloo"):
        model = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
        captions = answers(model, processor, [folder / "images" / row["images"][0] for row in tests])
        values = object_hallucination(
            [scenes.named_objects(text) for text in captions], [set(map(tuple, row["objects"])) for row in tests]
        )
        paths = [[str(folder / "images" / file) for file in row["images"]] for row in tests]
        values["reward"] = float(np.mean(reward([PROMPT] * len(tests), captions, paths)))
        found[name] = values
    for about in REJECTED:
        rows = [row for row in pairs if row["about"] == about]
        if not rows:
            continue
        paths = [[str(folder / "images" / file) for file in row["images"]] for row in rows]
        chosen, rejected = (np.array(reward([PROMPT] * len(rows), [row[key] for row in rows], paths))
                            for key in ("chosen", "rejected"))  # fmt: skip
        found.setdefault("reward", {})[about] = float((chosen > rejected).mean())
    return found


def answers(model: Any, processor: Any, images: Sequence[Path], size: int = 100) -> list[str]:
    """Caption images, without chance."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    captions: list[str] = []
    for start in range(0, len(images), size):
        read = [Image.open(path) for path in images[start : start + size]]
        inputs = processor(images=read, text=[text] * len(read))
        ids = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=LONGEST)
        captions += [caption.strip() for caption in processor.batch_decode(ids, new_tokens_only=inputs)]
    return captions


if __name__ == "__main__":
    main()
