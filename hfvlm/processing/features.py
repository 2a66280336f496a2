"""Recordings, videos and sensors' maps to arrays: the bases of the feature extractors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import FeatureExtractionMixin
from transformers.image_processing_base import BatchFeature

from hfvlm.checks.keywords import parameters
from hfvlm.media import MediaError, Video, read_audio, read_depth, read_imu, read_thermal, read_video
from hfvlm.media.audio import audio_batch
from hfvlm.media.depth import check_order, check_range, one_by_one
from hfvlm.media.imu import imu_batch
from hfvlm.media.sources import name_of, parallel
from hfvlm.media.video import video_batch
from hfvlm.processing.batches import is_empty, of_sources
from hfvlm.processing.images import FOREIGN_OPTIONS, check_foreign, on_device
from hfvlm.processing.settings import Positive, Settings, check_value, flag, one_of
from hfvlm.processing.tokenization import PADDINGS


class HfvlmFeatureExtractor(Settings, FeatureExtractionMixin, ABC):
    """Recordings, videos and maps to one of a model's inputs, the one that `model_input_names` names first.

    A subclass makes the array of one source in `features`. `read` is a reader of `hfvlm.media`; its own options, such
    as the sampling rate of arrays, are `SOURCE_OPTIONS` of a call, while the settings describe the result. Each source
    is read and prepared in one task.
    """

    KIND: str
    model_input_names: list[str]
    read: Callable[..., Any]
    split: Callable[[Any], list[Any]]
    SOURCE_OPTIONS: frozenset[str]

    # Every row of a batch has one size already: there is nothing to pad or to cut.
    STANDING = frozenset({*FOREIGN_OPTIONS, "padding", "truncation", "return_attention_mask"})

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "read"):
            cls.SOURCE_OPTIONS = parameters(cls.read) - {"source", "allow_urls", "index"}

    def __init__(self, **kwargs: Any):
        check_foreign(self, kwargs)
        self.check_padding(kwargs)
        super().__init__(**self.take_settings(kwargs))

    def check_padding(self, options: Mapping[str, Any]) -> None:
        """Refuse values that `padding` and `truncation` cannot have.

        Raises:
            ValueError: naming the option.
        """
        if options.get("return_attention_mask"):
            raise ValueError(f"{type(self).__name__}: return_attention_mask must be False: the model takes no mask.")
        for name, check in (("padding", one_of(*PADDINGS)), ("truncation", flag)):
            if not isinstance(options.get(name), bool | None):
                check_value(self, name, options[name], check)

    def call_keywords(self) -> frozenset[str]:
        return super().call_keywords() | self.SOURCE_OPTIONS

    def __call__(
        self,
        sources: Any,
        return_tensors: str | None = None,
        *,
        allow_urls: bool | Collection[str] = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare sources -> the model's input.

        Args:
            sources: one or a list; the class defines what each may be.
            return_tensors: "pt", "np", or None for a list of arrays.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts. An argument of
                the call only: nothing that is downloaded with a model can switch it on.
            **kwargs: the class's options of sources, and settings for this call. `padding` and `truncation` are taken
                and change nothing: every row has the model's size.

        Raises:
            MediaError: a source cannot be read; the message names it.
            TypeError: an unknown setting.
            ValueError: a value that a setting cannot have, or an empty batch.
        """
        options = {name: kwargs.pop(name) for name in self.SOURCE_OPTIONS if kwargs.get(name) is not None}
        settings = self.settings_for(kwargs, {*self.STANDING, *self.SOURCE_OPTIONS})
        check_foreign(self, kwargs)
        self.check_padding(kwargs)
        if is_empty(sources):
            raise ValueError(f"{type(self).__name__} was given an empty batch.")

        def prepared(item: tuple[int, Any]) -> np.ndarray:
            index, source = item
            name = name_of(self.KIND, source, index)
            media = self.read(source, index=index, allow_urls=allow_urls, **options)
            self.check(media, settings, name)
            try:
                return self.features(media, settings)
            except MediaError as error:
                raise MediaError(str(error) if name in str(error) else f"{name}: {error}") from error

        arrays = parallel(prepared, list(enumerate(self.split(self.listed(sources)))))
        if return_tensors is None:
            return BatchFeature({self.model_input_names[0]: arrays})
        return on_device(BatchFeature(self.batch(arrays), tensor_type=return_tensors), kwargs.get("device"))

    def listed(self, sources: Any) -> Any:
        """Return a batch that comes in another container as a list."""
        return of_sources(sources)

    def check(self, media: Any, settings: Mapping[str, Any], name: str) -> None:
        """Refuse, or warn of, media outside of the range that the model knows."""

    @abstractmethod
    def features(self, media: Any, settings: Mapping[str, Any]) -> np.ndarray:
        """Make one row of the batch of one source, read."""

    def batch(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Make the model's inputs of rows."""
        return {self.model_input_names[0]: np.stack(arrays)}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoFeatureExtractor") -> None:
        """Do nothing: hfvlm is installed code, and a module of it copied next to the weights could not import."""


class VideoFeatureExtractor(HfvlmFeatureExtractor):
    """Base of feature extractors of videos, as `hfvlm.media.read_video` reads them."""

    KIND = "video"
    model_input_names = ["pixel_values_videos"]
    read = staticmethod(read_video)
    split = staticmethod(video_batch)

    def listed(self, sources: Any) -> Any:
        """Return the batch as it is: a tuple may be one video, of which it holds the frames."""
        return sources

    @staticmethod
    def frames(video: Video, places: Sequence[int], prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Prepare the frames at `places`, each decoded once, and one at a time: large frames become small ones."""
        distinct = sorted(set(places))
        found = dict(zip(distinct, map(prepare, video.tensors(distinct)), strict=True))
        return [found[place] for place in places]


class AudioFeatureExtractor(HfvlmFeatureExtractor):
    """Base of feature extractors of audio, as `hfvlm.media.read_audio` reads it."""

    KIND = "audio"
    model_input_names = ["input_features"]
    read = staticmethod(read_audio)
    split = staticmethod(audio_batch)


class DepthFeatureExtractor(HfvlmFeatureExtractor):
    """Base of feature extractors of depth maps, as `hfvlm.media.read_depth` reads them."""

    KIND = "depth map"
    model_input_names = ["depth_values"]
    read = staticmethod(read_depth)
    split = staticmethod(one_by_one)

    nearest: Positive
    farthest: Positive

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        check_order(settings["nearest"], settings["farthest"], type(self).__name__)
        return settings

    def check(self, media: np.ndarray, settings: Mapping[str, Any], name: str) -> None:
        check_range(media, settings["farthest"], name)


class ThermalFeatureExtractor(HfvlmFeatureExtractor):
    """Base of feature extractors of thermal images, as `hfvlm.media.read_thermal` reads them."""

    KIND = "thermal image"
    model_input_names = ["thermal_values"]
    read = staticmethod(read_thermal)
    split = staticmethod(one_by_one)


class IMUFeatureExtractor(HfvlmFeatureExtractor):
    """Base of feature extractors of motion, as `hfvlm.media.read_imu` reads it."""

    KIND = "IMU trace"
    model_input_names = ["imu_values"]
    read = staticmethod(read_imu)
    split = staticmethod(imu_batch)


def normalised(values: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Normalise `(..., 3, H, W)` by the settings' mean and deviation of each channel."""
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (values - mean) / std
