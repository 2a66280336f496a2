"""Fine-tuning and alignment with TRL's trainers, as the examples and the recipes do it."""

import importlib.util
import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    HfArgumentParser,
)

import hfvlm
from hfvlm.models.llava import HfvlmLLaVAForConditionalGeneration
from hfvlm.processing.assembly import IGNORE
from hfvlm.training.alignment import prompt_row
from hfvlm.training.chat import ChatCollator, PreferenceCollator, read_examples
from hfvlm.training.recipe_files import checked, read_recipe
from hfvlm.training.recipes import find_task, run_recipe
from hfvlm.training.rewards import RewardFunction
from tests.inference.test_chat import image
from tests.models.llava.tiny import converted
from tests.support.paths import EXAMPLES
from tests.support.suite import close

trl = pytest.importorskip("trl", reason="comes with hfvlm[trl]")
QUESTION, ANSWERS = "What is it?", ("A cat.", "It is a small dog.")
QUICK = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUICK |= {"per_device_train_batch_size": 4, "logging_steps": 1}
LORA = {"lora_recipe": "language+projection", "lora_rank": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def data(tmp_path):
    """The same question about two images: whoever does not look is wrong about one of them."""

    def write(rows):
        for i in range(2):
            image(i).save(tmp_path / f"{i}.png")
        (tmp_path / "rows.json").write_text(json.dumps(rows * 4))
        return {"data": str(tmp_path / "rows.json"), "pictures": str(tmp_path)}

    return write


def run(name, settings):
    """An example of that name; the history of its run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    kinds = [kind for kind in vars(example).values() if hasattr(kind, "__dataclass_fields__")]
    order = sorted(
        kinds, key=lambda kind: ("output_dir" in kind.__dataclass_fields__, kind.__name__ != "ModelArguments")
    )
    example.main(*HfArgumentParser(order).parse_dict(settings))
    return json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["log_history"]


def losses(model, processor, pictures, answers=ANSWERS):
    """Of each image the loss of each answer, (images, answers)."""
    rows = [[dict(conversation(answer), images=[seen]) for answer in answers] for seen in pictures]
    with torch.no_grad():
        return torch.stack(
            [torch.stack([model(**ChatCollator(processor)([row])).loss for row in own]) for own in rows]
        )


def conversation(answer):
    return {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]}


def reloaded(folder, adapter):
    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), adapter).eval()


def check_adapter(folder, adapter, processor):
    """It holds the language model's adapters and the projector, and merging it changes nothing."""
    tuned, plain = reloaded(folder, adapter), AutoModelForImageTextToText.from_pretrained(folder)
    batch = ChatCollator(processor)([dict(conversation(answer), images=[image()]) for answer in ANSWERS])
    with torch.no_grad():
        expected = tuned(**batch).logits
        merged = tuned.merge_and_unload()
        close(merged(**batch).logits, expected, 1e-4, "merged")
    before, after = plain.state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    adapted = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    projector = {key for key in before if key.startswith("projector.")}
    assert projector <= moved
    assert all(key.startswith("language_model.") and key.endswith(adapted) for key in moved - projector), moved


@pytest.mark.parametrize("quantised", [False, True])
def test_trl_fine_tunes_on_conversations(folder, processor, data, tmp_path, quantised):
    if quantised:
        pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
    rows = [dict(conversation(answer), images=[f"{i}.png"]) for i, answer in enumerate(ANSWERS)]
    settings = {"model": str(folder), "output_dir": str(tmp_path / "out"), "max_steps": 4 if quantised else 40}
    settings |= QUICK | LORA | data(rows) | {"learning_rate": 1e-2, "four_bits": quantised, "bf16": quantised}
    history = run("finetune_chat_with_trl", settings)
    found = [entry["loss"] for entry in history if "loss" in entry]
    if quantised:
        assert found[-1] < found[0]
        return
    assert found[-1] < 0.85 * found[0]
    tuned = reloaded(folder, tmp_path / "out")
    after = losses(tuned, processor, [image(0), image(1)])
    assert (after.argmin(dim=1) == torch.arange(2)).all(), after
    check_adapter(folder, tmp_path / "out", processor)


def test_the_first_loss_is_of_the_authors_tokens(folder, processor, data, tmp_path):
    """TRL computes it in its own way, from hidden states in blocks."""
    rows = [dict(conversation(answer), images=[f"{i}.png"]) for i, answer in enumerate(ANSWERS)]
    settings = {"model": str(folder), "output_dir": str(tmp_path / "out"), "max_steps": 1, **QUICK, **data(rows)}
    history = run("finetune_chat_with_trl", settings | {"per_device_train_batch_size": 8})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    batch = ChatCollator(processor)([dict(conversation(ANSWERS[i]), images=[image(i)]) for i in range(2)])
    with torch.no_grad():
        assert history[0]["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_trl_learns_preferences(folder, processor, data, tmp_path, adapted):
    pairs = zip(ANSWERS, ANSWERS[::-1], strict=True)
    rows = [{"prompt": QUESTION, "chosen": a, "rejected": b, "images": [f"{i}.png"]} for i, (a, b) in enumerate(pairs)]
    settings = {"model": str(folder), "output_dir": str(tmp_path / "out"), "max_steps": 40 if adapted else 3}
    settings |= QUICK | data(rows) | (LORA | {"learning_rate": 5e-3} if adapted else {"trained_parts": ["projector"]})
    history = run("align_chat_with_dpo", settings)
    steps = [entry for entry in history if "rewards/margins" in entry]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    if not adapted:
        return
    assert steps[-1]["rewards/accuracies"] == 1
    before = losses(AutoModelForImageTextToText.from_pretrained(folder), processor, [image(0), image(1)])
    gained = before - losses(reloaded(folder, tmp_path / "out"), processor, [image(0), image(1)])
    assert (gained.argmax(dim=1) == torch.arange(2)).all(), gained
    check_adapter(folder, tmp_path / "out", processor)


def test_pairs_are_written_as_conversations(processor):
    earlier = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A pet."}]
    messages = [*earlier, {"role": "user", "content": "Which?"}]
    example = {"prompt": messages, "chosen": ANSWERS[0], "rejected": ANSWERS[1], "images": [image()]}
    short = {"prompt": QUESTION, "chosen": ANSWERS[1], "rejected": "No.", "images": [image(1)]}
    batch = PreferenceCollator(processor)([example, short])
    answered = zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True)
    said = [processor.decode(ids[mask]) for ids, mask in answered]
    assert said == ["A cat.</s>", "It is a small dog.</s>", "It is a small dog.</s>", "No.</s>"]
    assert (batch["input_ids"][:, 0] == processor.tokenizer.bos_token_id).all()
    answer = {"role": "assistant", "content": ANSWERS[0]}
    whole = ChatCollator(processor)([{"messages": [*messages, answer], "images": [image()]}])
    length = whole["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], whole["input_ids"][0])
    assert (whole["labels"][0] != IGNORE).sum() > batch["completion_mask"][0].sum()
    pixels = processor.prepare("image", [image(0), image(1)] * 2)["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.integration
def test_trl_s_own_trainer_takes_a_folder(folder, tmp_path):
    """With its own collator, which leaves out the token that a text begins with; the loss is of answers alone."""
    pairs = zip((image(0), image(1)), ANSWERS, strict=True)
    rows = [(seen, [{"type": "image"}, {"type": "text", "text": QUESTION}], answer) for seen, answer in pairs] * 4
    data = datasets.Dataset.from_dict(
        {
            "images": [[seen] for seen, *_ in rows],
            "messages": [
                [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": [{"type": "text", "text": said}]},
                ]
                for _, asked, said in rows
            ],
        }
    )
    settings = QUICK | {"output_dir": str(tmp_path), "max_steps": 1, "max_length": None}
    settings |= {"assistant_only_loss": True, "per_device_train_batch_size": 8}
    trainer = trl.SFTTrainer(str(folder), trl.SFTConfig(**settings), train_dataset=data)
    assert type(trainer.model).__name__ == "HfvlmLLaVAForConditionalGeneration"
    trainer.train()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    messages = data[:2]["messages"]
    for row, seen in zip(messages, data[:2]["images"], strict=True):
        row[0]["content"][0] |= {"image": seen[0]}
    batch = processor.apply_chat_template(
        messages, **options, processor_kwargs={"padding": True, "add_special_tokens": False}
    )
    masks = batch.pop("assistant_masks")
    with torch.no_grad():
        expected = model(**batch, labels=batch["input_ids"].masked_fill(masks == 0, IGNORE)).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


# Reinforcement learning


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    """A reward that learned nothing."""
    path = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(path)
    AutoProcessor.from_pretrained(folder).save_pretrained(path)
    return path


def rloo(folder, reward_folder, data, output, **changes):
    """Changes of the recipe for a run of a step or two."""
    rows = [
        {"prompt": "What is it?", "images": ["0.png"]},
        {"prompt": "<image>\nAnd what, do you think, is it that you see here, on the other one?", "images": ["1.png"]},
    ]
    quick = {name: value for name, value in QUICK.items() if name != "per_device_train_batch_size"}
    quick |= data(rows) | {"model": folder, "reward_model": reward_folder, "output_dir": output}
    quick |= {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 2}
    quick |= {"gradient_checkpointing": False, "lora_rank": 4}
    return [f"{name}={value}" for name, value in (quick | changes).items()]


def test_trl_learns_from_rewards(folder, reward_folder, processor, data, tmp_path, monkeypatch):
    """Prompts of different lengths, each with its image, are the processor's own; their answers are scored."""
    prompts, scored = [], []
    generate, score = HfvlmLLaVAForConditionalGeneration.generate, RewardFunction.score

    def generated(model, *args, **kwargs):
        prompts.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "pixel_values")})
        return generate(model, *args, **kwargs)

    def watched(reward, examples):
        scored.append((examples, score(reward, examples)))
        return scored[-1][1]

    monkeypatch.setattr(HfvlmLLaVAForConditionalGeneration, "generate", generated)
    monkeypatch.setattr(RewardFunction, "score", watched)
    changes = rloo(folder, reward_folder, data, tmp_path / "out")
    run_recipe(EXAMPLES / "recipes" / "llava-rloo.yaml", changes)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "rewards/reward/mean" in entry]
    assert len(steps) == 2
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["rewards/reward/mean"] == pytest.approx(scored[0][1].mean().item(), rel=1e-4)
    texts = [prompt_row(row) for row in read_examples(tmp_path / "rows.json", tmp_path)[:2]]
    whole = [processor.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in texts]
    wanted = {tuple(processor(images=row["images"], text=text)["input_ids"][0].tolist()): i
              for i, (row, text) in enumerate(zip(texts, whole, strict=True))}  # fmt: skip
    pixels = processor.prepare("image", [image(0), image(1)])["pixel_values"]
    seen = set()
    for batch in prompts:
        for ids, mask, own in zip(*batch.values(), strict=True):
            which = wanted[tuple(ids[mask.bool()].tolist())]
            assert torch.equal(own, pixels[which])
            seen.add(which)
    assert seen == {0, 1}
    first = ChatCollator(processor)(scored[0][0])
    assert (first["input_ids"] == processor.image_token_id).sum() == 4 * 4
    check_adapter(folder, tmp_path / "out", processor)


