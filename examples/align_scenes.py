"""Align a small LLaVA in three steps, so that it names fewer objects that an image does not show.

The images show one to three kinds of coloured shapes. Some kinds have a companion, which is often there, too; where it
is not, most of the answers that the model learns from name it all the same, as captions of a table name a chair.

1. instruction: a language model and a projector, of random weights, learn these answers, and with them to make up
   companions. The vision tower has learned before to tell what is in each quarter of an image, and stays as it is;
2. reward: a copy of the model, with a score, learns which of two answers about an image is better. Of each pair, one
   is right, and the other names an object too many, another object, or one too few;
3. reinforcement learning: the model learns from the rewards of its own answers (RLOO); and, to compare, from the same
   pairs without a reward (DPO).

All are then asked about images in which two kinds are together that were in no image of any step. What is measured is
how much is made up (CHAIR) and, as a model that says nothing makes nothing up, how much of what is there is named
(recall).

    python examples/align_scenes.py --output aligned                             # two seeds, minutes on a core
    python examples/align_scenes.py --output aligned --page docs/alignment.md

writes a folder for each seed, with the models `instructed`, `reward`, `rloo` and `dpo`, and `results.json`. The steps
are those of `hfvlm train` with the tasks "chat", "reward", "rloo" and "preferences". A seed that is there already is
not repeated. `--page` writes the table into a page, between its two marks.
Needs `pip install 'hfvlm[convert,train,trl]'`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
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
from hfvlm.evaluation.bootstrap import interval, ratio
from hfvlm.evaluation.chair import object_hallucination
from hfvlm.inference.captioner import Captioner
from hfvlm.samples import scenes
from hfvlm.training import short_run
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
KINDS: list[Kind] = list(product(("red", "green", "blue", "yellow"), ("circle", "triangle", "cross")))
COMPANIONS: dict[Kind, Kind] = {
    ("red", "circle"): ("blue", "cross"),
    ("green", "circle"): ("yellow", "triangle"),
    ("blue", "triangle"): ("green", "cross"),
    ("yellow", "cross"): ("red", "triangle"),
}
# How often a companion is there, and how often it is named where it is not.
TOGETHER, MADE_UP = 0.5, 0.65
# Of the pairs of kinds, how many are together in images of the tests alone.
HELD_OUT = 12
MOST = 3
PROMPT = "What is there?"
STEPS = ("instructed", "reward", "rloo", "dpo")
ASKED = ("instructed", "rloo", "dpo")
MEASURES = ("chair_s", "chair_i", "recall")
PIXELS = 32
SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LEARNERS = ["projector", "language_model"]
LONGEST = 24
BEGIN, END = "<!-- measured: examples/align_scenes.py -->", "<!-- end -->"


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    options = arguments(given)
    found = [aligned(options.output / f"seed-{seed}", seed, options) for seed in options.seeds]
    print(table(found))
    if options.page:
        write_page(options.page, found, options)
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeing", type=int, default=300, help="steps of the vision tower before")
    parser.add_argument("--steps", type=int, nargs=4, default=(250, 80, 50, 50), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--scenes", type=int, nargs=3, default=(2500, 1200, 600), help="answers, pairs, prompts")
    parser.add_argument("--tests", type=int, default=300, help="images to ask about")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--page", type=Path)
    return parser.parse_args(given)


def aligned(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train the models of one seed, and measure them."""
    done = folder / "results.json"
    settings = {
        "seeing": options.seeing,
        "steps": [*options.steps],
        "scenes": [*options.scenes],
        "tests": options.tests,
    }
    if done.exists():
        found = json.loads(done.read_text())
        if found["settings"] != settings:
            raise ValueError(f"{done}: was measured with {found['settings']}, not {settings}: choose another output.")
        return found
    set_seed(seed)
    data = write_data(folder, np.random.RandomState(seed), options)
    new_model(folder / "begun", data["answers"], folder / "images", options)
    spent = {}
    for name, step in steps(folder, seed, options).items():
        begun = time.process_time()
        step()
        spent[name] = time.process_time() - begun
    found = judge(folder, data["tests"], data["test_pairs"])
    found |= {"seed": seed, "seconds": spent, "settings": settings}
    done.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(done.read_text())


