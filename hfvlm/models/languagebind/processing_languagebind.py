"""LanguageBind's inputs (https://github.com/PKU-YuanGroup/LanguageBind at 7070c53, languagebind/*/processing_*)."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hfvlm.configuration import config_of
from hfvlm.media import MediaError, Recording, Video
from hfvlm.media.images import to_8_bits
from hfvlm.media.recordings import resample
from hfvlm.media.resizing import MAX_RESIZED_PIXELS
from hfvlm.media.spectrograms import kaldi_fbank
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPTokenizer
from hfvlm.models.languagebind.configuration_languagebind import HfvlmLanguageBindConfig
from hfvlm.processing.base import MultiEncoderProcessor
from hfvlm.processing.features import (
    AudioFeatureExtractor,
    DepthFeatureExtractor,
    ThermalFeatureExtractor,
    VideoFeatureExtractor,
    normalised,
)
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD
from hfvlm.processing.settings import Bins, Deviations, Edge, Flag, Frames, Hertz, Means, Number, Positive, number


def square(values: Tensor, size: int, mode: str, *, antialias: bool = False) -> Tensor:
    """Resize `(C, H, W)` -> `(C, size, size)`: short edge to `size`, then the centre. Without `antialias`, a value is
    interpolated between the nearest pixels only; bicubic values may leave the range of their pixels."""
    height, width = values.shape[-2:]
    edge = int(size * max(height, width) / min(height, width))
    fitted = (edge, size) if height > width else (size, edge)
    if size * edge > MAX_RESIZED_PIXELS:
        raise MediaError(f"{width} x {height} pixels are too thin to be fitted to squares: crop them.")
    resized = F.interpolate(values[None], size=fitted, mode=mode, align_corners=False, antialias=antialias)[0]
    top, left = (round((length - size) / 2) for length in fitted)
    return resized[:, top : top + size, left : left + size]


class HfvlmLanguageBindImageProcessor(HfvlmCLIPImageProcessor):
    """Images, as `hfvlm.media.read_image` reads them: to RGB, short edge to 224 px, bicubic, centre crop.

    The original resizes tensors, which torchvision 0.14, its pin, does from the nearest pixels only. Later versions
    use all pixels that a new one covers; `antialias=True` does the same.

    Args:
        size: edge of the square in pixels.
        antialias: use every pixel that the new one covers.
    """

    antialias = False

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        antialias = self.checked_value("antialias", settings["antialias"])
        checked = super().checked(settings | {"antialias": True}) | {"antialias": antialias}
        height, width = checked["size"]["height"], checked["size"]["width"]
        if (checked["resize_mode"], checked["resample"]) != ("shortest", 3) or height != width:
            raise ValueError(f"{type(self).__name__} has bicubic squares only (resize_mode 'shortest', resample 3).")
        return checked

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """Prepare one image -> `(3, H, W)`, float32."""
        values = torch.from_numpy(np.array(to_8_bits(image, name).convert("RGB"))).permute(2, 0, 1).float()
        if settings["do_resize"]:
            values = square(values, settings["size"]["height"], "bicubic", antialias=settings["antialias"])
        return self.scaled(values.numpy(), settings)


class HfvlmLanguageBindTokenizer(HfvlmCLIPTokenizer):
    """CLIP's tokenizer with transformers' cleaning: broken text is repaired, but HTML entities may stay."""

    DEFAULTS = {**HfvlmCLIPTokenizer.DEFAULTS, "clean": "repaired"}


class HfvlmLanguageBindVideoFeatureExtractor(VideoFeatureExtractor):
    """Videos, as `hfvlm.media.read_video` reads them -> `pixel_values_videos`, `(B, 3, frames, H, W)`.

    Eight frames, spread evenly from the first to the last; short edge to 224 px, bilinear, centre crop. The original
    mirrors half of all videos by chance, in evaluation too; this does not.

    Example:
        >>> extractor("birds.mp4", return_tensors="pt")["pixel_values_videos"].shape
        (1, 3, 8, 224, 224)
        >>> extractor([[first, second, third]])  # images; of fewer than eight, some are taken twice

    Args:
        size: edge of the squares in pixels.
        num_frames: of a video.
        image_mean: of each colour.
        image_std: of each colour.
        fps: in a call: taken, and not needed.
    """

    size: Edge = 224
    num_frames: Frames = 8
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD

    def features(self, media: Video, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one video -> `(3, frames, size, size)`."""
        places = np.linspace(0, len(media) - 1, settings["num_frames"], dtype=int).tolist()

        def prepare(frame: Tensor) -> Tensor:
            return normalised(square(frame / 255.0, settings["size"], "bilinear"), settings)

        return np.stack(self.frames(media, places, prepare), axis=1)