def test_alignment_refuses_what_would_be_swallowed(folder, reward_folder, data, tmp_path):
    recipe = EXAMPLES / "recipes" / "llava-rloo.yaml"

    def changed(**changes):
        return rloo(folder, reward_folder, data, tmp_path / "out", **changes)

    with pytest.raises(ValueError, match="layer_decay and whole_rate: TRL's trainers have one learning rate"):
        run_recipe(recipe, changed(whole_rate=0.5))
    with pytest.raises(ValueError, match="has no score: train a reward of it first"):
        run_recipe(recipe, changed(reward_model=folder))
    with pytest.raises(ValueError, match="there is no field 'num_generation'. Did you mean num_generations"):
        run_recipe(recipe, changed(num_generation=4))
    with pytest.raises(ValueError, match="num_generations must be an integer of at least 2, not 1"):
        run_recipe(recipe, changed(num_generations=1))
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0, not -1"):
        run_recipe(recipe, changed(beta=-1))
    hfvlm.lora(AutoModelForImageTextToText.from_pretrained(folder), quiet=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and TRL would take its base"):
        run_recipe(recipe, changed(model=tmp_path / "adapter", lora_recipe="null"))


@pytest.mark.parametrize("name", ["llava-dpo", "llava-rloo"])
def test_recipes_of_alignment_run_on_a_cpu_as_shipped(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    recipe = read_recipe(EXAMPLES / "recipes" / f"{name}.yaml")
    kinds, _ = find_task(recipe.pop("task"))
    training = HfArgumentParser(kinds).parse_dict(checked(recipe, kinds))[-1]
    assert training.device.type == "cpu"
    assert training.bf16 is False
    assert training.beta > 0


def test_prompts_have_a_part_for_each_image_and_text():
    image_part, text = {"type": "image"}, {"type": "text", "text": "What?"}
    assert prompt_row({"prompt": "What?", "images": ["a.png"]})["prompt"] == [
        {"role": "user", "content": [image_part, text]}
    ]
    written = prompt_row({"prompt": "Of <image>: What?", "image": "a.png"})
    assert written["images"] == ["a.png"]
    assert [part["type"] for part in written["prompt"][0]["content"]] == ["text", "image", "text"]
    system = {"role": "system", "content": "Be short."}
    rows = prompt_row({"prompt": [system, {"role": "user", "content": "What?"}]})
    assert rows["images"] == []
    assert rows["prompt"][0]["content"] == [{"type": "text", "text": "Be short."}]
