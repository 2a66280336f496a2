"""Bases of the architectures' models."""

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.vision import ImageClassifier

__all__ = ["DualEncoder", "HfvlmPreTrainedModel", "ImageClassifier"]
