"""Papers' procedures as recipes: each runs on generated images, and says which parameters moved."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.samples import scenes
from hfvlm.training import recipes
from hfvlm.training.augmentation import Framed, RandomResizedCrop
from hfvlm.training.recipes import run_recipe
from tests.support.paths import EXAMPLES

QUICK = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_num_workers": 0, "warmup_steps": 0}
QUICK |= {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "eval_strategy": "no"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rendered scenes with captions, colours, questions and sentences about two of them."""
    folder, random = tmp_path_factory.mktemp("scenes"), np.random.RandomState(0)
    kinds = scenes.all_scenes()
    (folder / "rows").mkdir()
    for split, count in (("train", 32), ("test", 8)):
        rows = []
        for i in range(count):
            kind, path = kinds[(7 * i) % len(kinds)], str(folder / f"{split}-{i}.png")
            kind.render(random).save(path)
            row = {"image": path, "text": kind.caption(), "label": kind.colour, "image_id": i // 2}
            row |= {"question": "what shape ?", "answers": [kind.shape] * 2 + ["circle"], "truth": i % 2 == 0}
            rows.append(row | {"images": [path, rows[-1]["image"] if rows else path], "sentence": kind.caption()})
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows"


def run(name, out, **changes):
    """Run a recipe -> its metrics, and the names of what moved."""
    options = QUICK | {"output_dir": out} | changes
    changes = [f"{key}={json.dumps(value) if value is None else value}" for key, value in options.items()]
    metrics = run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", changes)
    return metrics, set(json.loads((out / "moved.json").read_text())["moved"])


def names(model):
    return {name for name, _ in model.named_parameters()}


def test_clip_is_pretrained_by_the_papers_schedule(data, clip_folder, tmp_path, monkeypatch):
    """The decay is of weights alone, a rate climbs by a 2,000th of 5e-4 in a step, and the temperature is bounded."""
    seen = {}
    finish = recipes.finish

    def watched(trainer, *rest):
        found = finish(trainer, *rest)
        seen["trainer"] = trainer
        return found

    monkeypatch.setattr(recipes, "finish", watched)
    model = AutoModel.from_pretrained(clip_folder)
    model.logit_scale.scale.data.fill_(math.log(200.0))
    model.save_pretrained(tmp_path / "begun")
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path / "begun")
    options = {"model": tmp_path / "begun", "dataset": data, "warmup_steps": 2000, "max_steps": 4000}
    written = yaml.safe_load((EXAMPLES / "recipes" / "clip-pretraining.yaml").read_text())
    assert (written["warmup_steps"], written["num_train_epochs"], written["weight_decay"]) == (2000, 32, 0.2)
    monkeypatch.setattr("transformers.trainer_callback.DefaultFlowCallback.on_step_end", stop_after(3))
    metrics, moved = run("clip-pretraining", tmp_path / "out", **options, logging_steps=1)
    trainer = seen["trainer"]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 5e-4 / 2000, 2 * 5e-4 / 2000], rel=1e-6)
    for group in trainer.optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.2) for parameter in group["params"])
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.98), 1e-6)
    # A rate of 1e-7 leaves some biases where they are, in float32.
    assert {name for name, parameter in model.named_parameters() if parameter.ndim > 1} | {
        "logit_scale.scale"
    } <= moved
    assert AutoModel.from_pretrained(tmp_path / "out").logit_scale.exp().item() <= 100.001
    assert math.isfinite(metrics["eval_loss"])


def stop_after(steps):
    def on_step_end(self, arguments, state, control, **rest):
        control.should_log = True
        control.should_training_stop = state.global_step >= steps
        return control

    return on_step_end


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """An ALIGN and a FILIP that learned nothing yet."""
    folder = tmp_path_factory.mktemp("towers")
    for name in ("align", "filip"):
        hfvlm.untrained(name, folder / name)
    return folder


@pytest.mark.parametrize("name", ["align", "filip"])
def test_a_random_crop_is_not_cropped_again(name, towers):
    """Both processors crop the centre of what they resized, which a crop already is."""
    processor = AutoProcessor.from_pretrained(towers / name).image_processor
    assert processor.resized > processor.size["height"]
    image, random = scenes.Scene("red", "cross", "large").render(pixels=48), np.random.default_rng
    crop = RandomResizedCrop(processor.size["height"], (0.3, 1.0))
    view = Framed(crop, processor.resized)(image, random(1))
    plain = processor(crop(image, random(1)), do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(view, return_tensors="pt")["pixel_values"], plain, rtol=0, atol=1e-6)


def test_align_is_trained_by_lamb_on_random_crops(data, towers, tmp_path):
    options = {"model": towers / "align", "dataset": data, "crop_from": 36, "mini_batch_size": 4, "eval_steps": 2}
    metrics, moved = run("align", tmp_path / "out", **options)
    assert moved == names(AutoModel.from_pretrained(towers / "align"))
    assert metrics["eval_loss"] > 0