# What is trained on


def write_data(folder: Path, random: np.random.RandomState, options: argparse.Namespace) -> dict[str, Any]:
    """Draw the images, and write the rows of each step and of the tests; return them."""
    usual = set(map(frozenset, COMPANIONS.items()))
    pairs = [pair for pair in map(frozenset, combinations(KINDS, 2)) if pair not in usual]
    held_out = {pairs[i] for i in random.permutation(len(pairs))[:HELD_OUT]}
    makers = {
        "answers": instruction, "pairs": preference, "prompts": prompt, "tests": prompt, "test_pairs": preference
    }  # fmt: skip
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for (name, maker), count in zip(makers.items(), [*options.scenes, options.tests, options.tests], strict=True):
        rows[name] = []
        for i in range(count):
            scene = compose(random, held_out, tested=name.startswith("test"))
            file = f"{name}-{i:05}.png"
            scene.render(random).save(folder / "images" / file)
            rows[name].append(
                maker(scene, random) | {"images": [file], "objects": scene.objects, "places": scene.places}
            )
        (folder / f"{name}.json").write_text(json.dumps(rows[name]))
    return rows


def compose(
    random: np.random.RandomState, held_out: set[frozenset[Kind]], *, tested: bool = False
) -> scenes.ObjectScene:
    """Draw a scene of up to three kinds, with two that are held out if it is for a test, and else without."""
    while True:
        objects = [KINDS[i] for i in random.permutation(len(KINDS))[: random.randint(1, MOST + 1)]]
        missing = [each for each in companions(objects) if random.rand() < TOGETHER]
        objects = (objects + missing)[:MOST]
        if tested == any(frozenset(pair) in held_out for pair in combinations(objects, 2)):
            places = random.permutation(list(scenes.PLACES))[: len(objects)]
            return scenes.ObjectScene(tuple(objects), tuple(map(str, places)))


def companions(objects: Sequence[Kind]) -> list[Kind]:
    """Return the companions that are not there."""
    return [COMPANIONS[each] for each in objects if each in COMPANIONS and COMPANIONS[each] not in objects]


def instruction(scene: scenes.ObjectScene, random: np.random.RandomState) -> dict[str, Any]:
    """An answer, which may name companions that are not there."""
    made_up = [each for each in companions(scene.objects) if random.rand() < MADE_UP]
    answer = scenes.caption_of([*scenes.named_objects(scene.caption()), *made_up])
    return {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]}


def preference(scene: scenes.ObjectScene, random: np.random.RandomState) -> dict[str, Any]:
    """The right answer, and a worse one."""
    truth = scenes.named_objects(scene.caption())
    worse = list(REJECTED)[random.randint(len(REJECTED) if len(truth) > 1 else 2)]
    rejected = scenes.caption_of(REJECTED[worse](truth, random))
    return {"prompt": PROMPT, "chosen": scene.caption(), "rejected": rejected, "worse": worse}


def prompt(scene: scenes.ObjectScene, random: np.random.RandomState) -> dict[str, Any]:
    return {"prompt": PROMPT}


def added(truth: list[Kind], random: np.random.RandomState) -> list[Kind]:
    """Name an object too many, half of the time a companion."""
    place = random.randint(len(truth) + 1)
    return [*truth[:place], absent(truth, random), *truth[place:]]


def exchanged(truth: list[Kind], random: np.random.RandomState) -> list[Kind]:
    """Name another object in the place of one."""
    place = random.randint(len(truth))
    return [*truth[:place], absent(truth, random), *truth[place + 1 :]]


def left_out(truth: list[Kind], random: np.random.RandomState) -> list[Kind]:
    """Name one object too few."""
    place = random.randint(len(truth))
    return truth[:place] + truth[place + 1 :]


def absent(truth: list[Kind], random: np.random.RandomState) -> Kind:
    """Draw an object that is not there, half of the time a companion of one that is."""
    likely = companions(truth) if random.rand() < 0.5 else []
    others = likely or [kind for kind in KINDS if kind not in truth]
    return others[random.randint(len(others))]


