"""ImageBind's inputs (https://github.com/facebookresearch/ImageBind at 53680b0, imagebind/data.py)."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hfvlm.media import MediaError, Recording, Video
from hfvlm.media.imu import windows
from hfvlm.media.recordings import resample
from hfvlm.media.resizing import MAX_RESIZED_PIXELS, cover
from hfvlm.media.spectrograms import kaldi_fbank
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPTokenizer
from hfvlm.processing.base import MultiEncoderProcessor
from hfvlm.processing.features import (
    AudioFeatureExtractor,
    DepthFeatureExtractor,
    IMUFeatureExtractor,
    ThermalFeatureExtractor,
    VideoFeatureExtractor,
    normalised,
)
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD
from hfvlm.processing.settings import (
    Bins,
    Clips,
    Deviations,
    Edge,
    Frames,
    Hertz,
    Means,
    Number,
    Positive,
    Seconds,
    one_of,
    whole,
)

BILINEAR = Image.Resampling.BILINEAR


def clip_starts(seconds: float, clip_seconds: float, count: int) -> list[Fraction]:
    """Return where `count` clips begin, spread evenly over `seconds`; exact, since the originals cut fractions."""
    last = max(Fraction(seconds) - Fraction(clip_seconds), Fraction(0))
    return [last / max(count - 1, 1) * i for i in range(count)]


class HfvlmImageBindImageProcessor(HfvlmCLIPImageProcessor):
    """Images, as `hfvlm.media.read_image` reads them: to RGB, short edge to 224 px, bicubic, centre crop."""

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        # Unlike CLIP's, the original converts first.
        return super().resize(image.convert("RGB"), settings)


class HfvlmImageBindTokenizer(HfvlmCLIPTokenizer):
    """CLIP's tokenizer. The original pads with id 0; the model reads nothing after the first end token."""


