import functools
import io
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser

import hfvlm
from hfvlm.conversion import coca
from hfvlm.evaluation.retrieval import recall_at
from hfvlm.losses import contrastive_loss, focal_contrastive_loss, sigmoid_loss
from hfvlm.modeling.base import unit
from hfvlm.modeling.outputs import contrastive_fields
from hfvlm.models.clip import HfvlmCLIPConfig, HfvlmCLIPModel
from hfvlm.models.siglip import HfvlmSigLIPConfig, HfvlmSigLIPModel
from hfvlm.modules.dropout import PatchDropout
from hfvlm.modules.transformer import PreNormLayer
from hfvlm.samples import scenes
from hfvlm.training import (
    ContrastiveCollator,
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    RandomCropAndFlip,
    RandomResizedCrop,
    cached_backward,
    near_duplicates,
)
from hfvlm.training.data import EpochSampler, Rows
from hfvlm.training.gradient_cache import split
from tests.conftest import SHIPPED
from tests.models.clip import test_modeling as clip_tests
from tests.models.siglip import test_modeling as siglip_tests
from tests.support.processes import run_processes

DROPOUT = {"attention_dropout": 0.2, "patch_dropout": 0.25}
LOSSES = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss, "focal": focal_contrastive_loss}


# Gradient caching


def clip(**vision):
    return HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=clip_tests.VISION | vision, text_config=clip_tests.TEXT))


def resnet():
    return HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=clip_tests.RESNET, text_config=clip_tests.TEXT))


def siglip(**vision):
    return HfvlmSigLIPModel(
        HfvlmSigLIPConfig(vision_config=siglip_tests.VISION | vision, text_config=siglip_tests.TEXT)
    )


def inputs(rows, pixels=28):
    torch.manual_seed(1)
    ids = torch.randint(2, 40, (rows, 6))
    ids[:, 0], ids[:, 4] = 48, 49
    return {"pixel_values": torch.randn(rows, 3, pixels, pixels), "input_ids": ids}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(sorted(found.items()))


def same_gradients(model, expected, tolerance):
    """In float64 each of them, in float32 all of them together: single biases are but rounding there."""
    found = gradients(model)
    assert set(found) == set(expected)
    exact = next(iter(found.values())).dtype == torch.float64
    for named in [[name] for name in found] if exact else [list(found)]:
        a, b = (torch.cat([grads[name].flatten() for name in named]) for grads in (found, expected))
        error = (a - b).norm() / b.norm().clamp_min(1e-6)
        assert error < tolerance, (named[0], error.item())


@pytest.mark.parametrize(
    ("make", "loss"), [(clip, "softmax"), (clip, "focal"), (siglip, "sigmoid"), (siglip, "softmax")]
)
def test_mini_batches_have_the_gradients_of_the_whole_batch(make, loss):
    """With dropout on: the reference holds the graph of all mini-batches at once."""
    model, batch = make(**DROPOUT).train(), inputs(10)
    pair_loss = functools.partial(model.contrast, pair_loss=LOSSES[loss])
    torch.manual_seed(2)
    outputs = [model(**part) for part in split(batch, 4)]
    names = contrastive_fields(outputs[0])[0]
    whole = type(outputs[0])(
        **{name: torch.cat([output[name] for output in outputs]) for name in names},
        **contrastive_fields(outputs[-1])[1],
    )
    expected_loss = pair_loss(whole)
    expected_loss.backward()
    expected, after = gradients(model), torch.get_rng_state()

    model.zero_grad()
    torch.manual_seed(2)
    found_loss = cached_backward(model, pair_loss, batch, 4)
    expected |= {k: torch.zeros(1) for k in gradients(model) if k not in expected}  # a bias that the loss leaves out
    torch.testing.assert_close(found_loss, expected_loss.detach(), rtol=1e-6, atol=0)
    same_gradients(model, expected, 1e-5)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("make", [clip, siglip])
def test_without_dropout_it_is_one_batch(make, dtype, tolerance):
    model, batch = make().to(dtype).train(), inputs(10)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    model(**batch, return_loss=True).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    cached_backward(model, model.contrast, batch, 3)
    same_gradients(model, expected, tolerance)


