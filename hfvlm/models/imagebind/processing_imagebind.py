"""What ImageBind is fed (https://github.com/facebookresearch/ImageBind at 53680b0, imagebind/data.py)."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hfvlm.media import read_audio, read_depth, read_imu, read_thermal, read_video
from hfvlm.media.audio import audio_batch
from hfvlm.media.depth import check_order, check_range, one_by_one
from hfvlm.media.errors import MediaError
from hfvlm.media.imu import imu_batch, windows
from hfvlm.media.recordings import Recording, resample
from hfvlm.media.resizing import MAX_RESIZED_PIXELS, cover
from hfvlm.media.spectrograms import kaldi_fbank
from hfvlm.media.video import Video, video_batch
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPTokenizer
from hfvlm.processing.base import MultiEncoderProcessor
from hfvlm.processing.features import HfvlmFeatureExtractor
from hfvlm.processing.settings import one_of

BILINEAR = Image.Resampling.BILINEAR


def clip_starts(seconds: float, clip_seconds: float, count: int) -> list[Fraction]:
    """Where `count` clips begin that are spread evenly over `seconds`; exact, since the originals cut fractions."""
    last = max(Fraction(seconds) - Fraction(clip_seconds), Fraction(0))
    return [last / max(count - 1, 1) * i for i in range(count)]


class HfvlmImageBindImageProcessor(HfvlmCLIPImageProcessor):
    """Pictures, as `hfvlm.media.read_image` reads them: to RGB, short edge to 224 px, bicubic, centre crop."""

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        # Unlike CLIP's, the original converts first.
        return super().resize(image.convert("RGB"), settings)


class HfvlmImageBindTokenizer(HfvlmCLIPTokenizer):
    """CLIP's tokenizer. The original pads with id 0; nothing after the first end token is ever read."""


