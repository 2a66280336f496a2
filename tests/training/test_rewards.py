"""Rewards of answers about images: their training, and what comes of them."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoProcessor, TrainingArguments

from hfvlm.losses import preference_loss
from hfvlm.training import ChatCollator, PreferenceCollator
from hfvlm.training.recipes import run_recipe
from hfvlm.training.rewards import RewardFunction, RewardTrainer, load_reward
from tests.inference.test_chat import image
from tests.models.llava.tiny import converted
from tests.support.paths import EXAMPLES

PROMPT, ANSWERS = "What is it?", ("A cat.", "It is a small dog.")
PAIRS = [{"prompt": PROMPT, "chosen": ANSWERS[i], "rejected": ANSWERS[1 - i], "images": [image(i)]} for i in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def trainer(folder, processor, output, model=None, **arguments):
    quick = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    quick |= {"remove_unused_columns": False, "per_device_train_batch_size": 2, "max_grad_norm": 0}
    torch.manual_seed(0)
    model = model or AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    given = TrainingArguments(str(output), **quick | arguments)
    return RewardTrainer(model, given, PreferenceCollator(processor), train_dataset=PAIRS, eval_dataset=PAIRS)


def scores_of(model, processor, answers, images):
    rows = [
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}], "images": [own]}
        for answer, own in zip(answers, images, strict=True)
    ]
    with torch.no_grad():
        batch = ChatCollator(processor)(rows)
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, 0]


def test_the_loss_and_the_metrics_are_of_pairs(folder, processor, tmp_path):
    run = trainer(folder, processor, tmp_path)
    model = run.model.eval()
    images = [image(0), image(1)]
    chosen = scores_of(model, processor, ANSWERS, images)
    rejected = scores_of(model, processor, ANSWERS[::-1], images)
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(preference_loss(chosen, rejected).item(), rel=1e-4)
    assert found["eval_accuracy"] == (chosen > rejected).float().mean()
    assert found["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3, abs=1e-6)
    one = trainer(folder, processor, tmp_path, model, per_device_eval_batch_size=1).evaluate()
    assert one["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_accumulated_gradients_are_those_of_one_batch(folder, processor, tmp_path):
    weights = []
    for size, parts in ((2, 1), (1, 2)):
        settings = {"max_steps": 1, "gradient_accumulation_steps": parts, "optim": "sgd", "learning_rate": 1.0}
        run = trainer(folder, processor, tmp_path, per_device_train_batch_size=size, **settings)
        before = run.model.score.weight.detach().clone()
        run.train()
        weights.append(run.model.score.weight.detach() - before)
    assert weights[0].abs().max() > 0
    assert torch.allclose(weights[0], weights[1], rtol=1e-3, atol=1e-7)


def test_a_recipe_trains_a_reward_that_orders_answers_by_the_image(folder, processor, tmp_path):
    """The same answers to two images: who does not look at them is wrong about one."""
    for i in range(2):
        image(i).save(tmp_path / f"{i}.png")
    pairs = [pair | {"images": [f"{i}.png"]} for i, pair in enumerate(PAIRS)] * 4
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    quick = {"model": folder, "data": tmp_path / "pairs.json", "eval_data": tmp_path / "pairs.json"}
    quick |= {"pictures": tmp_path, "output_dir": tmp_path / "out", "use_cpu": True, "disable_tqdm": True}
    quick |= {"max_steps": 20, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    quick |= {"learning_rate": 0.01, "gradient_checkpointing": False, "lora_rank": 8, "logging_steps": 5}
    quick |= {"dataloader_num_workers": 0}
    changes = [f"{name}={value}" for name, value in quick.items()]
    metrics = run_recipe(EXAMPLES / "recipes" / "llava-reward.yaml", changes)
    assert metrics["eval_accuracy"] == 1
    assert metrics["eval_margin"] > 1
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert logged[0]["loss"] > logged[-1]["loss"]
    assert logged[-1]["accuracy"] == 1
    model = load_reward(str(tmp_path / "out"))
    reward = RewardFunction(model, AutoProcessor.from_pretrained(tmp_path / "out"), batch_size=3)
    images = [image(0), image(0), image(1), image(1)]
    found = reward([PROMPT] * 4, [*ANSWERS, *ANSWERS], [[one] for one in images], made_up=[1, 2, 3, 4])
    assert found == pytest.approx(scores_of(model, processor, [*ANSWERS, *ANSWERS], images).tolist(), abs=1e-4)
    assert found[0] - found[1] > 1
    assert found[3] - found[2] > 1
    # As TRL passes them: messages, with the images in their parts.
    contents = [[{"type": "image", "image": one}, {"type": "text", "text": PROMPT}] for one in images]
    prompts = [[{"role": "user", "content": content}] for content in contents]
    answers = [[{"role": "assistant", "content": answer}] for answer in (*ANSWERS, *ANSWERS)]
    assert reward(prompts, answers, images=[[one] for one in images]) == pytest.approx(found, abs=1e-5)


def test_a_whole_reward_is_saved_and_loaded(folder, processor, tmp_path):
    run = trainer(folder, processor, tmp_path / "out", max_steps=2, activation_checkpointing=True)
    run.train()
    run.save_model()
    model = load_reward(str(tmp_path / "out"))
    assert all(torch.equal(value, run.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_is_no_reward_is_refused(folder, processor, tmp_path):
    with pytest.raises(ValueError, match="has no score: train a reward of it first"):
        load_reward(str(folder))
    wide = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with pytest.raises(ValueError, match="load the model with num_labels=1, it has 3"):
        trainer(folder, processor, tmp_path, wide)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, not 0"):
        RewardFunction(wide, processor, 0)
    changes = [f"model={folder}", "trained_parts=[projector]", "lora_recipe=null", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="trained_parts must name the score, too"):
        run_recipe(EXAMPLES / "recipes" / "llava-reward.yaml", [*changes, "use_cpu=True"])


def test_models_without_such_a_class_are_named(clip_folder):
    with pytest.raises(ValueError, match="hfvlm has no model of HfvlmCLIPConfig that scores texts"):
        load_reward(str(clip_folder))
