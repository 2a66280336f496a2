"""Objectives on embeddings and scores, independent of any model: each on one process or, with `group=`, on several."""

from collections.abc import Callable

from torch import Tensor

from hfvlm.losses.best_query import best_query_loss, best_query_scores
from hfvlm.losses.candidates import candidate_losses
from hfvlm.losses.captioning import average_losses, captioning_loss, token_losses
from hfvlm.losses.contrastive import contrastive_loss
from hfvlm.losses.distillation import affinity_loss, distilled_targets, soft_contrastive_loss
from hfvlm.losses.late_interaction import late_interaction_loss, late_interaction_scores
from hfvlm.losses.nt_xent import nt_xent_loss
from hfvlm.losses.output_layer import output_layer_loss
from hfvlm.losses.pairwise import focal_contrastive_loss, sigmoid_loss
from hfvlm.losses.preferences import preference_loss

# Losses of pairs by the names that configurations and training arguments have for them.
PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "softmax": contrastive_loss,
    "sigmoid": sigmoid_loss,
    "focal": focal_contrastive_loss,
}

__all__ = [
    "PAIR_LOSSES",
    "affinity_loss",
    "average_losses",
    "best_query_loss",
    "best_query_scores",
    "candidate_losses",
    "captioning_loss",
    "contrastive_loss",
    "distilled_targets",
    "focal_contrastive_loss",
    "late_interaction_loss",
    "late_interaction_scores",
    "nt_xent_loss",
    "output_layer_loss",
    "preference_loss",
    "sigmoid_loss",
    "soft_contrastive_loss",
    "token_losses",
]
