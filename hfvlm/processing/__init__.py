"""The models' inputs, equal to those that the originals prepare: the bases of every `processing_<x>.py`."""

from hfvlm.processing.base import DualEncoderProcessor, HfvlmProcessor, MultiEncoderProcessor
from hfvlm.processing.features import (
    AudioFeatureExtractor,
    DepthFeatureExtractor,
    HfvlmFeatureExtractor,
    IMUFeatureExtractor,
    ThermalFeatureExtractor,
    VideoFeatureExtractor,
)
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.images import CroppedImageProcessor, FixedSizeImageProcessor, HfvlmImageProcessor
from hfvlm.processing.media_text import MediaTextProcessor
from hfvlm.processing.tokenization import HfvlmTokenizer, PieceTokenizer, WordPieceTokenizer, ZeroPaddedTokenizer
from hfvlm.processing.video_text import VideoTextProcessor

__all__ = [
    "AudioFeatureExtractor",
    "CroppedImageProcessor",
    "DepthFeatureExtractor",
    "DualEncoderProcessor",
    "FixedSizeImageProcessor",
    "HfvlmFeatureExtractor",
    "HfvlmImageProcessor",
    "HfvlmProcessor",
    "HfvlmTokenizer",
    "IMUFeatureExtractor",
    "ImageTextProcessor",
    "MediaTextProcessor",
    "MultiEncoderProcessor",
    "PieceTokenizer",
    "ThermalFeatureExtractor",
    "VideoFeatureExtractor",
    "VideoTextProcessor",
    "WordPieceTokenizer",
    "ZeroPaddedTokenizer",
]
