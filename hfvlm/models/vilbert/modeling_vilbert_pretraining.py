"""ViLBERT's pretraining (https://arxiv.org/abs/1908.02265, section 3.1): masked words, masked regions, and whether a
text belongs to an image.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a, vilbert/vilbert.py and train_concap.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.base import loss_without_labels
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.vilbert.configuration_vilbert import HfvlmViLBERTConfig
from hfvlm.models.vilbert.modeling_vilbert import HfvlmViLBERTModel, ViLBERTOutput
from hfvlm.modules.language_head import BertLanguageHead


@dataclass
class ViLBERTPreTrainingOutput(ViLBERTOutput):
    """A step of pretraining.

    Args:
        loss: `mlm_loss` + `config.region_weight` x `region_loss` + `alignment_loss`, of those that there are.
        mlm_loss: mean over masked words.
        region_loss: mean over masked regions.
        alignment_loss: mean over pairs; not with `config.objective` 2.
        prediction_logits: `(B, N, V)` of words.
        region_logits: `(B, R, target_size)`.
        alignment_logits: `(B, 2)`, the first column for pairs that belong together.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    region_loss: Tensor | None = None
    alignment_loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    region_logits: Tensor | None = None
    alignment_logits: Tensor | None = None


class RegionHead(nn.Module):
    """One more layer, and a projection -> `(B, R, target_size)`. Its activation is the text stream's."""

    def __init__(self, config: HfvlmViLBERTConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.fc = nn.Linear(width, width)
        self.act = ACT2FN[config.text_config.hidden_act]
        self.norm = nn.LayerNorm(width, eps=config.vision_config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.target_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.fc(x))))


class WithPredictions(HfvlmViLBERTModel):
    """Base of the classes that have pretraining's heads."""

    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.token.weight"}

    def build_heads(self, config: HfvlmViLBERTConfig) -> None:
        self.lm_head = BertLanguageHead(config.text_config)
        self.region_head = RegionHead(config)
        self.alignment_head = nn.Linear(config.connection_size, 2)
        self.head_dropout = nn.Dropout(config.head_dropout)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def prediction(self, encoded: ViLBERTOutput, region_mask: Tensor | None = None) -> Tensor:
        """Score the words that each token may be, `(B, N, V)`."""
        return self.lm_head(encoded.last_hidden_state)

    def region(self, encoded: ViLBERTOutput, region_mask: Tensor | None = None) -> Tensor:
        """Predict the target of each region, `(B, R, target_size)`."""
        return self.region_head(encoded.vision_last_hidden_state)

    def alignment(self, encoded: ViLBERTOutput, region_mask: Tensor | None = None) -> Tensor:
        """Score whether texts and images belong together, `(B, 2)`."""
        return self.alignment_head(self.head_dropout(encoded.pooler_output))


