"""Students and their teachers, by the formulas."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.samples import scenes
from hfvlm.training.data import ContrastiveCollator
from hfvlm.training.distilling import DistillationTrainer, Teacher, TeacherCollator, load_teacher, pair_of


@pytest.fixture(scope="module")
def clip(clip_folder):
    return AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)


def trained(clip, tmp_path, mini_batch_size, share):
    """One step of a student, which is a noisy copy of its teacher -> the student and its gradients' step."""
    model, processor = clip
    student = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows = [{"image": scene.render(), "text": scene.caption()} for scene in scenes.all_scenes()[:8]]
    collator = TeacherCollator(ContrastiveCollator(processor), ContrastiveCollator(processor))
    arguments = hfvlm.ContrastiveTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, mini_batch_size=mini_batch_size, use_cpu=True,
        learning_rate=1e-3, report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=0,
    )  # fmt: skip
    teacher = Teacher(copy.deepcopy(model), share=share)
    options = {"train_dataset": rows, "data_collator": collator, "teacher": teacher}
    before = copy.deepcopy(student)
    trainer = DistillationTrainer(student, arguments, **options)
    trainer.train()
    return before, student, rows, collator


def test_a_step_is_that_of_the_formula(clip, tmp_path):
    """With and without mini-batches: a share of the cross-entropy against the teacher's similarities, and the rest of
    the student's own loss."""
    before, whole, rows, collator = trained(clip, tmp_path / "a", None, 0.25)
    _, parts, _, _ = trained(clip, tmp_path / "b", 3, 0.25)
    model, _ = clip
    rows = [collator.read(row, None) | {"index": i, "replaced": 0} for i, row in enumerate(rows)]
    inputs = {k: v for k, v in collator(rows).items() if k in ("pixel_values", "input_ids", "attention_mask")}
    before.train()
    output = before(**inputs)
    with torch.no_grad():
        a, b, scale = pair_of(model(**inputs))
        targets = (a @ b.t() * scale), (b @ a.t() * scale)
    x, y, own = pair_of(output)
    ours = (x @ y.t() * own), (y @ x.t() * own)
    soft = sum(F.cross_entropy(o, t.softmax(1)) for o, t in zip(ours, targets, strict=True)) / 2
    plain = sum(F.cross_entropy(o, torch.arange(8)) for o in ours) / 2
    (0.25 * soft + 0.75 * plain).backward()
    for name, parameter in before.named_parameters():
        expected = parameter - 1e-3 * parameter.grad
        torch.testing.assert_close(dict(whole.named_parameters())[name], expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(dict(parts.named_parameters())[name], expected, rtol=1e-5, atol=1e-7)


def test_a_teacher_is_left_as_it_is(clip, tmp_path):
    teacher = Teacher(copy.deepcopy(clip[0]))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    with pytest.raises(ValueError, match="share must be"):
        Teacher(clip[0], share=1.5)


def test_a_classifier_with_other_labels_is_no_teacher(clip_folder, tmp_path):
    model = hfvlm.HfvlmCLIPForImageClassification.from_pretrained(clip_folder, num_labels=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its labels are LABEL_0, LABEL_1; the student's are red, blue"):
        load_teacher(str(tmp_path), ["red", "blue"], share=1.0, temperature=1.0)