class HfvlmImageBindVideoFeatureExtractor(VideoFeatureExtractor):
    """Videos, as `hfvlm.media.read_video` reads them -> `pixel_values_videos`, `(B, clips, 3, frames, H, W)`.

    Clips of 2 s are spread evenly over a video, two frames are taken from each, its first and its last, and three
    squares are cropped from those: left, middle and right, or top, middle and bottom. The model averages over all of
    them. Frames without a rate count as one clip.

    Example:
        >>> extractor("birds.mp4", return_tensors="pt")["pixel_values_videos"].shape
        (1, 15, 3, 2, 224, 224)
        >>> extractor([[first, last]], num_crops=1)  # two images

    Args:
        size: edge of the squares in pixels.
        num_frames: of a clip.
        num_clips: of a video.
        clip_seconds: length of a clip.
        num_crops: squares of a clip: 3, or 1 for the middle.
        image_mean: of each colour.
        image_std: of each colour.
        fps: in a call: frames a second of frames without a rate.
    """

    size: Edge = 224
    num_frames: Frames = 2
    num_clips: Clips = 5
    clip_seconds: Seconds = 2.0
    num_crops: Annotated[int, one_of(1, 3)] = 3
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD

    def features(self, media: Video, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one video -> `(clips * crops, 3, frames, H, W)`, clip by clip."""
        places = self.places(media, settings)

        def prepare(frame: Tensor) -> Tensor:
            return self.squares(normalised(fitted(frame, settings["size"]), settings), settings)

        squares = iter(self.frames(media, [place for clip in places for place in clip], prepare))
        return torch.cat([torch.stack([next(squares) for _ in clip], dim=2) for clip in places]).numpy()

    def places(self, video: Video, settings: Mapping[str, Any]) -> list[list[int]]:
        """Return the indices of the frames of each clip."""
        seconds = settings["clip_seconds"]
        fps = video.fps or video.num_frames / seconds
        places = []
        for start in clip_starts(video.num_frames / fps, seconds, settings["num_clips"]):
            first = min(ceil(fps * start), video.num_frames - 1)
            end = min(ceil(fps * (start + Fraction(seconds))), video.num_frames)
            steps = torch.linspace(0, max(end - first, 1) - 1, settings["num_frames"]).long()
            places.append([first + int(step) for step in steps])
        return places

    def squares(self, frame: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Crop `(3, H, W)` -> `(crops, 3, size, size)`."""
        size, (height, width) = settings["size"], frame.shape[1:]
        y, x = (ceil((edge - size) / 2) for edge in (height, width))
        corners = [(0, x), (y, x), (height - size, x)] if height > width else [(y, 0), (y, x), (y, width - size)]
        chosen = corners if settings["num_crops"] == 3 else corners[1:2]
        return torch.stack([frame[:, top : top + size, left : left + size] for top, left in chosen])


def fitted(frame: Tensor, size: int) -> Tensor:
    """Resize `(3, H, W)`, uint8 -> values in 0..1, with a short edge of `size`, from the four nearest pixels each."""
    height, width = frame.shape[1:]
    shape = (int(height / width * size), size) if width < height else (size, int(width / height * size))
    if shape[0] * shape[1] > MAX_RESIZED_PIXELS:
        raise MediaError(f"A frame of {width} x {height} pixels is too thin to be fitted to squares: crop the video.")
    return F.interpolate(frame[None] / 255.0, size=shape, mode="bilinear", align_corners=False)[0]


class HfvlmImageBindFeatureExtractor(AudioFeatureExtractor):
    """Audio, as `hfvlm.media.read_audio` reads it -> `input_features`, `(B, clips, 1, bins, frames)`.

    Clips of 2 s are spread evenly over a recording and become mel spectrograms of Kaldi's kind, with 10 ms a column;
    a shorter recording is padded with 0 before normalisation, as in training. Only the first channel is used. The
    model averages over the clips.

    Example:
        >>> extractor("rain.wav", return_tensors="pt")["input_features"].shape
        (1, 3, 1, 128, 204)
        >>> extractor([(wave, 44_100)])  # (N,) or (channels, N), floating point in -1..1 or integers
        >>> extractor(wave, sampling_rate=44_100)

    Args:
        sampling_rate: that everything is resampled to, in hertz. In a call: of arrays that bring none.
        num_mel_bins: rows of a spectrogram.
        num_frames: its columns.
        num_clips: of a recording.
        clip_seconds: length of a clip.
        mean: of the spectrograms.
        std: of the spectrograms.
    """

    sampling_rate: Hertz = 16_000
    num_mel_bins: Bins = 128
    num_frames: Frames = 204
    num_clips: Clips = 3
    clip_seconds: Seconds = 2.0
    mean: Number = -4.268
    std: Positive = 9.138

    def features(self, media: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one recording -> `(clips, 1, bins, frames)`."""
        rate, seconds = settings["sampling_rate"], Fraction(settings["clip_seconds"])
        # A copy: each clip's mean is subtracted in place, and clips overlap.
        samples = resample(torch.from_numpy(media.samples), media.sampling_rate, rate).clone()
        clips = []
        for start in clip_starts(samples.shape[1] / rate, settings["clip_seconds"], settings["num_clips"]):
            clip = samples[:, int(start * rate) : int((start + seconds) * rate)]
            clip -= clip.mean()
            bank = kaldi_fbank(clip[0], rate, settings["num_mel_bins"]).t()[:, : settings["num_frames"]]
            clips.append(F.pad(bank, (0, settings["num_frames"] - bank.shape[1])))
        return ((torch.stack(clips)[:, None] - settings["mean"]) / settings["std"]).numpy()


class HfvlmImageBindDepthFeatureExtractor(DepthFeatureExtractor):
    """Depth maps, as `hfvlm.media.read_depth` reads them -> `depth_values`, `(B, 1, H, W)`.

    The authors released no loader. This follows their answers, and those of users who reached the paper's accuracy
    on SUN RGB-D (facebookresearch/omnivore#12, ImageBind#134): metres become the disparity, in pixels, of a stereo
    camera with the sensor's baseline and focal length, then short edge to 224 px, centre crop, normalise. Without a
    measurement the disparity is 0, infinitely far.

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
        encoding: in a call: the unit of integers in files and arrays.
    """

    size: Edge = 224
    baseline: Positive = 0.075
    focal_length: Positive = 518.857901
    nearest = 0.01
    farthest = 50.0
    mean: Number = 0.0418
    std: Positive = 0.0295

    def features(self, media: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one depth map -> `(1, size, size)`."""
        metres = media.clip(settings["nearest"], settings["farthest"])
        disparity = np.where(media > 0, settings["baseline"] * settings["focal_length"] / metres, 0)
        return (square(disparity, settings["size"]) - np.float32(settings["mean"])) / np.float32(settings["std"])


class HfvlmImageBindThermalFeatureExtractor(ThermalFeatureExtractor):
    """Thermal images, as `hfvlm.media.read_thermal` reads them -> `thermal_values`, `(B, 1, H, W)`, in 0..1.

    The authors released no loader. This follows a proposal to them (ImageBind#73): one channel, hot in white,
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

    size: Edge = 224
    mean: Number = 0.0
    std: Positive = 1.0

    def features(self, media: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one thermal image -> `(1, size, size)`."""
        return (square(media, settings["size"]) - np.float32(settings["mean"])) / np.float32(settings["std"])


def square(values: np.ndarray, size: int) -> np.ndarray:
    """Resize `(H, W)` -> `(1, size, size)`, float32: short edge to `size`, antialiased bilinear, then the centre."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(cover(image, (size, size), BILINEAR))[None]


class HfvlmImageBindIMUFeatureExtractor(IMUFeatureExtractor):
    """Motion, as `hfvlm.media.read_imu` reads it -> `imu_values`, `(B, 6, N)`, or `(B, clips, 6, N)`.

    Accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s, resampled to 400 Hz; 5 s from the middle of a
    longer trace; a shorter one is padded with its last sample. The authors released no loader; channels, rate and
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

    sampling_rate: Hertz = 400
    num_samples: Annotated[int, whole(1, 2**24)] = 2000
    num_clips: Clips = 1

    def features(self, media: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one trace -> `(6, N)`, or `(clips, 6, N)`."""
        count = settings["num_clips"]
        clips = windows(media, settings["sampling_rate"], settings["num_samples"], count).numpy()
        return clips[0] if count == 1 else clips


class HfvlmImageBindProcessor(MultiEncoderProcessor):
    """ImageBind's inputs: `processor(images=..., text=..., audio=...)`, then `model(**inputs)`."""

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
