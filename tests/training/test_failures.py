"""Runs that cannot succeed are refused or ended, and runs go on from whole checkpoints alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

import hfvlm
from hfvlm.presets import load_preset
from hfvlm.training import ContrastiveCollator, ContrastiveTrainer, ContrastiveTrainingArguments
from hfvlm.training.continuing import whole_checkpoint
from hfvlm.training.data import StreamedRows
from hfvlm.training.failures import CollapseWatch, TrainingError
from hfvlm.training.recipes import run_recipe
from hfvlm.training.row_trainer import RowTrainer
from tests.support.processes import run_alone


@pytest.fixture(scope="module")
def rows():
    random = np.random.RandomState(0)
    images = [Image.fromarray(random.randint(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(13)]
    return [{"image": image, "text": f"a number {i}"} for i, image in enumerate(images)]


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-4, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return ContrastiveTrainingArguments(str(folder), **defaults | options)


def trainer_for(folder, clip_folder, rows, **options):
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    return ContrastiveTrainer(model, arguments(folder, **options), train_dataset=rows, processing_class=processor)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Batches of one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "one pair has no negatives.*per_device_train_batch_size to at least 2"),
        ({"per_device_train_batch_size": 1, "mini_batch_size": 1}, "one pair has no negatives"),
        ({"dataloader_drop_last": False}, "The last batch has one of 13 rows: set dataloader_drop_last=True"),
    ],
)
def test_one_pair_is_not_compared_with_nothing(tmp_path, clip_folder, rows, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, clip_folder, rows, **options).train()


@pytest.mark.parametrize("trainer", [Trainer, RowTrainer])
def test_one_pair_is_refused_in_every_trainer(trainer, tmp_path, clip_folder, rows):
    options = {"max_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, disable_tqdm=True, **options)
    collator = ContrastiveCollator(AutoProcessor.from_pretrained(clip_folder))
    with pytest.raises(ValueError, match="one pair has no negatives"):
        trainer(AutoModel.from_pretrained(clip_folder), args, collator, train_dataset=rows).train()


# Data sets that stream


def test_streams_train_as_tables_in_their_order(tmp_path, clip_folder, rows):
    import datasets

    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = trainer_for(tmp_path, clip_folder, stream, max_steps=3)
    trainer.train()
    table = trainer_for(tmp_path, clip_folder, rows, max_steps=3, train_sampling_strategy="sequential")
    table.train()
    np.testing.assert_allclose(losses(trainer), losses(table), rtol=1e-5)
    more = trainer_for(tmp_path, clip_folder, stream, max_steps=7)  # three batches of four make an epoch of 13 rows
    more.train()
    assert more.state.global_step == 7
    assert all(np.isfinite(losses(more)))


def test_streams_leave_out_what_cannot_be_read_and_incomplete_groups(clip_folder, rows, caplog):
    damaged = [*rows[:2], {"image": b"junk", "text": "x"}, {"image": rows[0]["image"], "text": None}, *rows[2:]]
    collator = ContrastiveCollator(AutoProcessor.from_pretrained(clip_folder))
    stream = StreamedRows(damaged, collator.read, group=4, training=True)
    found = list(stream)
    assert [row["index"] for row in found] == [0, 1, *range(4, 14)]
    assert [row["replaced"] for row in found[:4]] == [0, 0, 2, 0]
    assert "Row 2 is skipped" in caplog.text
    with pytest.raises(ValueError, match="10 rows in turn cannot be read"):
        list(StreamedRows([{"image": b"", "text": "x"}] * 10, collator.read))


def test_streams_are_evaluated(tmp_path, clip_folder, rows):
    import datasets

    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = trainer_for(tmp_path, clip_folder, rows)
    found, expected = trainer.evaluate(stream), trainer.evaluate(rows)
    times = {name for name in found if "second" in name or "runtime" in name}
    assert {k: v for k, v in found.items() if k not in times} == pytest.approx(
        {k: v for k, v in expected.items() if k not in times}
    )
    assert found["eval_image_to_text_recall@1"] is not None


def test_the_collator_in_transformers_own_trainer(tmp_path, clip_folder, rows):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, disable_tqdm=True, logging_steps=1, **options)
    processor = AutoProcessor.from_pretrained(clip_folder)
    model = AutoModel.from_pretrained(clip_folder)
    trainer = Trainer(model, args, ContrastiveCollator(processor), train_dataset=rows, eval_dataset=rows[:4])
    batch = processor(images=[row["image"] for row in rows[:4]], text=[row["text"] for row in rows[:4]], padding=True)
    with torch.no_grad():
        expected = model.eval()(**batch, return_loss=True).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert all(np.isfinite(losses(trainer)))
    with pytest.raises(ValueError, match="augment needs a ContrastiveTrainer"):
        ContrastiveCollator(processor, augment={"image": lambda x, _: x})(rows[:2])


LOSSES = ("clip", "coca", "mammut", "flava", "siglip", "filip", "wukong", "imagebind", "blip")


@pytest.mark.parametrize("architecture", LOSSES)
def test_every_contrastive_model_is_evaluated_by_its_loss(architecture, tmp_path):
    """By `return_loss` alone, whatever labels its forward takes."""
    config = load_preset(f"{architecture}/tiny").make_config()
    classes = {"flava": "HfvlmFLAVAForPreTraining", "blip": "HfvlmBLIPForImageTextRetrieval"}
    model = getattr(hfvlm, classes[architecture])(config) if architecture in classes else AutoModel.from_config(config)
    size, text = config.vision_config.image_size, config.text_config
    rows = [
        {
            "pixel_values": torch.randn(3, size, size),
            "input_ids": torch.randint(5, text.vocab_size - 5, (getattr(text, "max_position_embeddings", 8),)),
        }
        for _ in range(4)
    ]

    def collate(batch):
        return {k: torch.stack([row[k] for row in batch]) for k in batch[0]} | {"return_loss": True}

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model, args, collate, eval_dataset=rows)
    found = trainer.evaluate()["eval_loss"]
    assert np.isfinite(found)
    if architecture not in ("blip", "mammut"):  # which draw negatives, and crop
        with torch.no_grad():
            assert found == pytest.approx(model.eval()(**collate(rows)).loss.item(), rel=1e-4)


# Runs that fail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1000.0, "max_steps": 8, "warmup_steps": 0}, "the run has collapsed. Lower learning_rate"),
        ({"learning_rate": 1.0, "max_steps": 12, "warmup_steps": 0}, "all rows of a batch have the same"),
        ({"learning_rate": 1e30, "max_steps": 8, "warmup_steps": 0}, "the loss is nan. Lower learning_rate"),
        ({"learning_rate": 1e30, "mini_batch_size": 2, "warmup_steps": 0}, "the loss is nan. Lower learning_rate"),
    ],
)
def test_a_run_that_collapses_ends_with_an_error(tmp_path, clip_folder, rows, options, message):
    with pytest.raises(TrainingError, match=message):
        trainer_for(tmp_path, clip_folder, rows, **options).train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, clip_folder, rows):
    trainer = trainer_for(
        tmp_path,
        clip_folder,
        rows,
        max_steps=1,
        learning_rate=1e39,
        save_strategy="steps",
        save_steps=1,
        warmup_steps=0,
    )
    with pytest.raises(TrainingError, match="is not finite; nothing is saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*.safetensors"))


def test_embeddings_that_are_alike_from_the_start_are_no_collapse(tmp_path, clip_folder, rows):
    torch.manual_seed(0)
    config = AutoModel.from_pretrained(clip_folder).config
    trainer = ContrastiveTrainer(
        AutoModel.from_config(config), arguments(tmp_path, max_steps=8), train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(clip_folder),
    )  # fmt: skip
    trainer.train()
    assert trainer.watch.suspicious == 0


def test_copies_are_reported(tmp_path, clip_folder, rows):
    with pytest.raises(TrainingError, match="all rows of a batch have the same image_embeds.*copies in the data"):
        trainer_for(tmp_path, clip_folder, [row | {"image": rows[0]["image"]} for row in rows]).train()


def test_a_watch_needs_several_steps_in_a_row(tmp_path):
    from hfvlm.modeling.outputs import DualEncoderOutput

    watch, args = CollapseWatch(), arguments(tmp_path)
    same, apart = torch.ones(4, 8), torch.eye(4, 8)

    def see(embeds):
        watch.see(DualEncoderOutput(image_embeds=embeds, text_embeds=apart, logit_scale=torch.ones(1)), 1, args)

    for embeds in (same, same, apart, same, same):
        see(embeds)
    with pytest.raises(TrainingError, match="image_embeds"):
        see(same)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", float("nan"), "a finite number of at least 0, not nan"),
        ("learning_rate", -1e-4, "a finite number of at least 0, not -0.0001"),
        ("learning_rate", "5e-4", "a finite number of at least 0, not '5e-4'"),
        ("weight_decay", float("inf"), "a finite number of at least 0"),
        ("per_device_train_batch_size", 0, "an integer of at least 1, not 0"),
        ("per_device_eval_batch_size", 2.5, "an integer of at least 1, not 2.5"),
        ("max_steps", -2, "an integer of at least -1"),
        ("max_steps", True, "an integer"),
        ("seed", -1, "an integer from 0 to"),
        ("num_train_epochs", 0, "a finite number above 0"),
        ("dataloader_num_workers", -1, "an integer of at least 0"),
        ("mini_batch_size", 0, "an integer of at least 1"),
        ("mini_batch_size", 1.0, "an integer of at least 1"),
        ("max_logit_scale", 0, "a finite number above 0"),
        ("patch_dropout", -0.1, "a finite number from 0 to 1"),
        ("recall_at", [0], "an integer of at least 1"),
        ("tower_learning_rates", {"vision": float("nan")}, "a finite number of at least 0"),
    ],
)
def test_numbers_are_checked(tmp_path, name, value, wanted):
    with pytest.raises(ValueError, match=f"{name}.* must be {wanted}"):
        arguments(tmp_path, **{name: value})


def test_numbers_of_transformers_own_arguments_are_checked(tmp_path, clip_folder, rows):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", learning_rate=float("inf"))
    with pytest.raises(ValueError, match="learning_rate must be a finite number"):
        RowTrainer(AutoModel.from_pretrained(clip_folder), args, train_dataset=rows)


# Several processes


def recipe_of_two(recipe):
    os.environ |= {"WORLD_SIZE": "2", "RANK": "0"}
    run_recipe(recipe)


def test_processes_that_do_not_see_one_another_are_refused(tmp_path, clip_folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task: contrastive\nmodel: {clip_folder}\ndataset: {tmp_path}\noutput_dir: {tmp_path / 'out'}\n"
    )
    message = r"2 processes were started \(WORLD_SIZE\), but the arguments see 1.*set use_cpu: true"
    with pytest.raises((ValueError, RuntimeError), match=None if torch.cuda.is_available() else message):
        run_alone(recipe_of_two, recipe)
    assert not (tmp_path / "out").exists()


# Going on


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, clip_folder, rows):
    folder = tmp_path_factory.mktemp("interrupted")
    trainer = trainer_for(folder, clip_folder, rows, max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "model.safetensors is truncated": lambda path: cut(path / "model.safetensors"),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "optimizer.pt is truncated": lambda path: cut(path / "optimizer.pt"),
    "no optimizer.pt": lambda path: (path / "optimizer.pt").unlink(),
    "no scheduler.pt": lambda path: (path / "scheduler.pt").unlink(),
    "no rng_state.pth": lambda path: (path / "rng_state.pth").unlink(),
    "trainer_state.json is damaged": lambda path: cut(path / "trainer_state.json"),
    "no trainer_state.json": lambda path: (path / "trainer_state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_gone_on_from(damage, interrupted, clip_folder, rows, tmp_path, caplog):
    folder, expected = interrupted
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    DAMAGES[damage](copy / "checkpoint-6")
    assert whole_checkpoint(copy) == str(copy / "checkpoint-4")
    assert f"checkpoint-6 is skipped: {damage}" in caplog.text
    trainer = trainer_for(copy, clip_folder, rows, max_steps=6, save_strategy="no")
    trainer.train(resume_from_checkpoint="True")
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    with pytest.raises(ValueError, match=f"checkpoint-6: training cannot resume exactly from it: {damage}"):
        trainer_for(copy, clip_folder, rows).train(resume_from_checkpoint=str(copy / "checkpoint-6"))


def test_without_a_whole_checkpoint_nothing_begins_silently(interrupted, clip_folder, rows, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(interrupted[0], copy)
    for path in copy.glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*checkpoint-2 is skipped: no optimizer"):
        trainer_for(copy, clip_folder, rows).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no such checkpoint"):
        trainer_for(copy, clip_folder, rows).train(resume_from_checkpoint=str(copy / "checkpoint-8"))


def test_sharded_weights_are_checked(interrupted, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(interrupted[0] / "checkpoint-6", copy / "checkpoint-6")
    path = copy / "checkpoint-6"
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no model-00002-of-00002.safetensors"):
        whole_checkpoint(copy)
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    assert Path(whole_checkpoint(copy)) == path
    with pytest.raises(ValueError, match="no rng_state_0.pth; no rng_state_1.pth"):
        whole_checkpoint(copy, processes=2)


def test_a_recipe_is_checked_before_anything_is_loaded(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: captions\nmodel: nowhere\ndataset: nowhere\noutput_dir: {tmp_path}\n")
    with pytest.raises(ValueError, match="per_device_train_batch_size must be an integer of at least 1, not 0"):
        run_recipe(recipe, ["per_device_train_batch_size=0"])
    with pytest.raises(ValueError, match="lora_rank must be an integer of at least 1, not 0"):
        run_recipe(recipe, ["lora_rank=0"])
    with pytest.raises(ValueError, match="crop_scale must be a finite number above 0 to 1, not 0.0"):
        run_recipe(recipe, ["crop_scale=0.0"])