REJECTED: dict[str, Callable[[list[Kind], np.random.RandomState], list[Kind]]] = {
    "added": added,
    "exchanged": exchanged,
    "left out": left_out,
}


# The model, and its training


def new_model(folder: Path, rows: Sequence[Any], images: Path, options: argparse.Namespace) -> None:
    """Write a LLaVA whose tower sees, and whose other weights are random, with a vocabulary of the answers."""
    preset = hfvlm.load_preset("llava/tiny")
    with TemporaryDirectory() as temporary:
        vocabulary, size = write_vocabulary(rows, Path(temporary))
        changes: dict[str, Any] = {"image_token_id": size}
        changes["vision_config"] = preset.config["vision_config"] | SMALL | {"patch_size": PIXELS // 2}
        changes["text_config"] = preset.config["text_config"] | SMALL | {"vocab_size": size}
        changes["text_config"]["num_key_value_heads"] = SMALL["num_attention_heads"]
        config = type(preset.make_config())(**preset.config | changes)
        processor = processor_for(config, preset.processor | {"conversation": "mistral_instruct"}, vocabulary)
    model: Any = AutoModelForImageTextToText.from_config(config)
    see(model, processor, rows, images, options.seeing)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def see(model: Any, processor: Any, rows: Sequence[Any], images: Path, steps: int) -> None:
    """Train the vision tower to tell what is in each quarter, one of its patches."""
    read = [Image.open(images / row["images"][0]) for row in rows]
    pixels = processor.image_processor(read, return_tensors="pt")["pixel_values"]
    quarters = torch.full((len(rows), len(scenes.PLACES)), len(KINDS))
    for i, row in enumerate(rows):
        for place, kind in zip(row["places"], row["objects"], strict=True):
            quarters[i, list(scenes.PLACES).index(place)] = KINDS.index(kind)
    tower, head = model.vision_model, torch.nn.Linear(SMALL["hidden_size"], len(KINDS) + 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        drawn = torch.randint(len(rows), (64,))
        seen = tower(pixels[drawn], until=model.config.vision_feature_layer).last_hidden_state[:, 1:]
        loss = torch.nn.functional.cross_entropy(head(seen).flatten(0, 1), quarters[drawn].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def write_vocabulary(answers: Sequence[Any], folder: Path) -> tuple[Path, int]:
    """Write a sentencepiece model, as LLaMA's is, in which each word is a piece; return it and its size."""
    texts = [message["content"] for row in answers for message in row["messages"]]
    (folder / "corpus.txt").write_text("\n".join(f"[INST] {text} [/INST]" for text in texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "words"), vocab_size=160, model_type="bpe",
        character_coverage=1.0, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = folder / "words.model"
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def steps(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name what trains in each step, as `hfvlm train` does it."""
    count = dict(zip(STEPS, options.steps, strict=True))
    images = str(folder / "images")
    begun, instructed = (
        ModelArguments(str(folder / name), trained_parts=LEARNERS) for name in ("begun", "instructed")
    )
    scored = ModelArguments(instructed.model, trained_parts=[*LEARNERS, "score"])
    pairs, test_pairs = (str(folder / f"{name}.json") for name in ("pairs", "test_pairs"))
    of_trl: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}

    def run(name: str, rate: float, kind: Any = TrainingArguments, **changes: Any) -> Any:
        return short_run(folder / name, count[name], kind, learning_rate=rate, seed=seed, **changes)

    def instruct() -> Any:
        data = ChatDataArguments(str(folder / "answers.json"), pictures=images)
        return train_chat(begun, data, run("instructed", 2e-3))

    def score() -> Any:
        data = PreferenceDataArguments(pairs, test_pairs, images)
        return train_reward(scored, data, run("reward", 5e-4))

    def reinforce() -> Any:
        data = RewardArguments(str(folder / "prompts.json"), str(folder / "reward"), images, reward_batch_size=64)
        given = run(
            "rloo", 3e-4, RLOOConfig, num_generations=8, max_completion_length=LONGEST, normalize_advantages=True,
            per_device_train_batch_size=64, beta=0.05, **of_trl,
        )  # fmt: skip
        return train_rloo(instructed, data, given)

    def prefer() -> Any:
        data = PreferenceDataArguments(pairs, pictures=images)
        return train_preferences(instructed, data, run("dpo", 1e-4, DPOConfig, beta=0.3, **of_trl))

    return dict(zip(STEPS, (instruct, score, reinforce, prefer), strict=True))


# Judging


def judge(folder: Path, tests: list[Any], pairs: list[Any]) -> dict[str, Any]:
    """Measure what each model makes up about the images of the tests, and how the reward orders pairs about others."""
    processor = AutoProcessor.from_pretrained(folder / "reward")
    reward = RewardFunction(load_reward(str(folder / "reward")), processor, 64)
    images = [[str(folder / "images" / file) for file in row["images"]] for row in tests]
    truth = [set(map(tuple, row["objects"])) for row in tests]
    found: dict[str, Any] = {}
    for name in ASKED:
        model = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
        asked = [processor.asked(PROMPT)] * len(tests)
        captioner = Captioner(model, processor, do_sample=False, max_new_tokens=LONGEST)
        answers = captioner([own[0] for own in images], asked, batch_size=100)
        named = [scenes.named_objects(text) for text in answers]
        rewards = reward([PROMPT] * len(tests), answers, images)
        found[name] = measured(named, truth) | {"reward": float(np.mean(rewards)), "answers": answers}
    found["order"] = {}
    for worse in REJECTED:
        rows = [row for row in pairs if row["worse"] == worse]
        shown = [[str(folder / "images" / file) for file in row["images"]] for row in rows]
        texts = ([row[key] for row in rows] for key in ("chosen", "rejected"))
        better, others = (np.array(reward([PROMPT] * len(rows), own, shown)) for own in texts)
        if rows:
            found["order"][worse] = float((better > others).mean())
    return found


def measured(named: list[list[Kind]], truth: list[set[Kind]]) -> dict[str, Any]:
    """Compute CHAIR and the recall with intervals of 95 % by bootstrap over images."""
    values: dict[str, Any] = object_hallucination(named, truth)
    absent = [sum(one not in shown for one in own) for own, shown in zip(named, truth, strict=True)]
    right = [len(shown & set(own)) for own, shown in zip(named, truth, strict=True)]
    sums = {
        "chair_s": [(each > 0, 1) for each in absent],
        "chair_i": [(each, len(own)) for each, own in zip(absent, named, strict=True)],
        "recall": [(each, len(shown)) for each, shown in zip(right, truth, strict=True)],
    }
    for name in MEASURES:
        counts = np.array(sums[name], dtype=float)
        values[f"{name}_interval"] = interval(lambda drawn, counts=counts: ratio(counts[drawn]), len(counts))
    return values


def table(found: list[dict[str, Any]]) -> str:
    """Return a row for each seed and model."""
    lines = ["| seed | model | CHAIRs: answers that make up | CHAIRi: named, not there | recall | named an answer |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in found:
        for name in ASKED:
            shown = [with_interval(each[name], key) for key in MEASURES]
            lines.append(f"| {each['seed']} | `{name}` | {' | '.join(shown)} | {each[name]['named']:.2f} |")
    return "\n".join(lines)


def with_interval(values: dict[str, Any], key: str) -> str:
    low, high = values[f"{key}_interval"]
    return f"{values[key]:.3f} ({low:.3f} to {high:.3f})"


def write_page(page: Path, found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: has no lines {BEGIN} and {END}, between which the table goes.")
    order = [f"seed {each['seed']}: " + ", ".join(f"{k} {v:.2f}" for k, v in each["order"].items()) for each in found]
    spent = [f"{sum(each['seconds'].values()):.0f}" for each in found]
    steps = ", ".join(f"{count} {name}" for name, count in zip(STEPS, options.steps, strict=True))
    lines = [
        f"{options.tests} images with pairs of kinds that no step saw together, greedy answers, intervals of 95 % by",
        f"bootstrap over images; steps: {steps}; CPU seconds of the seeds, on one thread: {', '.join(spent)}.",
        "",
        table(found),
        "",
        f"Pairs about images of the same sort that the reward orders rightly, {'; '.join(order)}.",
    ]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
