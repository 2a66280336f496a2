"""Bases of the architectures' models."""

from hfvlm.modeling.base import DualEncoder, HfvlmPreTrainedModel, ImageClassifier

__all__ = ["DualEncoder", "HfvlmPreTrainedModel", "ImageClassifier"]
