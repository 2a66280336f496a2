"""Bases of the architectures' models."""

from hfvlm.modeling.base import DualEncoder, HfvlmPreTrainedModel
from hfvlm.modeling.vision import ImageClassifier

__all__ = ["DualEncoder", "HfvlmPreTrainedModel", "ImageClassifier"]