class HfvlmViLBERTForPreTraining(WithPredictions):
    """Learns from images' regions with texts."""

    @loss_without_labels
    @can_return_tuple
    def forward(  # noqa: PLR0913  (what is masked, of either modality)
        self,
        input_ids: Tensor,
        region_features: Tensor,
        region_locations: Tensor,
        attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        mlm_labels: Tensor | None = None,
        region_labels: Tensor | None = None,
        region_targets: Tensor | None = None,
        alignment_labels: Tensor | None = None,
        negatives: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Unpack[Keywords],
    ) -> ViLBERTPreTrainingOutput:
        """Score words, regions and pairs, and compute the losses for which there are labels.

        Args:
            input_ids: and the next six, see `HfvlmViLBERTModel`.
            mlm_labels: `(B, N)`, the masked words in their positions, negative numbers elsewhere.
            region_labels: `(B, R - 1)`, 1 for masked regions; the mean, which comes first, has none.
            region_targets: `(B, R - 1, target_size)`: probabilities of classes for "kl", else unmasked features.
            alignment_labels: `(B,)`, 0 for pairs that belong together, 1 for others.
            negatives: `(B, R - 1, n)`, of "nce": rows of `region_targets`, counted through the batch, in place of
                those that are drawn.
            return_loss: whether `loss` is the weighted sum of those for which there are labels.

        Raises:
            ValueError: only one of `region_labels` and `region_targets` is given, or "nce" has one image to draw from.
        """
        inputs = (input_ids, region_features, region_locations, attention_mask, region_mask, token_type_ids, task_ids)
        encoded = super().forward(*inputs, **kwargs)
        output = ViLBERTPreTrainingOutput(**encoded)
        words = self.prediction(encoded)
        if self.text_model.embeddings.task is not None:
            words = torch.cat([words[:, :1], words[:, 2:]], dim=1)  # no word is predicted of a task
        output.prediction_logits = words
        output.region_logits, output.alignment_logits = self.region(encoded), self.alignment(encoded)
        if (region_labels is None) != (region_targets is None):
            raise ValueError("region_labels, which regions are masked, and region_targets go together.")
        unaligned = None if alignment_labels is None else alignment_labels.flatten() != 0
        if self.config.objective == 1 and unaligned is not None:
            mlm_labels = None if mlm_labels is None else mlm_labels.masked_fill(unaligned[:, None], -1)
            region_labels = None if region_labels is None else region_labels.masked_fill(unaligned[:, None], -1)
        if mlm_labels is not None:
            output.mlm_loss = masked_cross_entropy(output.prediction_logits, mlm_labels)
        if region_labels is not None and region_targets is not None:
            predicted = output.region_logits[:, 1:].float()
            if predicted.shape != region_targets.shape:
                raise ValueError(
                    f"region_targets are {tuple(region_targets.shape)}, but {tuple(predicted.shape)} are predicted: "
                    "the regions without their mean, target_size numbers each."
                )
            output.region_loss = self.region_loss(predicted, region_targets.float(), region_labels == 1, negatives)
        if alignment_labels is not None and self.config.objective != 2:
            output.alignment_loss = masked_cross_entropy(output.alignment_logits, alignment_labels.flatten())
        weights = {"mlm_loss": 1.0, "region_loss": self.config.region_weight, "alignment_loss": 1.0}
        losses = [weight * output[name] for name, weight in weights.items() if output.get(name) is not None]
        output.loss = sum(losses[1:], start=losses[0]) if losses and return_loss else None
        return output

    def region_loss(self, predicted: Tensor, target: Tensor, masked: Tensor, negatives: Tensor | None) -> Tensor:
        """(B, R, T), (B, R, T), (B, R), (B, R, n) or None -> the mean over masked regions, 0 where there are none."""
        if self.config.region_objective == "nce":
            if negatives is None:
                negatives = draw_negatives(masked.shape, self.config.num_negatives, masked.device)
            return nce_loss(predicted, target, masked, negatives)
        return REGION_LOSSES[self.config.region_objective](predicted, target, masked)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean over labels that are not negative, 0 where all are: (..., C), (...) -> scalar."""
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    total = F.cross_entropy(logits, labels.masked_fill(labels < 0, -100), reduction="sum")
    return total / (labels >= 0).sum().clamp_min(1)


def kl_loss(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Compute the divergence of classes' probabilities from the target's, for each masked region."""
    loss = F.kl_div(predicted.log_softmax(dim=-1), target, reduction="none").sum(dim=-1)
    return (loss * masked).sum() / masked.sum().clamp_min(1)


def mse_loss(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Compute the mean squared error over the numbers of masked regions."""
    loss = (predicted - target).square().mean(dim=-1)
    return (loss * masked).sum() / masked.sum().clamp_min(1)


REGION_LOSSES: dict[str, Any] = {"kl": kl_loss, "mse": mse_loss}


def nce_loss(predicted: Tensor, target: Tensor, masked: Tensor, negatives: Tensor) -> Tensor:
    """Compute how well products tell a masked region's features from the negatives'; these are neither normalised nor
    divided by a temperature.

    Args:
        predicted: `(B, R, T)`.
        target: `(B, R, T)`.
        masked: `(B, R)`.
        negatives: `(B, R, n)`, rows of `target` counted through the batch.
    """
    queries, own = predicted[masked], target[masked]
    others = target.flatten(0, 1)[negatives[masked]]
    logits = torch.cat([(queries * own).sum(-1, keepdim=True), torch.einsum("md,mnd->mn", queries, others)], dim=1)
    return masked_cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def draw_negatives(shape: Sequence[int], number: int, device: Any = None) -> Tensor:
    """Draw regions other than each region itself -> `(B, R, n)`, counted through the batch: 70 % of `number` of
    other rows, then 30 % of the same, both rounded down. Padding is drawn, too.

    Raises:
        ValueError: there are no others.
    """
    rows, regions = shape
    if rows < 2 or regions < 2:
        raise ValueError(f"'nce' draws other regions of this image and of others; there are {rows} of {regions}.")
    across, inside = int(number * 0.7), int(number * 0.3)
    row = torch.randint(rows - 1, (rows, regions, across), device=device)
    column = torch.randint(regions, (rows, regions, across), device=device)
    own = torch.arange(rows, device=device)[:, None, None]
    row = torch.where(row == own, rows - 1, row)
    same = torch.randint(regions - 1, (rows, regions, inside), device=device)
    same = torch.where(same == torch.arange(regions, device=device)[:, None], regions - 1, same)
    return torch.cat([row * regions + column, own * regions + same], dim=-1)
