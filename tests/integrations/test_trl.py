"""TRL's trainers on a folder's name, with their own collators."""

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.models.llava.tiny import converted

pytestmark = pytest.mark.integration
trl = pytest.importorskip("trl", reason="comes with hfvlm[trl]")

QUICK = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUICK |= {"per_device_train_batch_size": 4, "logging_steps": 1}
ANSWERS = ("A cat.", "It is a small dog.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(converted(tmp_path_factory.mktemp("llava")))


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def message(role, text):
    return [{"role": role, "content": text}]


def moved(trainer, before):
    after = trainer.model.state_dict()
    return {name.partition(".")[0] for name, value in before.items() if not value.equal(after[name])}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_dpo_of_a_whole_model(folder, tmp_path):
    """With a second, untouched model as reference, which TRL loads itself."""
    pairs = zip(ANSWERS, ANSWERS[::-1], strict=True)
    rows = [(message("user", "What is it?"), message("assistant", a), message("assistant", b)) for a, b in pairs] * 4
    data = datasets.Dataset.from_dict(
        {
            "prompt": [row[0] for row in rows],
            "chosen": [row[1] for row in rows],
            "rejected": [row[2] for row in rows],
            "images": [[image(i % 2)] for i in range(len(rows))],
        }
    )
    settings = trl.DPOConfig(str(tmp_path), max_steps=12, learning_rate=1e-3, max_length=None, **QUICK)
    trainer = trl.DPOTrainer(folder, args=settings, train_dataset=data)
    assert type(trainer.model).__name__ == "HfvlmLLaVAForConditionalGeneration"
    before = weights(trainer)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["loss"] < 0.66
    assert steps[-1]["rewards/margins"] > 0.1
    assert moved(trainer, before) >= {"language_model", "projector"}


@pytest.mark.parametrize(("method", "images"), [("GRPO", 1), ("GRPO", 2), ("RLOO", 1)])
def test_answers_are_rewarded(folder, tmp_path, method, images):
    """By their number of tokens: short ones are likelier afterwards. Images come as lists of lists."""
    data = datasets.Dataset.from_dict(
        {
            "prompt": [message("user", "What is it?")] * 8,
            "images": [[image(i + j) for j in range(images)] for i in range(8)],
        }
    )
    settings = getattr(trl, f"{method}Config")(
        str(tmp_path), max_steps=4, learning_rate=1e-3, num_generations=4, max_completion_length=6, **QUICK
    )
    seen = []

    def reward(completions, **kwargs):
        seen.append(kwargs)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = getattr(trl, f"{method}Trainer")(folder, reward_funcs=reward, args=settings, train_dataset=data)
    assert type(trainer.model).__name__ == "HfvlmLLaVAForConditionalGeneration"
    before = weights(trainer)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 4
    assert all(np.isfinite(entry["loss"]) and entry["completions/max_length"] <= 6 for entry in steps)
    assert any(entry["reward_std"] > 0 for entry in steps)
    assert "language_model" in moved(trainer, before)
    assert {len(row) for kwargs in seen for row in kwargs["images"]} == {images}
