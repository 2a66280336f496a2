"""The models' inputs, equal to what the originals prepare: the bases of every `processing_<x>.py`."""

from hfvlm.processing.base import DualEncoderProcessor, HfvlmProcessor, MultiEncoderProcessor
from hfvlm.processing.features import HfvlmFeatureExtractor
from hfvlm.processing.images import FixedSizeImageProcessor, HfvlmImageProcessor
from hfvlm.processing.media_text import ImageTextProcessor, MediaTextProcessor, VideoTextProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer, ZeroPaddedTokenizer

__all__ = [
    "DualEncoderProcessor",
    "FixedSizeImageProcessor",
    "HfvlmFeatureExtractor",
    "HfvlmImageProcessor",
    "HfvlmProcessor",
    "HfvlmTokenizer",
    "ImageTextProcessor",
    "MediaTextProcessor",
    "MultiEncoderProcessor",
    "PieceTokenizer",
    "VideoTextProcessor",
    "ZeroPaddedTokenizer",
]