@pytest.mark.integration  # ALIGN's run is of the same task
def test_filip_is_trained_by_its_own_loss(data, towers, tmp_path):
    options = {"model": towers / "filip", "dataset": data, "mini_batch_size": 4, "max_length": 24}
    metrics, moved = run("filip", tmp_path / "out", **options)
    model = AutoModel.from_pretrained(towers / "filip")
    still = names(model) - moved
    assert all("summary" in name or "post_norm" in name for name in still), still
    assert metrics["eval_loss"] > 0


def test_simclr_then_a_probe_then_fine_tuning_then_a_student(data, clip_folder, tmp_path):
    """Views train the tower and the head; the probe its classifier alone; the student learns without labels."""
    first = {"model": clip_folder, "dataset": data, "per_device_train_batch_size": 16, "learning_rate": 0.3}
    metrics, moved = run("simclr", tmp_path / "views", **first)
    assert metrics["train_loss"] > 0
    tower = hfvlm.HfvlmCLIPForImageClassification.from_pretrained(tmp_path / "views")
    inside = {f"model.{name}" for name in names(tower) if name.startswith("vision_model.")}
    assert moved == inside | {f"head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    begun = {"model": tmp_path / "views", "dataset": data, "num_train_epochs": 1}
    _, moved = run("linear-probe", tmp_path / "probe", **begun)
    assert moved == {"classifier.weight", "classifier.bias"}
    _, moved = run("fine-tune-classifier", tmp_path / "tuned", **begun, learning_rate=1e-3)
    assert moved == {*names(tower)}
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (tmp_path / "unlabelled").mkdir()
    lines = "\n".join(json.dumps({"image": row["image"]}) for row in rows)
    (tmp_path / "unlabelled" / "train.jsonl").write_text(lines)
    options = {"model": clip_folder, "teacher": tmp_path / "tuned", "dataset": tmp_path / "unlabelled"}
    _, moved = run("simclr-distillation", tmp_path / "student", **options, eval_split=None, learning_rate=0.3)
    assert moved == {*names(tower)}
    student = hfvlm.HfvlmCLIPForImageClassification.from_pretrained(tmp_path / "student")
    assert set(student.config.id2label.values()) == {row["label"] for row in rows}


@pytest.mark.integration  # a step of it by the formula is in test_distilling.py
def test_a_dual_encoder_learns_from_a_teacher_of_another_size(data, clip_folder, tmp_path):
    teacher = AutoModel.from_pretrained(clip_folder)
    config = teacher.config.__class__(**teacher.config.to_dict())
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    config.vision_config.projection_dim = config.text_config.projection_dim = 16
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "small")
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path / "small")
    options = {"model": tmp_path / "small", "teacher": clip_folder, "dataset": data, "mini_batch_size": 4}
    _, moved = run("clip-distillation", tmp_path / "out", **options)
    assert moved == names(AutoModel.from_pretrained(tmp_path / "small"))


BLIP = {
    "blip-retrieval": "vision_model text_model itm_head logit_scale teacher",
    "blip-captions": "vision_model text_decoder",
    "blip-vqa": "vision_model text_model text_decoder",
    "blip-nlvr2": "vision_model text_model classifier",
}


# Two of the four have tasks of their own, and run with all tests.
RARE = [pytest.param(name, marks=pytest.mark.integration) for name in ("blip-retrieval", "blip-captions")]


@pytest.mark.parametrize("name", ["blip-vqa", "blip-nlvr2", *RARE])
def test_blip_is_fine_tuned_from_one_pretraining(name, data, small_blip, tmp_path):
    options = {"model": small_blip("HfvlmBLIPForPreTraining"), "dataset": data, "learning_rate": 1e-3}
    options |= {"label_column": "truth"} if name == "blip-nlvr2" else {}
    metrics, moved = run(name, tmp_path / "out", **options)
    assert metrics["train_loss"] > 0
    assert {part.partition(".")[0] for part in moved} == set(BLIP[name].split())
    written = yaml.safe_load((EXAMPLES / "recipes" / f"{name}.yaml").read_text())["model_class"]
    model = getattr(hfvlm, written).from_pretrained(tmp_path / "out")
    unused = ("projection.",) if name in ("blip-vqa", "blip-captions") else ()
    still = {part for part in names(model) - moved if not any(word in part for word in unused)}
    assert not still, still


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("blip-vqa", {"model_class": "HfvlmNothing"}, "HfvlmNothing is no model of hfvlm"),
        ("blip-nlvr2", {"model_class": "HfvlmBLIPModel"}, "takes no several images"),
        ("clip-distillation", {"teacher": None}, "distillation needs a teacher"),
        ("simclr", {"optimizer": "lambs"}, "optimizer 'lambs' is none of lamb, lars"),
        ("simclr", {"temperature": 0}, "temperature must be"),
        ("align", {"crop_scale": 0.5}, "crop_from and crop_scale are two ways"),
        ("clip-distillation", {"teacher_share": 2}, "teacher_share must be"),
    ],
)
def test_what_cannot_be_is_named(name, changes, message, data, small_blip, clip_folder, tmp_path):
    folder = small_blip("HfvlmBLIPForPreTraining") if name.startswith("blip") else clip_folder
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path / "out", **{"model": folder, "dataset": data} | changes)
