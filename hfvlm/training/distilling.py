"""Students that learn from a teacher: image classifiers, and dual encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.utils import ModelOutput

from hfvlm.checks.ranges import check_number
from hfvlm.inference.adapters import load_model
from hfvlm.losses import affinity_loss
from hfvlm.modeling.outputs import contrastive_fields
from hfvlm.processing.assembly import IGNORE
from hfvlm.training.classification import ClassificationTrainer
from hfvlm.training.row_trainer import without_bookkeeping
from hfvlm.training.trainer import ContrastiveTrainer

MARK = "teacher_"


class TeacherCollator:
    """Collator of rows to the student's inputs and, their names behind "teacher_", to the teacher's, whose images may
    have another size. Both see the same augmented images.

    Args:
        student: reads the rows, and makes the student's inputs.
        teacher: makes the teacher's.
    """

    def __init__(self, student: Any, teacher: Any):
        self.student, self.teacher = student, teacher

    def __getattr__(self, name: str) -> Any:
        if name in ("student", "teacher"):  # while it is copied to a worker
            raise AttributeError(name)
        return getattr(self.student, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = without_bookkeeping(self.teacher(rows))
        inputs = {f"{MARK}{name}": value for name, value in inputs.items() if name not in ("labels", "return_loss")}
        return self.student(rows) | inputs


def divided(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a batch's inputs into the student's and the teacher's."""
    own = {name: value for name, value in inputs.items() if not name.startswith(MARK)}
    return own, {name.removeprefix(MARK): value for name, value in inputs.items() if name.startswith(MARK)}


class Teacher:
    """A model that is asked and not trained, and its part in the loss.

    Args:
        model: the teacher.
        share: its part in the loss, 0 to 1; the rest is the student's own loss.
        temperature: what the logits of both are divided by; classifiers alone.
    """

    def __init__(self, model: nn.Module, *, share: float = 1.0, temperature: float = 1.0):
        check_number("share", share, 0, 1)
        check_number("temperature", temperature, 0, open_low=True)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.share, self.temperature = share, temperature

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], device: Any) -> Any:
        return self.model.to(device)(**{name: value.to(device) for name, value in inputs.items()})


class DistilledClassificationTrainer(ClassificationTrainer):
    """Trainer of an image classifier on a teacher's probabilities (SimCLRv2, https://arxiv.org/abs/2006.10029,
    equations 2 and 3), and on labels, where there are any, by the rest of the loss.

    Args:
        teacher: with a classifier of the same labels.
        **options: of `ClassificationTrainer`; batches are a `TeacherCollator`'s.
    """

    def __init__(self, *args: Any, teacher: Teacher, **options: Any):
        super().__init__(*args, **options)
        self.teacher = teacher
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        own, theirs = divided(inputs)
        if not theirs:  # an evaluation
            found: Any = super().compute_loss(model, own, return_outputs)
            return found
        labels = own.pop("labels", None)
        output = model(**own)
        targets = self.teacher(theirs, output.logits.device).logits
        temperature, share = self.teacher.temperature, self.teacher.share
        soft = (targets.float() / temperature).softmax(dim=1)
        loss = share * nn.functional.cross_entropy(output.logits.float() / temperature, soft)
        if share < 1 and labels is not None and bool((labels != IGNORE).any()):
            loss = loss + (1 - share) * nn.functional.cross_entropy(output.logits.float(), labels)
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, divided(inputs)[0], *args, **kwargs)


class DistillationTrainer(ContrastiveTrainer):
    """Trainer of a dual encoder on its teacher's similarities of a batch, beside its own loss: see
    `hfvlm.losses.affinity_loss`. Evaluations are those of the student alone.

    Args:
        teacher: a dual encoder of any size, whose embeddings are one vector for a row.
        **options: of `ContrastiveTrainer`; batches are a `TeacherCollator`'s.
    """

    def __init__(self, *args: Any, teacher: Teacher, **options: Any):
        super().__init__(*args, **options)
        self.teacher = teacher
        self.taught: Any = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        own, theirs = divided(inputs)
        size = self.args.mini_batch_size or self.args.train_batch_size
        self.taught = joined(self.teacher, theirs, size, self.args.device)
        try:
            return super().training_step(model, own, num_items_in_batch)
        finally:
            self.taught = None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, divided(inputs)[0], *args, **kwargs)

    def contrast(self, output: ModelOutput) -> Tensor:
        """Mix the student's own loss with that of the teacher's similarities."""
        if self.taught is None:
            return super().contrast(output)
        a, b, scale = pair_of(output)
        theirs_a, theirs_b, theirs = self.taught
        with torch.autocast(self.args.device.type, enabled=False):
            loss = affinity_loss(a, b, theirs_a, theirs_b, scale, theirs, group=self.group)
        if self.teacher.share < 1:
            return self.teacher.share * loss + (1 - self.teacher.share) * super().contrast(output)
        self.watch.see(output, self.state.global_step + 1, self.args)
        return loss


def joined(teacher: Teacher, inputs: Mapping[str, Any], size: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a batch in parts -> both sides' embeddings `(B, D)`, and the temperature's inverse."""
    rows = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, rows, size):
        part = {name: value[start : start + size] for name, value in inputs.items()}
        parts.append(pair_of(teacher(part, device)))
    a, b, scales = zip(*parts, strict=True)
    return torch.cat(a), torch.cat(b), scales[0]


def pair_of(output: ModelOutput) -> tuple[Tensor, Tensor, Tensor]:
    """Return a dual encoder's embeddings of images and texts, and its temperature's inverse.

    Raises:
        ValueError: its output has other ones, as a matrix for each row.
    """
    rows, factors = contrastive_fields(output)
    embeds = [value for name, value in rows.items() if name in ("image_embeds", "text_embeds")]
    if len(embeds) != 2 or any(value.dim() != 2 for value in embeds) or "logit_scale" not in factors:
        raise ValueError(
            "Distillation compares one vector of an image with one of a text, as CLIP has them; "
            f"{type(output).__name__} has {', '.join(rows)}."
        )
    return embeds[0], embeds[1], factors["logit_scale"].float().reshape(())


def load_teacher(folder: str, labels: Sequence[str] | None, *, share: float, temperature: float) -> Teacher:
    """Load a teacher.

    Args:
        folder: of the model; an adapter's is merged.
        labels: names of the student's labels, of a classifier; None for a dual encoder.
        share: see `Teacher`.
        temperature: see `Teacher`.

    Raises:
        ValueError: it classifies by other labels.
    """
    model = load_model(folder, None if labels is None else AutoModelForImageClassification)
    if labels is not None and list(labels) != labels_of_model(model.config):
        known = ", ".join(labels_of_model(model.config))
        raise ValueError(f"teacher {folder}: its labels are {known}; the student's are {', '.join(labels)}.")
    return Teacher(model, share=share, temperature=temperature)


def labels_of_model(config: Any) -> list[str]:
    """Return the names of a classifier's labels, by number."""
    return [config.id2label[i] for i in sorted(config.id2label)]