class HfvlmLanguageBindFeatureExtractor(AudioFeatureExtractor):
    """Audio, as `hfvlm.media.read_audio` reads it -> `input_features`, `(B, 3, bins, frames)`.

    Mel spectrograms of Kaldi's kind, of the first channel, with 10 ms a column. The three channels are three pieces of
    a clip of more than 10 s: its beginning, and those that begin at a third and at two thirds of the possible starts;
    the original draws each within its third by chance. A shorter clip is repeated until it is long enough, and all
    three are equal.

    Example:
        >>> extractor("rain.wav", return_tensors="pt")["input_features"].shape
        (1, 3, 112, 1036)
        >>> extractor([(wave, 44_100)])  # (N,) or (channels, N), floating point in -1..1 or integers
        >>> extractor(wave, sampling_rate=44_100)

    Args:
        sampling_rate: that everything is resampled to, in hertz. In a call: of arrays that bring none.
        num_mel_bins: rows of a spectrogram.
        num_frames: its columns.
        mean: of the spectrograms.
        std: of the spectrograms; normalised values deviate by a half.
    """

    sampling_rate: Hertz = 16_000
    num_mel_bins: Bins = 112
    num_frames: Frames = 1036
    mean: Number = -4.2677393
    std: Positive = 4.5689974

    def features(self, media: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one recording -> `(3, bins, frames)`."""
        bank, length = self.spectrogram(media, settings), settings["num_frames"]
        if bank.shape[1] < length:
            bank = bank.repeat(1, length // bank.shape[1] + 1)[:, :length]
        pieces = [bank[:, start : start + length] for start in self.starts(bank.shape[1], length)]
        return ((torch.stack(pieces) - settings["mean"]) / (2 * settings["std"])).numpy()

    def spectrogram(self, recording: Recording, settings: Mapping[str, Any]) -> Tensor:
        """Compute the spectrogram `(bins, N)`, before it is cut or repeated."""
        rate = settings["sampling_rate"]
        samples = resample(torch.from_numpy(recording.samples), recording.sampling_rate, rate)
        return kaldi_fbank((samples - samples.mean())[0], rate, settings["num_mel_bins"]).t()

    def starts(self, frames: int, length: int) -> list[int]:
        """Return where three pieces of `length` begin in a spectrogram of `frames` columns."""
        thirds = np.array_split(np.arange(frames - length + 1), 3)
        return [int(third[0]) if len(third) else 0 for third in thirds]


class HfvlmLanguageBindDepthFeatureExtractor(DepthFeatureExtractor):
    """Depth maps, as `hfvlm.media.read_depth` reads them -> `depth_values`, `(B, 3, H, W)`.

    Metres, cut to 0.01..10 and divided by 10, in three equal channels; short edge to 224 px, bicubic, centre crop;
    normalised as images are. Pixels without a measurement become the nearest depth. The original reads 16-bit
    millimetres.

    Example:
        >>> extractor(np.full((480, 640), 1.5))  # metres
        >>> extractor("frame-0001.depth.png", return_tensors="pt")["depth_values"].shape
        (1, 3, 224, 224)

    Args:
        size: edge of the square in pixels.
        nearest: depths are cut to it, in metres.
        farthest: likewise, and becomes 1; 0 for the farthest depth of the map itself.
        image_mean: of each channel.
        image_std: of each channel.
        antialias: use every value that a new one covers; see `HfvlmLanguageBindImageProcessor`.
        encoding: in a call: the unit of integers in files and arrays.
    """

    size: Edge = 224
    nearest = 0.01
    farthest: Annotated[float, number(least=0)] = 10.0
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    antialias: Flag = False

    def features(self, media: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one depth map -> `(3, size, size)`."""
        metres = torch.from_numpy(media).clamp(min=settings["nearest"])
        farthest = settings["farthest"] or metres.max()
        shares = metres.clamp(max=farthest) / farthest
        values = square(shares[None], settings["size"], "bicubic", antialias=settings["antialias"])
        return normalised(values, settings).numpy()


class HfvlmLanguageBindThermalFeatureExtractor(ThermalFeatureExtractor):
    """Thermal images, as `hfvlm.media.read_thermal` reads them -> `thermal_values`, `(B, 3, H, W)`.

    Hot in white, in three equal channels; short edge to 224 px, bicubic, centre crop; normalised as images are. The
    original takes images of any colours: `processor.image_processor` makes the same of those.

    Example:
        >>> extractor("FLIR_00001.jpeg")  # 8 bits
        >>> extractor(celsius, limits=(10, 40), return_tensors="pt")["thermal_values"].shape
        (1, 3, 224, 224)

    Args:
        size: edge of the square in pixels.
        image_mean: of each channel.
        image_std: of each channel.
        antialias: use every value that a new one covers; see `HfvlmLanguageBindImageProcessor`.
        limits: in a call: the values that become 0 and 1.
    """

    size: Edge = 224
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    antialias: Flag = False

    def features(self, media: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one thermal image -> `(3, size, size)`."""
        values = square(torch.from_numpy(media)[None], settings["size"], "bicubic", antialias=settings["antialias"])
        return normalised(values, settings).numpy()


class HfvlmLanguageBindProcessor(MultiEncoderProcessor):
    """LanguageBind's inputs: `processor(images=..., text=..., audio=...)`, then `model(**inputs)`.

    It prepares every modality, whichever of them a model has.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        video_feature_extractor: Any = None,
        depth_feature_extractor: Any = None,
        thermal_feature_extractor: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            feature_extractor,
            video_feature_extractor,
            depth_feature_extractor,
            thermal_feature_extractor,
            **kwargs,
        )

    @classmethod
    def from_clip(cls, processor: Any, config: HfvlmLanguageBindConfig) -> "HfvlmLanguageBindProcessor":
        """Make the processor of a model that `HfvlmLanguageBindModel.from_clip` began.

        Args:
            processor: of the CLIP.
            config: of the model, whose towers say the sizes of their inputs.
        """
        words, edge = processor.tokenizer, processor.image_processor.size
        tokenizer = HfvlmLanguageBindTokenizer(
            tokenizer_object=words.backend_tokenizer, model_max_length=words.model_max_length
        )
        sizes: dict[str, dict[str, Any]] = {}
        for modality in ("image", "video", "depth", "thermal"):
            tower: Any = getattr(config, config_of(config.towers[modality]))
            sizes[modality] = {"size": edge["height"] if tower is None else tower.image_size}
        if config.video_config is not None:
            sizes["video"]["num_frames"] = config.video_config.num_frames
        audio: Any = config.audio_config
        bins, frames = (112, 1036) if audio is None else audio.image_size
        return cls(
            HfvlmLanguageBindImageProcessor(**sizes["image"]),
            tokenizer,
            HfvlmLanguageBindFeatureExtractor(num_mel_bins=bins, num_frames=frames),
            HfvlmLanguageBindVideoFeatureExtractor(**sizes["video"]),
            HfvlmLanguageBindDepthFeatureExtractor(**sizes["depth"]),
            HfvlmLanguageBindThermalFeatureExtractor(**sizes["thermal"]),
        )
