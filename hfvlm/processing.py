"""Base classes of the processors: what models are fed is made here, equal to what the originals make."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import FeatureExtractionMixin, ProcessorMixin
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from hfvlm.media.errors import MediaError
from hfvlm.media.images import image_batch, read_image, read_images, to_8_bits
from hfvlm.media.resizing import contain, cover, squash, squash_sampled
from hfvlm.media.sources import as_batch, name_of, parallel

RESIZE_MODES = ("shortest", "longest", "squash")
# Options of transformers' own image processors that its pipelines pass to every one.
FOREIGN_OPTIONS = {
    "device",
    "disable_grouping",
    "input_data_format",
    "data_format",
    "return_metadata",
    "do_convert_rgb",
}


class Settings:
    """Named settings with defaults as class attributes, that a file saves and a call may override."""

    SETTINGS: tuple[str, ...] = ()

    def take_settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Set what a constructor was given, and return the rest."""
        settings = {name: kwargs.pop(name, getattr(type(self), name)) for name in self.SETTINGS}
        for name, value in self.checked(settings).items():
            setattr(self, name, value)
        return kwargs

    def settings_for(self, kwargs: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
        """The settings of one call.

        Raises:
            TypeError: an unknown setting.
        """
        unknown = sorted(set(kwargs) - set(self.SETTINGS) - set(ignored))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}.")
        given = {name: value for name, value in kwargs.items() if name in self.SETTINGS and value is not None}
        return self.checked({name: getattr(self, name) for name in self.SETTINGS} | given)

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings in their saved form, or a ValueError that names the wrong one."""
        return settings


class HfvlmImageProcessor(Settings, BaseImageProcessor):
    """Pictures to normalised pixels, as the originals' PIL pipelines make them: resize in the picture's own mode,
    convert to RGB, scale, normalise.

    Takes whatever `hfvlm.media.read_image` reads, in any mixture. Each image is decoded and resized in one task, on
    several threads, so that a batch of large images is never in memory as a whole.

    Args:
        upright: turn images as their EXIF says, as viewers do; False takes pixels as they are stored, as the originals
            do.
        resample: Pillow's filter; 2 is bilinear, 3 is bicubic.
        image_mean: per channel, of values in 0..1.
        image_std: per channel, of values in 0..1.
        do_resize: False takes pictures that have the model's size already.
        do_rescale: divide by 255.
        do_normalize: subtract the mean, divide by the deviation.
    """

    model_input_names = ["pixel_values"]
    SETTINGS: tuple[str, ...] = (
        "upright",
        "resample",
        "image_mean",
        "image_std",
        "do_resize",
        "do_rescale",
        "do_normalize",
    )

    upright: bool = True
    resample: int = 3
    image_mean: list[float] = [0.5, 0.5, 0.5]
    image_std: list[float] = [0.5, 0.5, 0.5]
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __init__(self, **kwargs: Any):
        super().__init__(**self.take_settings(kwargs))

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {"resample": int(settings["resample"])}

    def fetch_images(self, images: Any) -> list[Image.Image]:
        """Read paths, bytes and arrays; transformers' own version would also fetch URLs."""
        return read_images(images, upright=self.upright)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        allow_urls: bool | Collection[str] = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures -> `pixel_values` `(B, 3, H, W)`, float32.

        Args:
            images: one picture or a list.
            return_tensors: "pt", "np", or None for a list of arrays.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts. An argument of
                the call alone: what is downloaded with a model cannot switch it on.
            **kwargs: settings for this call.

        Raises:
            MediaError: a picture cannot be read; the message names it.
            TypeError: an unknown setting.
        """
        settings = self.settings_for(kwargs, FOREIGN_OPTIONS)

        def prepared(item: tuple[int, Any]) -> np.ndarray:
            image = read_image(item[1], upright=settings["upright"], allow_urls=allow_urls, index=item[0])
            return self.pixels(image, settings, f"image {item[0]}")

        return self.batch(parallel(prepared, list(enumerate(image_batch(images)))), settings, return_tensors)

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """One picture -> (3, H, W), float32."""
        image = to_8_bits(image, name)
        if settings["do_resize"]:
            image = self.resize(image, settings)
        array = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(np.float32, order="C")
        return self.scaled(array, settings)

    def scaled(self, array: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """(3, H, W) in 0..255 -> what the model takes; in place."""
        if settings["do_rescale"]:
            array /= 255
        if settings["do_normalize"]:
            array -= np.asarray(settings["image_mean"], dtype=np.float32)[:, None, None]
            array /= np.asarray(settings["image_std"], dtype=np.float32)[:, None, None]
        return array

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        """The picture at the size the model takes, in its own mode; here, as it is."""
        return image

    def batch(self, arrays: list[np.ndarray], settings: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
        """Pictures' arrays -> the model's inputs."""
        if return_tensors is None:
            return BatchFeature({"pixel_values": arrays})
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ValueError(f"Pictures of different sizes {shapes} make no batch: leave do_resize on.")
        return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoImageProcessor") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class FixedSizeImageProcessor(HfvlmImageProcessor):
    """For models that take pictures of one size.

    Args:
        size: the model's `{"height", "width"}` in pixels; one integer means a square.
        resize_mode: "shortest" covers the size and crops the centre, "longest" fits into it and pads, "squash" ignores
            the aspect ratio.
        fill_color: of the padding, in the picture's own mode.
        antialias: False samples as TensorFlow's resize does by default; for "squash", bilinear, alone.
    """

    SETTINGS = (*HfvlmImageProcessor.SETTINGS, "size", "resize_mode", "fill_color", "antialias")

    size: dict[str, int] = {"height": 224, "width": 224}
    resize_mode: str = "shortest"
    fill_color: int | list[int] = 0
    antialias: bool = True

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        size = settings["size"]
        if isinstance(size, int):
            size = {"height": size, "width": size}
        elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
            size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
        if not isinstance(size, Mapping) or set(size) != {"height", "width"} or min(size.values()) < 1:
            raise ValueError(f"size must be an integer or {{'height': ..., 'width': ...}}, not {size!r}.")
        if settings["resize_mode"] not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, not {settings['resize_mode']!r}.")
        if not settings["antialias"] and (settings["resize_mode"], settings["resample"]) != ("squash", 2):
            raise ValueError("antialias=False needs resize_mode 'squash' and resample 2 (bilinear).")
        return super().checked(settings) | {"size": dict(size)}

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        size, resample = (settings["size"]["height"], settings["size"]["width"]), settings["resample"]
        if not settings["antialias"]:
            return squash_sampled(image, size)
        if settings["resize_mode"] == "squash":
            return squash(image, size, resample)
        if settings["resize_mode"] == "longest":
            return contain(image, size, resample, settings["fill_color"])
        return cover(image, size, resample)


class HfvlmFeatureExtractor(Settings, FeatureExtractionMixin, ABC):
    """Recordings, films and maps to one of a model's inputs, in what the subclass names in `model_input_names`.

    A subclass reads its kind of source in `read`, and makes the array of one in `features`. What is said of the
    sources in a call, such as their sampling rate, it names in `SOURCE_OPTIONS`; the settings describe the result.
    Each source is read and prepared in one task.
    """

    KIND = "input"
    model_input_names: list[str]
    split = staticmethod(as_batch)
    SOURCE_OPTIONS: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
        super().__init__(**self.take_settings(kwargs))

    def __call__(
        self,
        sources: Any,
        return_tensors: str | None = None,
        *,
        allow_urls: bool | Collection[str] = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Sources -> the model's input.

        Args:
            sources: one or a list; the class says what each may be.
            return_tensors: "pt", "np", or None for a list of arrays.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts. An argument of
                the call alone: what is downloaded with a model cannot switch it on.
            **kwargs: what the class says of sources, and settings for this call.

        Raises:
            MediaError: a source cannot be read; the message names it.
            TypeError: an unknown setting.
        """
        options = {name: kwargs.pop(name) for name in self.SOURCE_OPTIONS if kwargs.get(name) is not None}
        settings = self.settings_for(kwargs, (*FOREIGN_OPTIONS, *self.SOURCE_OPTIONS))

        def prepared(item: tuple[int, Any]) -> np.ndarray:
            index, source = item
            name = name_of(self.KIND, source, index)
            medium = self.read(source, index=index, allow_urls=allow_urls, **options)
            self.check(medium, settings, name)
            try:
                return self.features(medium, settings)
            except MediaError as error:
                raise MediaError(str(error) if name in str(error) else f"{name}: {error}") from error

        arrays = parallel(prepared, list(enumerate(self.split(sources))))
        if return_tensors is None:
            return BatchFeature({self.model_input_names[0]: arrays})
        if not arrays:
            raise ValueError(f"{type(self).__name__} was given an empty batch.")
        return BatchFeature(self.batch(arrays), tensor_type=return_tensors)

    @abstractmethod
    def read(self, source: Any, **options: Any) -> Any:
        """Read one source, as `hfvlm.media` does."""

    def check(self, medium: Any, settings: Mapping[str, Any], name: str) -> None:
        """Refuse, or warn of, what was read and lies outside of what the model knows."""

    @abstractmethod
    def features(self, medium: Any, settings: Mapping[str, Any]) -> np.ndarray:
        """One source, read -> one row of the batch."""

    def batch(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Rows -> the model's inputs."""
        return {self.model_input_names[0]: np.stack(arrays)}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoFeatureExtractor") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class HfvlmProcessor(ProcessorMixin):
    """Base of every processor. `parts` says which of its parts prepares a modality."""

    parts: dict[str, str] = {"image": "image_processor", "text": "tokenizer"}

    @property
    def modalities(self) -> tuple[str, ...]:
        """What can be prepared."""
        return tuple(name for name, part in self.parts.items() if getattr(self, part, None) is not None)

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Sources of one modality -> what the model's `get_<modality>_features` takes.

        Args:
            modality: one of `modalities`.
            sources: one or a list.
            return_tensors: "pt", "np", or None for lists.
            **options: of the part.

        Raises:
            ValueError: the processor has no part for the modality.
        """
        if modality not in self.modalities:
            raise ValueError(f"{type(self).__name__} prepares {', '.join(self.modalities)}, not {modality}.")
        part = getattr(self, self.parts[modality])
        return BatchFeature(dict(part(sources, return_tensors=return_tensors, **options)))

    def asked(self, question: str) -> str:
        """A question about one picture, as the model was trained to be asked."""
        return question

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """The class behind a name in processor_config.json; transformers looks through native classes only."""
        from hfvlm.registry import find_class

        return find_class(module_name) or ProcessorMixin.get_possibly_dynamic_module(module_name)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class DualEncoderProcessor(HfvlmProcessor):
    """An image processor and a tokenizer side by side."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        return_tensors: str | None = "pt",
        images_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures, texts or both -> the model's inputs.

        Args:
            images: one picture or a list; see `hfvlm.media.read_image` for what a picture may be.
            text: one text or a list.
            return_tensors: "pt", "np", or None for lists.
            images_kwargs: settings of the image processor for this call.
            text_kwargs: arguments of the tokenizer for this call.
            **kwargs: either of these, sorted by name.
        """
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        for_images = {*getattr(self.image_processor, "SETTINGS", ()), "allow_urls"}
        data: dict[str, Any] = {}
        if text is not None:
            options = {k: v for k, v in kwargs.items() if k not in for_images} | dict(text_kwargs or {})
            data |= self.tokenizer(text, return_tensors=return_tensors, **options)
        if images is not None:
            options = {k: v for k, v in kwargs.items() if k in for_images} | dict(images_kwargs or {})
            data |= self.image_processor(images, return_tensors=return_tensors, **options)
        return BatchFeature(data, tensor_type=return_tensors)


class MultiEncoderProcessor(HfvlmProcessor):
    """A part for each modality, side by side."""

    def __call__(  # noqa: PLR0913  (an argument a modality)
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        depth: Any = None,
        thermal: Any = None,
        imu: Any = None,
        *,
        return_tensors: str | None = "pt",
        allow_urls: bool | Collection[str] = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Whatever is given -> the model's inputs.

        Args:
            images: one or a list, as `hfvlm.media.read_image` reads them.
            text: one or a list.
            videos: one or a list, see `read_video`.
            audio: one or a list, see `read_audio`.
            depth: one or a list, see `read_depth`.
            thermal: one or a list, see `read_thermal`.
            imu: one or a list, see `read_imu`.
            return_tensors: "pt", "np", or None for lists.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
            **kwargs: `images_kwargs`, `text_kwargs`, `videos_kwargs`, `audio_kwargs`, `depth_kwargs`, `thermal_kwargs`
                and `imu_kwargs`, options of each part for this call: `audio_kwargs={"sampling_rate": 44_100}`. All
                else goes to the tokenizer.

        Raises:
            MediaError: a source cannot be read; the message names it.
        """
        names = ("images", "text", "videos", "audio", "depth", "thermal", "imu")
        given = dict(zip(names, (images, text, videos, audio, depth, thermal, imu), strict=True))
        options = {name: dict(kwargs.pop(f"{name}_kwargs", None) or {}) for name in names}
        if all(sources is None for sources in given.values()):
            raise ValueError(f"{type(self).__name__} needs one of {', '.join(names)}.")
        data: dict[str, Any] = {}
        for name, sources in given.items():
            if sources is not None:
                shared = kwargs if name == "text" else {"allow_urls": allow_urls}
                modality = name.removesuffix("s") if name in ("images", "videos") else name
                data |= self.prepare(modality, sources, return_tensors, **shared | options[name])
        return BatchFeature(data)