def test_batch_norms_see_each_mini_batch_once():
    model = resnet().train()
    cached_backward(model, model.contrast, inputs(6, 64), 2)
    counts = {buffer.item() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {3}


def test_inputs_must_have_equally_many_rows():
    with pytest.raises(ValueError, match=r"'a': 4, 'b': 3"):
        split({"a": torch.zeros(4), "b": torch.zeros(3)}, 2)


# Data


def scene_rows(count=48, captions=1):
    random = np.random.RandomState(0)
    kinds = scenes.all_scenes()
    rows = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        texts = [kind.caption(template) for template in scenes.TEMPLATES[:captions]]
        rows.append({"image": kind.render(random), "text": texts if captions > 1 else texts[0]})
    return rows


@pytest.fixture(scope="module")
def processor(clip_folder):
    return AutoProcessor.from_pretrained(clip_folder)


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    sampler, again, other = EpochSampler(20, seed=1), EpochSampler(20, seed=1), EpochSampler(20, seed=2)
    first = list(sampler)
    assert sorted(index for index, _ in first) == list(range(20))
    assert first == list(again) != list(other)
    sampler.epoch = 3
    assert list(sampler) != first
    assert {epoch for _, epoch in sampler} == {3}
    again.epoch = 3
    assert list(sampler) == list(again)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_cannot_be_read_are_replaced_and_counted(processor, workers, caplog):
    rows = [{"image": png(row["image"]), "text": row["text"]} for row in scene_rows(12)]
    rows[3]["image"] = rows[3]["image"][:50]
    rows[7]["image"] = "no/such/file.png"
    rows[9]["text"] = None
    collator = ContrastiveCollator(processor)
    dataset = Rows(rows, collator.read)
    loader = DataLoader(dataset, 4, sampler=EpochSampler(12, 0), collate_fn=collator, num_workers=workers)
    batches = list(loader)
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 4]
    assert sum((batch["replaced"] > 0).sum() for batch in batches) == 3
    assert not {3, 7, 9} & {int(i) for batch in batches for i in batch["row_ids"]}
    for a, b in zip(batches, list(loader), strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    if workers == 0:
        assert "Row 7 is skipped" in caplog.text
        assert "no/such/file.png: no such file" in caplog.text
    with pytest.raises(ValueError, match="10 rows in turn cannot be read"):
        Rows([{"image": b"", "text": "x"}], collator.read)[0, 0]


def test_a_caption_is_drawn_in_training_and_all_are_used_in_evaluation(processor):
    rows = scene_rows(1, captions=4)
    dataset = Rows(rows, ContrastiveCollator(processor).read)
    drawn = {dataset[0, epoch]["text"][0] for epoch in range(20)}
    assert drawn == set(rows[0]["text"])
    assert dataset[0]["text"] == rows[0]["text"]


def test_columns_by_name(processor):
    row = {"photo": Image.new("RGB", (40, 30)), "words": "a thing", "number": "x7"}
    collator = ContrastiveCollator(processor, {"image": "photo", "text": "words"}, id_column="number")
    batch = collator([Rows([row], collator.read)[0]] * 2)
    assert batch["row_ids"][0] == batch["row_ids"][1]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    with pytest.raises(KeyError, match="no column 'photo' for image; it has words"):
        collator.read({"words": "a"}, None)


@pytest.mark.parametrize("augment", [RandomResizedCrop(16, (0.3, 1.0)), RandomCropAndFlip(16, 24)])
def test_augmentations_are_seeded(augment):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), dtype=np.uint8))
    draw = [np.asarray(augment(image, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert draw[0].shape == (16, 16, 3)
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_a_crop_that_never_fits_is_the_middle():
    assert RandomResizedCrop(8, (1.0, 1.0)).box(100, 10, np.random.default_rng(0)) == (43, 0, 56, 10)


def test_patch_dropout_keeps_the_class_token_and_whole_patches():
    x = torch.arange(2 * 3 * 9, dtype=torch.float).view(6, 9, 1)
    part = PatchDropout(0.5, prefix=1)
    assert part.eval()(x) is x
    kept = part.train()(x, frames=3)
    assert kept.shape == (6, 5, 1)
    assert torch.equal(kept[:, 0], x[:, 0])
    places = kept[:, 1:, 0] - x[:, :1, 0]
    assert torch.equal(places[0], places[2])
    assert torch.equal(places[3], places[5])
    assert all(len(set(row.tolist())) == 4 and min(row) >= 1 for row in places)


def test_duplicates_point_at_the_first_of_them(monkeypatch):
    monkeypatch.setattr("hfvlm.training.duplicates.BLOCK", 12)
    torch.manual_seed(0)
    rows = unit(torch.randn(5, 16))
    rows = torch.cat([rows, unit(rows[[1, 3]] + 0.01 * torch.randn(2, 16)), rows[1:2]])
    assert near_duplicates(rows).tolist() == [-1, -1, -1, -1, -1, 1, 3, 1]
    assert near_duplicates(rows, of=rows[3:4]).tolist() == [-1, -1, -1, 0, -1, -1, 0, -1]


# Recall


def test_recall_counts_equal_and_missing_scores_against_a_query():
    assert recall_at(torch.eye(4), torch.eye(4), [1]) == {1: 1.0}
    assert recall_at(torch.ones(4, 2), torch.ones(4, 2), [1, 3, 4]) == {1: 0.0, 3: 0.0, 4: 1.0}
    assert recall_at(torch.full((4, 2), torch.nan), torch.ones(4, 2), [1]) == {1: 0.0}
    assert recall_at(torch.eye(4), torch.eye(4).roll(1, 0), [1, 2]) == {1: 0.0, 2: 0.0}


def test_recall_with_several_positives_equals_the_definition():
    torch.manual_seed(0)
    queries, gallery = torch.randn(20, 4), torch.randn(60, 4)
    ids, gallery_ids = torch.arange(20), torch.arange(60) % 20
    order = (queries @ gallery.t()).argsort(descending=True)
    for k in (1, 5):
        expected = np.mean([bool((gallery_ids[order[i, :k]] == i).any()) for i in range(20)])
        assert recall_at(queries, gallery, [k], ids, gallery_ids)[k] == pytest.approx(expected)
    with pytest.raises(ValueError, match="Query 3 has no positive"):
        recall_at(queries, gallery, [1], ids, gallery_ids % 3)


# The trainer


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 10,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    return ContrastiveTrainingArguments(str(folder), **defaults | options)


def trainer_for(folder, clip_folder, processor, *, model=None, rows=None, evaluation=None, collator=None, **options):
    return ContrastiveTrainer(
        model or AutoModel.from_pretrained(clip_folder),
        arguments(folder, **options),
        collator,
        train_dataset=scene_rows() if rows is None else rows,
        eval_dataset=evaluation,
        processing_class=processor,
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.bare_model.state_dict().items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_a_step_is_that_of_a_hand_written_loop(tmp_path, clip_folder, processor, mini_batch_size):
    rows = scene_rows(12)
    trainer = trainer_for(
        tmp_path, clip_folder, processor, rows=rows, max_steps=1, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, mini_batch_size=mini_batch_size,
    )  # fmt: skip
    trainer.train()
    model = AutoModel.from_pretrained(clip_folder).train()
    batch = processor(
        images=[row["image"] for row in rows], text=[row["text"] for row in rows], return_tensors="pt", padding=True
    )
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.state.log_history[0]["samples_per_second"] > 0
    after = weights(trainer)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 1e-3 * parameter.grad
        if name == "logit_scale.scale":
            expected = expected.clamp(max=np.log(100))
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-7)


def test_an_interrupted_run_continues_exactly(tmp_path, clip_folder, processor):
    """Across an epoch's end, with dropout, random crops and a random choice of captions."""

    def run(folder, resume=None, **options):
        model = AutoModel.from_pretrained(clip_folder)
        model.vision_model.config.attention_dropout = 0.1
        trainer = trainer_for(
            folder,
            clip_folder,
            processor,
            model=model,
            rows=scene_rows(40, captions=4),
            evaluation=scene_rows(12),
            eval_strategy="steps",
            eval_steps=2,
            collator=ContrastiveCollator(processor, augment={"image": RandomResizedCrop(32, (0.5, 1.0))}),
            mini_batch_size=8,
            patch_dropout=0.25,
            save_strategy="steps",
            save_steps=4,
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", max_steps=7)
    part = run(tmp_path / "part", str(tmp_path / "whole" / "checkpoint-4"), max_steps=7)
    assert not moved(weights(whole), weights(part))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, part)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 7


def test_evaluation_is_of_the_whole_set(tmp_path, clip_folder, processor):
    rows = scene_rows(48, captions=2)
    rows[5]["image"] = b"not a picture"
    trainer = trainer_for(tmp_path, clip_folder, processor, evaluation=rows)
    metrics = trainer.evaluate()
    readable = rows[:5] + rows[6:]
    model = AutoModel.from_pretrained(clip_folder).eval()
    texts = [text for row in readable for text in row["text"]]
    batch = processor(images=[row["image"] for row in readable], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**batch)
        loss = contrastive_loss(output.image_embeds, output.text_embeds[::2], output.logit_scale)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["eval_unreadable_rows"] == 1
    owner = torch.arange(len(readable)).repeat_interleave(2)
    best = output.logits_per_image.topk(5).indices
    expected = np.mean([bool((owner[best[i]] == i).any()) for i in range(len(readable))])
    assert metrics["eval_image_to_text_recall@5"] == pytest.approx(expected)
    best = output.logits_per_text.argmax(1)
    assert metrics["eval_text_to_image_recall@1"] == pytest.approx((best == owner).double().mean().item())


def test_rows_of_one_image_are_positives(tmp_path, clip_folder, processor):
    kinds = scene_rows(8, captions=4)
    rows = [{"image": row["image"], "text": text, "n": i} for i, row in enumerate(kinds) for text in row["text"]]
    several = trainer_for(tmp_path, clip_folder, processor, evaluation=kinds).evaluate()
    collator = ContrastiveCollator(processor, id_column="n")
    flat = trainer_for(tmp_path, clip_folder, processor, evaluation=rows, collator=collator).evaluate()
    for name in several:
        if "recall" in name:
            assert flat[name] == several[name], name


def test_which_parameters_move(tmp_path, clip_folder, processor):
    frozen = trainer_for(tmp_path, clip_folder, processor, frozen_towers=["vision"], weight_decay=0.1)
    before = weights(frozen)
    frozen.train()
    changed = moved(before, weights(frozen))
    assert changed == {name for name in before if not name.startswith("vision_model.")}
    assert not frozen.bare_model.vision_model.training

    slow = trainer_for(tmp_path, clip_folder, processor, tower_learning_rates={"vision": 1e-6}, weight_decay=0.1)
    slow.train()
    rates = {(group["initial_lr"], group["weight_decay"]) for group in slow.optimizer.param_groups}
    assert rates == {(1e-6, 0.1), (1e-6, 0.0), (1e-3, 0.1), (1e-3, 0.0)}
    steps = {
        tower: max((weights(slow)[k] - before[k]).abs().max() for k in before if k.startswith(tower))
        for tower in ("vision_model", "text_model")
    }
    assert steps["vision_model"] < 1e-5 < 1e-3 < steps["text_model"]


def test_adapters_train_and_the_temperature_is_bounded(tmp_path, clip_folder, processor):
    model = hfvlm.lora(AutoModel.from_pretrained(clip_folder), "vision+scale", quiet=True)
    trainer = trainer_for(
        tmp_path, clip_folder, processor, model=model, mini_batch_size=4, max_logit_scale=5.0, learning_rate=1e-2
    )
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert changed
    assert all("lora_" in name or "logit_scale.modules_to_save" in name for name in changed)
    assert trainer.bare_model.logit_scale.exp().item() == pytest.approx(5.0)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            "set per_device_train_batch_size to the whole batch, and mini_batch_size",
        ),
        ({"loss": "triplet"}, "'triplet' is none of softmax, sigmoid, focal"),
        ({"frozen_towers": ["audio"]}, "has no tower audio; it has vision, text"),
        ({"per_device_train_batch_size": 64}, "48 rows make no batch of 64"),
        ({"patch_dropout": 1.0}, "patch_dropout must be below 1, not 1"),
        ({"loss": "sigmoid"}, "needs a logit_bias, which this model has not"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, clip_folder, processor, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, clip_folder, processor, **options).train()


def test_bfloat16_and_gradient_checkpointing(tmp_path, clip_folder, processor):
    trainer = trainer_for(
        tmp_path, clip_folder, processor, bf16=True, gradient_checkpointing=True, max_steps=16,
        per_device_train_batch_size=12, mini_batch_size=6,
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_any_two_modalities(tmp_path, imagebind_folder, mini_batch_size, caplog):
    random = np.random.RandomState(0)
    rows = [
        {"audio": (random.randn(16_000).astype(np.float32), 16_000), "depth": random.rand(32, 32)} for _ in range(9)
    ]
    rows[4]["depth"] = np.full((32, 32), np.nan)
    model = AutoModel.from_pretrained(imagebind_folder, modalities=["audio", "depth"])
    model = hfvlm.lora(model, "audio", quiet=True)
    processor = AutoProcessor.from_pretrained(imagebind_folder)
    trainer = trainer_for(
        tmp_path, None, processor, model=model, rows=rows, evaluation=rows, per_device_train_batch_size=8,
        mini_batch_size=mini_batch_size, num_train_epochs=2, max_steps=-1, recall_at=[1, 9],
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert changed
    assert all(name.startswith("audio_model.") and "lora_" in name for name in changed)
    metrics = trainer.evaluate()
    assert metrics["eval_unreadable_rows"] == 1
    assert metrics["eval_audio_to_depth_recall@9"] == metrics["eval_depth_to_audio_recall@9"] == 1
    assert "Row 4 is skipped" in caplog.text


@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_models_that_also_caption_are_trained_by_both_losses(tmp_path, clip_folder, processor, mini_batch_size):
    """By both losses, however the batch is cut."""
    preset = hfvlm.load_preset("coca/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    rows = scene_rows(12)
    processor = coca.processor_for(config, preset.processor, SHIPPED / "bpe_simple_vocab.txt.gz")
    batch = processor(images=[row["image"] for row in rows], text=[row["text"] for row in rows], padding=True)
    expected = model(**batch, return_loss=True).loss.item()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(
        tmp_path, clip_folder, processor, model=model, rows=rows, max_steps=1, mini_batch_size=mini_batch_size
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert moved(before, weights(trainer)) >= {name for name in before if "lm_head" in name or "cross" in name}


# Several processes


def train_in_a_process(rank, size, folder, clip_folder, options):
    del rank
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(clip_folder))
    trainer = trainer_for(
        folder, clip_folder, AutoProcessor.from_pretrained(clip_folder), ddp_backend="gloo" if size > 1 else None,
        model=model, per_device_train_batch_size=24 // size, evaluation=scene_rows(21, captions=2), **options,
    )  # fmt: skip
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if "recall" in name or name == "eval_loss"}
    return weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log], metrics


@pytest.mark.parametrize(("size", "mini_batch_size"), [(2, None), (4, 3)])
def test_several_processes_are_as_one(tmp_path, clip_folder, size, mini_batch_size):
    options = {"mini_batch_size": mini_batch_size, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    expected, losses, metrics = train_in_a_process(0, 1, tmp_path, clip_folder, options)
    for found, found_losses, found_metrics in run_processes(
        train_in_a_process, size, size, tmp_path, clip_folder, options
    ):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_metrics == pytest.approx(metrics, rel=1e-5)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def sharded_gradients(rank, size):
    """FSDP2 without accelerate, which offers it on GPUs alone."""
    torch.manual_seed(0)
    model, batch = siglip().double().train(), inputs(8)
    batch["pixel_values"] = batch["pixel_values"].double()
    group = None
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for module in model.modules():
            if isinstance(module, PreNormLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        group = dist.group.WORLD

    @contextmanager
    def unsynchronised():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    own = {name: value.chunk(size)[rank] for name, value in batch.items()}
    contrast = functools.partial(model.contrast, group=group)
    cached_backward(model, contrast, own, 3, unsynchronised=unsynchronised if size > 1 else nullcontext)
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients(model).items()}


def test_sharded_parameters_have_the_same_gradients():
    expected = sharded_gradients(0, 1)
    for found in run_processes(sharded_gradients, 2, 2):
        assert set(found) == set(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_learning_rates_of_towers_from_a_command_line(tmp_path):
    parser = HfArgumentParser(ContrastiveTrainingArguments)
    base = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (arguments,) = parser.parse_args_into_dataclasses([*base, "--tower_learning_rates", '{"vision": 1e-6}'])
    assert arguments.tower_learning_rates == {"vision": 1e-6}
    for wrong, words in (("vision=1e-6", "is no JSON object"), ("[1e-6]", "must be a JSON object")):
        with pytest.raises(ValueError, match=words):
            parser.parse_args_into_dataclasses([*base, "--tower_learning_rates", wrong])
