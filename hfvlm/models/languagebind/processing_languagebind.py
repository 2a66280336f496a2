"""What LanguageBind is fed (https://github.com/PKU-YuanGroup/LanguageBind at 7070c53, languagebind/*/processing_*)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hfvlm.media import read_audio, read_depth, read_thermal, read_video
from hfvlm.media.audio import audio_batch
from hfvlm.media.depth import check_order, check_range, one_by_one
from hfvlm.media.errors import MediaError
from hfvlm.media.images import to_8_bits
from hfvlm.media.recordings import Recording, resample
from hfvlm.media.resizing import MAX_RESIZED_PIXELS
from hfvlm.media.spectrograms import kaldi_fbank
from hfvlm.media.video import Video, video_batch
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPTokenizer
from hfvlm.processing.base import MultiEncoderProcessor
from hfvlm.processing.features import HfvlmFeatureExtractor
from hfvlm.processing.settings import number

MEAN, STD = HfvlmCLIPImageProcessor.image_mean, HfvlmCLIPImageProcessor.image_std


def square(values: Tensor, size: int, mode: str, *, antialias: bool = False) -> Tensor:
    """(C, H, W) -> (C, size, size): short edge to `size`, then the centre. Without `antialias`, a value comes from the
    nearest pixels alone, however many the picture has; bicubic values may leave the range of their pixels."""
    height, width = values.shape[-2:]
    edge = int(size * max(height, width) / min(height, width))
    fitted = (edge, size) if height > width else (size, edge)
    if size * edge > MAX_RESIZED_PIXELS:
        raise MediaError(f"{width} x {height} pixels are too thin to be fitted to squares: crop them.")
    resized = F.interpolate(values[None], size=fitted, mode=mode, align_corners=False, antialias=antialias)[0]
    top, left = (round((length - size) / 2) for length in fitted)
    return resized[:, top : top + size, left : left + size]


def normalised(values: Tensor, settings: Mapping[str, Any]) -> np.ndarray:
    """(3, ...), with a mean of 0 and a deviation of 1 for each channel of what CLIP was trained on."""
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return ((values - mean) / std).numpy()


class HfvlmLanguageBindImageProcessor(HfvlmCLIPImageProcessor):
    """Pictures, as `hfvlm.media.read_image` reads them: to RGB, short edge to 224 px, bicubic, centre crop.

    The original resizes tensors, which torchvision 0.14, its pin, does from the nearest pixels alone. Its later
    versions use all that a pixel covers; `antialias=True` does the same.

    Args:
        size: edge of the square in pixels.
        antialias: use every pixel that the new one covers.
    """

    antialias: bool = False

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        antialias = self.checked_value("antialias", settings["antialias"])
        checked = super().checked(settings | {"antialias": True}) | {"antialias": antialias}
        height, width = checked["size"]["height"], checked["size"]["width"]
        if (checked["resize_mode"], checked["resample"]) != ("shortest", 3) or height != width:
            raise ValueError(f"{type(self).__name__} has bicubic squares only (resize_mode 'shortest', resample 3).")
        return checked

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """One picture -> (3, H, W), float32."""
        values = torch.from_numpy(np.array(to_8_bits(image, name).convert("RGB"))).permute(2, 0, 1).float()
        if settings["do_resize"]:
            values = square(values, settings["size"]["height"], "bicubic", antialias=settings["antialias"])
        return self.scaled(values.numpy(), settings)


class HfvlmLanguageBindTokenizer(HfvlmCLIPTokenizer):
    """CLIP's tokenizer with transformers' cleaning: broken text is repaired, but HTML entities may stay."""

    def __init__(self, clean: str = "repaired", **kwargs: Any):
        super().__init__(clean=clean, **kwargs)


class HfvlmLanguageBindVideoFeatureExtractor(HfvlmFeatureExtractor):
    """Films, as `hfvlm.media.read_video` reads them -> `pixel_values_videos`, `(B, 3, frames, H, W)`.

    Eight frames, spread evenly from the first to the last; short edge to 224 px, bilinear, centre crop. The original
    mirrors half of all films by chance, in evaluation too; this does not.

    Example:
        >>> extractor("birds.mp4", return_tensors="pt")["pixel_values_videos"].shape
        (1, 3, 8, 224, 224)
        >>> extractor([[first, second, third]])  # pictures; of fewer than eight, some are taken twice

    Args:
        size: edge of the squares in pixels.
        num_frames: of a film.
        image_mean: of each colour.
        image_std: of each colour.
        fps: in a call: taken, and not needed.
    """

    model_input_names = ["pixel_values_videos"]
    SETTINGS = ("size", "num_frames", "image_mean", "image_std")
    SOURCE_OPTIONS = ("fps",)
    KIND = "video"
    split = staticmethod(video_batch)

    size: int = 224
    num_frames: int = 8
    image_mean: list[float] = MEAN
    image_std: list[float] = STD

    def read(self, source: Any, **options: Any) -> Video:
        return read_video(source, **options)

    def features(self, medium: Video, settings: Mapping[str, Any]) -> np.ndarray:
        """(3, frames, size, size)."""
        places = np.linspace(0, len(medium) - 1, settings["num_frames"], dtype=int).tolist()
        distinct = sorted(set(places))
        # One frame at a time: what is wanted of a large one is small.
        squares = (square(frame / 255.0, settings["size"], "bilinear") for frame in medium.tensors(distinct))
        found = dict(zip(distinct, (normalised(frame, settings) for frame in squares), strict=True))
        return np.stack([found[place] for place in places], axis=1)


class HfvlmLanguageBindFeatureExtractor(HfvlmFeatureExtractor):
    """Sounds, as `hfvlm.media.read_audio` reads them -> `input_features`, `(B, 3, bins, frames)`.

    Mel spectrograms of Kaldi's kind, of the first channel, with 10 ms a column. The three channels are three pieces of
    a sound of more than 10 s: its beginning, and those that begin at a third and at two thirds of where one can begin;
    the original draws each within its third by chance. A shorter sound is repeated until it is long enough, and all
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
        std: of the spectrograms; what is left of them deviates by a half.
    """

    model_input_names = ["input_features"]
    SETTINGS = ("sampling_rate", "num_mel_bins", "num_frames", "mean", "std")
    SOURCE_OPTIONS = ("sampling_rate",)
    KIND = "audio"
    split = staticmethod(audio_batch)

    sampling_rate: int = 16_000
    num_mel_bins: int = 112
    num_frames: int = 1036
    mean: float = -4.2677393
    std: float = 4.5689974

    def read(self, source: Any, **options: Any) -> Recording:
        return read_audio(source, **options)

    def features(self, medium: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """(3, bins, frames)."""
        bank, length = self.spectrogram(medium, settings), settings["num_frames"]
        if bank.shape[1] < length:
            bank = bank.repeat(1, length // bank.shape[1] + 1)[:, :length]
        pieces = [bank[:, start : start + length] for start in self.starts(bank.shape[1], length)]
        return ((torch.stack(pieces) - settings["mean"]) / (2 * settings["std"])).numpy()

    def spectrogram(self, medium: Recording, settings: Mapping[str, Any]) -> Tensor:
        """(bins, N), before it is cut or repeated."""
        rate = settings["sampling_rate"]
        samples = resample(torch.from_numpy(medium.samples), medium.sampling_rate, rate)
        return kaldi_fbank((samples - samples.mean())[0], rate, settings["num_mel_bins"]).t()

    def starts(self, frames: int, length: int) -> list[int]:
        """Where the three pieces of `length` of a spectrogram of so many columns begin."""
        thirds = np.array_split(np.arange(frames - length + 1), 3)
        return [int(third[0]) if len(third) else 0 for third in thirds]


class HfvlmLanguageBindDepthFeatureExtractor(HfvlmFeatureExtractor):
    """Depth maps, as `hfvlm.media.read_depth` reads them -> `depth_values`, `(B, 3, H, W)`.

    Metres, cut to 0.01..10 and divided by 10, in three equal channels; short edge to 224 px, bicubic, centre crop;
    normalised as pictures are. What was not measured is as near as can be. The original reads 16-bit millimetres.

    Example:
        >>> extractor(np.full((480, 640), 1.5))  # metres
        >>> extractor("frame-0001.depth.png", return_tensors="pt")["depth_values"].shape
        (1, 3, 224, 224)

    Args:
        size: edge of the square in pixels.
        nearest: depths are cut to it, in metres.
        farthest: likewise, and becomes 1; 0 for the farthest that a map has.
        image_mean: of each channel.
        image_std: of each channel.
        antialias: use every value that a new one covers; see `HfvlmLanguageBindImageProcessor`.
        encoding: in a call: what integers in files and arrays mean.
    """

    model_input_names = ["depth_values"]
    SETTINGS = ("size", "nearest", "farthest", "image_mean", "image_std", "antialias")
    CHECKS = {"farthest": number(least=0)}
    SOURCE_OPTIONS = ("encoding",)
    KIND = "depth map"
    split = staticmethod(one_by_one)

    size: int = 224
    nearest: float = 0.01
    farthest: float = 10.0
    image_mean: list[float] = MEAN
    image_std: list[float] = STD
    antialias: bool = False

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        check_order(settings["nearest"], settings["farthest"], type(self).__name__)
        return settings

    def read(self, source: Any, **options: Any) -> np.ndarray:
        return read_depth(source, **options)

    def check(self, medium: np.ndarray, settings: Mapping[str, Any], name: str) -> None:
        check_range(medium, settings["farthest"], name)

    def features(self, medium: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """(3, size, size)."""
        metres = torch.from_numpy(medium).clamp(min=settings["nearest"])
        farthest = settings["farthest"] or metres.max()
        shares = metres.clamp(max=farthest) / farthest
        return normalised(square(shares[None], settings["size"], "bicubic", antialias=settings["antialias"]), settings)


class HfvlmLanguageBindThermalFeatureExtractor(HfvlmFeatureExtractor):
    """Thermal pictures, as `hfvlm.media.read_thermal` reads them -> `thermal_values`, `(B, 3, H, W)`.

    Hot in white, in three equal channels; short edge to 224 px, bicubic, centre crop; normalised as pictures are. To
    the original they are pictures, of any colours: `processor.image_processor` makes the same of those.

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

    model_input_names = ["thermal_values"]
    SETTINGS = ("size", "image_mean", "image_std", "antialias")
    SOURCE_OPTIONS = ("limits",)
    KIND = "thermal image"
    split = staticmethod(one_by_one)

    size: int = 224
    image_mean: list[float] = MEAN
    image_std: list[float] = STD
    antialias: bool = False

    def read(self, source: Any, **options: Any) -> np.ndarray:
        return read_thermal(source, **options)

    def features(self, medium: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """(3, size, size)."""
        values = torch.from_numpy(medium)[None]
        return normalised(square(values, settings["size"], "bicubic", antialias=settings["antialias"]), settings)


class HfvlmLanguageBindProcessor(MultiEncoderProcessor):
    """All that LanguageBind reads: `processor(images=..., text=..., audio=...)`, then `model(**inputs)`.

    It prepares every modality, whichever of them a model has.
    """

    parts = {
        "image": "image_processor",
        "video": "video_feature_extractor",
        "text": "tokenizer",
        "audio": "feature_extractor",
        "depth": "depth_feature_extractor",
        "thermal": "thermal_feature_extractor",
    }

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
