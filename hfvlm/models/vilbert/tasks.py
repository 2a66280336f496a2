"""The tasks of 12-in-1 (https://arxiv.org/abs/1912.02315): their heads, losses, scores and sizes.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert_tasks.yml and vilbert/task_utils.py.
Its task 16, Foil, is left out: its targets and its head do not fit, and it never ran as released.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Regions that a detector gives, with their mean, before those that a question about pointing can choose of.
DETECTED = 101


@dataclass(frozen=True)
class Kind:
    """How tasks of a kind are learned.

    Args:
        head: field of the model's output.
        loss: of logits and labels.
        score: likewise -> `(B,)`, from 0 to 1 each.
    """

    head: str
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the binary cross-entropy, summed over a row's answers and averaged over rows: `(B, A)`, `(B, A)`."""
    return binary_loss(logits, labels) * labels.shape[1]


def choice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of `(B, options)`, `(B,)`."""
    return F.cross_entropy(logits.float(), labels.flatten())


def soft_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the label of each row's highest logit: `(B, A)`, `(B, A)` -> `(B,)`."""
    return labels.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1).float()


def choice_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Give 1 where the highest logit is the labelled option's: `(B, options)`, `(B,)` -> `(B,)`."""
    return (logits.argmax(dim=1) == labels.flatten()).float()


def overlap_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Give 1 where the region of the highest logit overlaps by more than half: `(B, R)`, `(B, R)` -> `(B,)`."""
    return (soft_score(logits, labels) > 0.5).float()


def pointing_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Give 1 where the highest logit is the highest label's: `(B, C)`, `(B, C)` -> `(B,)`."""
    return (logits.argmax(dim=1) == labels.argmax(dim=1)).float()


KINDS = {
    "answer": Kind("answer_logits", summed_loss, soft_score),
    "gqa": Kind("gqa_logits", summed_loss, soft_score),
    "choice": Kind("score_logits", choice_loss, choice_score),
    "grounding": Kind("grounding_logits", summed_loss, overlap_score),
    "pointing": Kind("grounding_logits", summed_loss, pointing_score),
    "pair": Kind("pair_logits", binary_loss, soft_score),
    "entailment": Kind("entailment_logits", binary_loss, soft_score),
}


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        id: of its token.
        kind: one of `KINDS`.
        text_length: tokens that a text is cut and padded to.
        regions: that an image's are cut and padded to, their mean included.
    """

    id: int
    kind: str
    text_length: int
    regions: int = DETECTED

    def options(self, logits: Tensor, labels: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Arrange a head's logits as the labels are.

        Args:
            logits: of the head.
            labels: of the task.
            candidates: `(B, C)`, of a pointing task: regions after the detected ones.
        """
        if self.kind == "choice":
            return logits.reshape(labels.numel(), -1)
        if self.kind == "pointing":
            if candidates is None:
                raise ValueError("A pointing task needs candidates, the regions that an answer may be.")
            return logits[:, DETECTED:].gather(1, candidates)
        return logits

    def loss(self, logits: Tensor, labels: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Compute the loss of a head's logits; see `options`."""
        return KINDS[self.kind].loss(self.options(logits, labels, candidates), labels)

    @torch.no_grad()
    def score(self, logits: Tensor, labels: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Score each row's prediction from 0 to 1, `(B,)`; see `options`."""
        return KINDS[self.kind].score(self.options(logits, labels, candidates), labels)


# Labels: entailment's are contradiction, neutral, entailment; GuessWhat's Yes, No, N/A; a choice's the right one
# first.
TASKS = {
    "vqa": Task(1, "answer", 23),
    "genome_qa": Task(2, "answer", 26),
    "visual_dialog": Task(3, "choice", 50),
    "visual7w": Task(4, "pointing", 20, 200),
    "vcr_answer": Task(5, "choice", 60),
    "vcr_rationale": Task(6, "choice", 80),
    "retrieval_coco": Task(7, "choice", 30),
    "retrieval_flickr30k": Task(8, "choice", 30),
    "refcoco": Task(9, "grounding", 20),
    "refcoco+": Task(10, "grounding", 20),
    "refcocog": Task(11, "grounding", 20),
    "nlvr2": Task(12, "pair", 40),
    "visual_entailment": Task(13, "entailment", 56),
    "guesswhat": Task(14, "entailment", 25),
    "gqa": Task(15, "gqa", 26),
    "guesswhat_pointing": Task(17, "pointing", 256, 306),
    "flickr_grounding": Task(18, "grounding", 24, 200),
}


def task_of(name: str | int) -> Task:
    """Return a task by its name, or by the number of its token.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for known, task in TASKS.items():
        if name in (known, task.id):
            return task
    raise ValueError(f"task {name!r} is none of {', '.join(TASKS)}, nor one of their numbers.")