class HfvlmImageBindVideoFeatureExtractor(HfvlmFeatureExtractor):
    """Films, as `hfvlm.media.read_video` reads them -> `pixel_values_videos`, `(B, clips, 3, frames, H, W)`.

    Clips of 2 s are spread evenly over a film, two frames are taken from each, its first and its last, and three
    squares are cut from those: left, middle and right, or top, middle and bottom. The model averages over all of them.
    Frames that come without a rate are taken to be one clip.

    Example:
        >>> extractor("birds.mp4", return_tensors="pt")["pixel_values_videos"].shape
        (1, 15, 3, 2, 224, 224)
        >>> extractor([[first, last]], num_crops=1)  # two pictures

    Args:
        size: edge of the squares in pixels.
        num_frames: of a clip.
        num_clips: of a film.
        clip_seconds: how long a clip is.
        num_crops: squares of a clip: 3, or 1 for the middle.
        image_mean: of each colour.
        image_std: of each colour.
        fps: in a call: of frames that bring no rate, a second.
    """

    model_input_names = ["pixel_values_videos"]
    SETTINGS = ("size", "num_frames", "num_clips", "clip_seconds", "num_crops", "image_mean", "image_std")
    SOURCE_OPTIONS = ("fps",)
    CHECKS = {"num_crops": one_of(1, 3)}
    KIND = "video"
    split = staticmethod(video_batch)

    size: int = 224
    num_frames: int = 2
    num_clips: int = 5
    clip_seconds: float = 2.0
    num_crops: int = 3
    image_mean: list[float] = HfvlmCLIPImageProcessor.image_mean
    image_std: list[float] = HfvlmCLIPImageProcessor.image_std

    def read(self, source: Any, **options: Any) -> Video:
        return read_video(source, **options)

    def features(self, medium: Video, settings: Mapping[str, Any]) -> np.ndarray:
        """(clips * crops, 3, frames, H, W), clip by clip."""
        places = self.places(medium, settings)
        distinct = sorted({place for clip in places for place in clip})
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        # One frame at a time: what is wanted of a large one is small.
        squares = [
            self.squares((fitted(frame, settings["size"]) - mean) / std, settings)
            for frame in medium.tensors(distinct)
        ]
        index = {place: i for i, place in enumerate(distinct)}
        clips = [torch.stack([squares[index[place]] for place in clip], dim=2) for clip in places]
        return torch.cat(clips).numpy()

    def places(self, film: Video, settings: Mapping[str, Any]) -> list[list[int]]:
        """The frames of each clip."""
        seconds = settings["clip_seconds"]
        fps = film.fps or film.num_frames / seconds
        places = []
        for start in clip_starts(film.num_frames / fps, seconds, settings["num_clips"]):
            first = min(ceil(fps * start), film.num_frames - 1)
            end = min(ceil(fps * (start + Fraction(seconds))), film.num_frames)
            steps = torch.linspace(0, max(end - first, 1) - 1, settings["num_frames"]).long()
            places.append([first + int(step) for step in steps])
        return places

    def squares(self, frame: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """(3, H, W) -> (crops, 3, size, size)."""
        size, (height, width) = settings["size"], frame.shape[1:]
        y, x = (ceil((edge - size) / 2) for edge in (height, width))
        corners = [(0, x), (y, x), (height - size, x)] if height > width else [(y, 0), (y, x), (y, width - size)]
        chosen = corners if settings["num_crops"] == 3 else corners[1:2]
        return torch.stack([frame[:, top : top + size, left : left + size] for top, left in chosen])


def fitted(frame: Tensor, size: int) -> Tensor:
    """(3, H, W), uint8 -> values in 0..1, with a short edge of `size`, from the four nearest pixels each."""
    height, width = frame.shape[1:]
    shape = (int(height / width * size), size) if width < height else (size, int(width / height * size))
    if shape[0] * shape[1] > MAX_RESIZED_PIXELS:
        raise MediaError(f"A frame of {width} x {height} pixels is too thin to be fitted to squares: crop the film.")
    return F.interpolate(frame[None] / 255.0, size=shape, mode="bilinear", align_corners=False)[0]


class HfvlmImageBindFeatureExtractor(HfvlmFeatureExtractor):
    """Sounds, as `hfvlm.media.read_audio` reads them -> `input_features`, `(B, clips, 1, bins, frames)`.

    Clips of 2 s are spread evenly over a sound and become mel spectrograms of Kaldi's kind, with 10 ms a column; where
    a sound is shorter, silence of a kind follows: 0 before normalisation, as in training. The first channel is
    read. The model averages over the clips.

    Example:
        >>> extractor("rain.wav", return_tensors="pt")["input_features"].shape
        (1, 3, 1, 128, 204)
        >>> extractor([(wave, 44_100)])  # (N,) or (channels, N), floating point in -1..1 or integers
        >>> extractor(wave, sampling_rate=44_100)

    Args:
        sampling_rate: that everything is resampled to, in hertz. In a call: of arrays that bring none.
        num_mel_bins: rows of a spectrogram.
        num_frames: its columns.
        num_clips: of a sound.
        clip_seconds: how long a clip is.
        mean: of the spectrograms.
        std: of the spectrograms.
    """

    model_input_names = ["input_features"]
    SETTINGS = ("sampling_rate", "num_mel_bins", "num_frames", "num_clips", "clip_seconds", "mean", "std")
    SOURCE_OPTIONS = ("sampling_rate",)
    KIND = "audio"
    split = staticmethod(audio_batch)

    sampling_rate: int = 16_000
    num_mel_bins: int = 128
    num_frames: int = 204
    num_clips: int = 3
    clip_seconds: float = 2.0
    mean: float = -4.268
    std: float = 9.138

    def read(self, source: Any, **options: Any) -> Recording:
        return read_audio(source, **options)

    def features(self, medium: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """(clips, 1, bins, frames)."""
        rate, seconds = settings["sampling_rate"], Fraction(settings["clip_seconds"])
        # A copy: each clip's mean is subtracted in place, and clips overlap.
        samples = resample(torch.from_numpy(medium.samples), medium.sampling_rate, rate).clone()
        clips = []
        for start in clip_starts(samples.shape[1] / rate, settings["clip_seconds"], settings["num_clips"]):
            clip = samples[:, int(start * rate) : int((start + seconds) * rate)]
            clip -= clip.mean()
            bank = kaldi_fbank(clip[0], rate, settings["num_mel_bins"]).t()[:, : settings["num_frames"]]
            clips.append(F.pad(bank, (0, settings["num_frames"] - bank.shape[1])))
        return ((torch.stack(clips)[:, None] - settings["mean"]) / settings["std"]).numpy()


class HfvlmImageBindDepthFeatureExtractor(HfvlmFeatureExtractor):
    """Depth maps, as `hfvlm.media.read_depth` reads them -> `depth_values`, `(B, 1, H, W)`.

    The authors released no loader. This is what they and those who reached the paper's accuracy on SUN RGB-D say
    (facebookresearch/omnivore#12, ImageBind#134): metres become the disparity, in pixels, that a stereo camera with
    the sensor's baseline and focal length would see, then short edge to 224 px, centre crop, normalise. Where nothing
    was measured the disparity is 0, infinitely far.

    Example:
        >>> extractor(np.full((480, 640), 1.5))  # metres
        >>> extractor("0000103.png", encoding="sun_rgbd", focal_length=529.5, baseline=0.075)  # Kinect 1
        >>> extractor([metres_a, metres_b], return_tensors="pt")["depth_values"].shape
        (2, 1, 224, 224)

    Args:
        size: edge of the square in pixels.
        baseline: in metres: 0.075 for both Kinects, 0.095 for RealSense and Xtion.
        focal_length: in pixels of the map as it comes; by default NYU's Kinect.
        nearest: depths are cut to it, in metres.
        farthest: likewise.
        mean: of disparities.
        std: of disparities.
        encoding: in a call: what integers in files and arrays mean.
    """

    model_input_names = ["depth_values"]
    SETTINGS = ("size", "baseline", "focal_length", "nearest", "farthest", "mean", "std")
    SOURCE_OPTIONS = ("encoding",)
    KIND = "depth map"
    split = staticmethod(one_by_one)

    size: int = 224
    baseline: float = 0.075
    focal_length: float = 518.857901
    nearest: float = 0.01
    farthest: float = 50.0
    mean: float = 0.0418
    std: float = 0.0295

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        check_order(settings["nearest"], settings["farthest"], type(self).__name__)
        return settings

    def read(self, source: Any, **options: Any) -> np.ndarray:
        return read_depth(source, **options)

    def check(self, medium: np.ndarray, settings: Mapping[str, Any], name: str) -> None:
        check_range(medium, settings["farthest"], name)

    def features(self, medium: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """(1, size, size)."""
        metres = medium.clip(settings["nearest"], settings["farthest"])
        disparity = np.where(medium > 0, settings["baseline"] * settings["focal_length"] / metres, 0)
        return (square(disparity, settings["size"]) - np.float32(settings["mean"])) / np.float32(settings["std"])


class HfvlmImageBindThermalFeatureExtractor(HfvlmFeatureExtractor):
    """Thermal pictures, as `hfvlm.media.read_thermal` reads them -> `thermal_values`, `(B, 1, H, W)`, in 0..1.

    The authors released no loader. This is what a proposal to them does (ImageBind#73): one channel, hot in white,
    short edge to 224 px, centre crop; a user found accuracy better without normalisation.

    Example:
        >>> extractor("FLIR_00001.jpeg")  # 8 bits
        >>> extractor("FLIR_00001.tiff")  # 16 bits, from the lowest count to the highest
        >>> extractor(celsius, limits=(10, 40), return_tensors="pt")["thermal_values"].shape
        (1, 1, 224, 224)

    Args:
        size: edge of the square in pixels.
        mean: subtracted; by default 0.
        std: divided by; by default 1.
        limits: in a call: the values that become 0 and 1.
    """

    model_input_names = ["thermal_values"]
    SETTINGS = ("size", "mean", "std")
    SOURCE_OPTIONS = ("limits",)
    KIND = "thermal image"
    split = staticmethod(one_by_one)

    size: int = 224
    mean: float = 0.0
    std: float = 1.0

    def read(self, source: Any, **options: Any) -> np.ndarray:
        return read_thermal(source, **options)

    def features(self, medium: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """(1, size, size)."""
        return (square(medium, settings["size"]) - np.float32(settings["mean"])) / np.float32(settings["std"])


def square(values: np.ndarray, size: int) -> np.ndarray:
    """(H, W) -> (1, size, size), float32: short edge to `size`, bilinear with antialiasing, then the centre."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(cover(image, (size, size), BILINEAR))[None]


class HfvlmImageBindIMUFeatureExtractor(HfvlmFeatureExtractor):
    """Motion, as `hfvlm.media.read_imu` reads it -> `imu_values`, `(B, 6, N)`, or `(B, clips, 6, N)`.

    Accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s, resampled to 400 Hz; 5 s from the middle of a
    longer trace, while a shorter one goes on with its last sample. The authors released no loader; channels, rate and
    length are the model's and the paper's (section B.1, Ego4D), and nothing is normalised.

    Example:
        >>> extractor((trace, 200), return_tensors="pt")["imu_values"].shape  # (6, N) or (N, 6) at 200 Hz
        (1, 6, 2000)
        >>> extractor({"accelerometer": a, "gyroscope": w, "sampling_rate": 200})
        >>> extractor("walk.csv", columns=["ax", "ay", "az", "gx", "gy", "gz"], units=("g", "deg/s"), sampling_rate=50)
        >>> extractor((trace, 200), num_clips=3)  # from start to end; the model averages over the clips

    Args:
        sampling_rate: that everything is resampled to, in hertz. In a call: of arrays that bring none.
        num_samples: of a clip.
        num_clips: of a trace.
        columns: in a call: of CSV files and data frames; see `hfvlm.media.read_imu`.
        units: in a call: of the accelerometer and the gyroscope, as ("g", "deg/s").
    """

    model_input_names = ["imu_values"]
    SETTINGS = ("sampling_rate", "num_samples", "num_clips")
    SOURCE_OPTIONS = ("sampling_rate", "columns", "units")
    KIND = "IMU trace"
    split = staticmethod(imu_batch)

    sampling_rate: int = 400
    num_samples: int = 2000
    num_clips: int = 1

    def read(self, source: Any, **options: Any) -> Recording:
        return read_imu(source, **options)

    def features(self, medium: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """(6, N), or (clips, 6, N)."""
        count = settings["num_clips"]
        clips = windows(medium, settings["sampling_rate"], settings["num_samples"], count).numpy()
        return clips[0] if count == 1 else clips


class HfvlmImageBindProcessor(MultiEncoderProcessor):
    """All that ImageBind reads: `processor(images=..., text=..., audio=...)`, then `model(**inputs)`."""

    parts = {
        "image": "image_processor",
        "video": "video_feature_extractor",
        "text": "tokenizer",
        "audio": "feature_extractor",
        "depth": "depth_feature_extractor",
        "thermal": "thermal_feature_extractor",
        "imu": "imu_feature_extractor",
    }

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        video_feature_extractor: Any = None,
        depth_feature_extractor: Any = None,
        thermal_feature_extractor: Any = None,
        imu_feature_extractor: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            feature_extractor,
            video_feature_extractor,
            depth_feature_extractor,
            thermal_feature_extractor,
            imu_feature_extractor,
            **kwargs,
        )
