"""12-in-1 (https://arxiv.org/abs/1912.02315): one ViLBERT for many tasks, which a token in its text tells apart.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert/vilbert.py, VILBertForVLTasks.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.keywords import Keywords
from hfvlm.models.vilbert.configuration_vilbert import HfvlmViLBERTConfig
from hfvlm.models.vilbert.modeling_vilbert import ViLBERTOutput
from hfvlm.models.vilbert.modeling_vilbert_pretraining import WithPredictions
from hfvlm.models.vilbert.tasks import KINDS, task_of

# What the logit of a padded region is lowered by.
PADDING = -10_000.0


@dataclass
class ViLBERTTasksOutput(ViLBERTOutput):
    """What the heads predict: all of them, or with `task` that task's alone.

    Args:
        loss: of the task, with `labels`.
        logits: of the task, arranged as its labels.
        answer_logits: `(B, num_answers)`, VQA's and Visual Genome's.
        gqa_logits: `(B, num_gqa_answers)`.
        score_logits: `(B, 1)`, how well a text belongs to an image.
        pair_logits: `(B / 2, 2)`, of NLVR2, whose two images are rows that follow one another: false, true; None where
            the batch is odd.
        entailment_logits: `(B, 3)`.
        grounding_logits: `(B, R)`, lowered by 10,000 for padding.
        token_logits: `(B, N)`, one for each token, that of the task included.
        prediction_logits: `(B, N, V)` of words.
        region_logits: `(B, R, target_size)` of regions' classes.
        alignment_logits: `(B, 2)`, the first column for pairs that belong together.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    answer_logits: Tensor | None = None
    gqa_logits: Tensor | None = None
    score_logits: Tensor | None = None
    pair_logits: Tensor | None = None
    entailment_logits: Tensor | None = None
    grounding_logits: Tensor | None = None
    token_logits: Tensor | None = None
    prediction_logits: Tensor | None = None
    region_logits: Tensor | None = None
    alignment_logits: Tensor | None = None


class AnswerHead(nn.Module):
    """(B, in) -> (B, out), over a layer of a width of its own."""

    def __init__(self, size: int, width: int, answers: int):
        super().__init__()
        self.fc1 = nn.Linear(size, width)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.fc2 = nn.Linear(width, answers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class HfvlmViLBERTForVisionLanguageTasks(WithPredictions):
    """Answers, retrieves, compares and finds regions: a head for each kind of task; `tasks.TASKS` lists the tasks."""

    def build_heads(self, config: HfvlmViLBERTConfig) -> None:
        super().build_heads(config)
        width = config.connection_size
        self.answer_head = AnswerHead(width, 2 * width, config.num_answers)
        self.gqa_head = AnswerHead(width, 2 * width, config.num_gqa_answers)
        self.pair_head = AnswerHead(2 * width, 2 * width, 2)
        self.score_head = nn.Linear(width, 1)
        self.entailment_head = nn.Linear(width, 3)
        self.grounding_head = nn.Linear(config.vision_config.hidden_size, 1)
        self.token_head = nn.Linear(config.text_config.hidden_size, 1)

    @can_return_tuple
    def forward(  # noqa: PLR0913  (of two modalities, and a task)
        self,
        input_ids: Tensor,
        region_features: Tensor,
        region_locations: Tensor,
        attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        task: str | int | None = None,
        labels: Tensor | None = None,
        candidates: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ViLBERTTasksOutput:
        """Predict, and with `labels` compute the loss of a task.

        Args:
            input_ids: and the next six, see `HfvlmViLBERTModel`.
            task: name or number of a task, which has its head computed alone; `task_ids` default to its number.
            labels: of the task: `(B, answers)` soft ones from 0 to 1; of a choice among options, which are
                rows that follow one another, `(rows / options,)`, the right one's; of grounding `(B, R)`, of pointing
                `(B, C)`, overlaps with the right region; of NLVR2 `(B / 2, 2)` and of entailment `(B, 3)`.
            candidates: `(B, C)`, of pointing, counted from the 102nd region: those that an answer may be.

        Raises:
            ValueError: `labels` without a `task`, a task of pairs with an odd batch, or an unknown task.
        """
        chosen = None if task is None else task_of(task)
        if chosen is None and (labels is not None or candidates is not None):
            raise ValueError("labels and candidates need task, the task that they are of.")
        if chosen is not None and task_ids is None and self.text_model.embeddings.task is not None:
            task_ids = torch.full((input_ids.shape[0],), chosen.id, device=input_ids.device)
        inputs = (input_ids, region_features, region_locations, attention_mask, region_mask, token_type_ids, task_ids)
        encoded = super().forward(*inputs, **kwargs)
        output = ViLBERTTasksOutput(**encoded)
        head = None if chosen is None else KINDS[chosen.kind].head
        for name in HEADS if head is None else (head,):
            output[name] = getattr(self, name.removesuffix("_logits"))(encoded, region_mask)
        if chosen is None or head is None:
            return output
        logits = output[head]
        if logits is None:
            raise ValueError("A task of pairs of images needs a row for each: the batch is odd.")
        if labels is not None:
            output.loss = chosen.loss(logits, labels, candidates)
            logits = chosen.options(logits, labels, candidates)
        output.logits = logits
        return output

    def answer(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor:
        return self.answer_head(self.head_dropout(encoded.pooler_output))

    def gqa(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor:
        return self.gqa_head(self.head_dropout(encoded.pooler_output))

    def score(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor:
        return self.score_head(self.head_dropout(encoded.pooler_output))

    def pair(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor | None:
        pooled = self.head_dropout(encoded.pooler_output)
        return None if pooled.shape[0] % 2 else self.pair_head(pooled.reshape(pooled.shape[0] // 2, -1))

    def entailment(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor:
        return self.entailment_head(self.head_dropout(encoded.pooler_output))

    def grounding(self, encoded: ViLBERTOutput, region_mask: Tensor | None) -> Tensor:
        logits = self.grounding_head(self.head_dropout(encoded.vision_last_hidden_state)).squeeze(-1)
        return logits if region_mask is None else logits + (1 - region_mask.to(logits.dtype)) * PADDING

    def token(self, encoded: ViLBERTOutput, _: Tensor | None) -> Tensor:
        return self.token_head(self.head_dropout(encoded.last_hidden_state)).squeeze(-1)


# Fields of the output, each made by the method of that name.
HEADS = (
    *("answer_logits", "gqa_logits", "score_logits", "pair_logits", "entailment_logits", "grounding_logits"),
    *("token_logits", "prediction_logits", "region_logits", "alignment_logits"),
)
