"""Objectives on embeddings, independent of any model."""

from hfvlm.losses.contrastive import contrastive_loss, sigmoid_loss

__all__ = ["contrastive_loss", "sigmoid_loss"]
