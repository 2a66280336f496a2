"""Base classes of the processors: the models' inputs, equal to what the originals prepare."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image, read_images, to_8_bits
from hfvlm.media.resizing import contain, cover, squash, squash_sampled
from hfvlm.media.sources import as_batch, name_of, parallel
from hfvlm.processing.batches import flat_images, is_empty, of_sources
from hfvlm.processing.publishing import Published
from hfvlm.processing.settings import (
    LOADING,
    STORED,
    Check,
    Settings,
    check_keywords,
    flag,
    one_of,
    rectangle,
    sharing,
)
from hfvlm.processing.tokenization import PADDINGS, TOKENIZER_ARGUMENTS, TOKENIZER_SETTINGS

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
LAYOUTS = ("channels_first", "channels_last")
# transformers' words for the options of each kind of input, and what each kind knows in transformers itself.
GROUPS: dict[str, frozenset[str]] = {
    "text": frozenset(TextKwargs.__annotations__),
    "images": frozenset(ImagesKwargs.__annotations__),
    "videos": frozenset(VideosKwargs.__annotations__),
    "audio": frozenset(AudioKwargs.__annotations__),
}


def check_foreign(owner: Any, options: Mapping[str, Any]) -> None:
    """Refuse values of `FOREIGN_OPTIONS` that would be swallowed.

    Raises:
        ValueError: naming the option and the remedy.
    """
    name = type(owner).__name__
    if options.get("do_convert_rgb") not in (None, True):
        raise ValueError(f"{name}: do_convert_rgb must be True: the model takes three channels.")
    if options.get("return_metadata") not in (None, False):
        raise ValueError(f"{name}: return_metadata must be False: read the video with hfvlm.media.read_video.")
    if (layout := options.get("data_format")) is not None and str(getattr(layout, "value", layout)) != LAYOUTS[0]:
        raise ValueError(f"{name}: data_format must be {LAYOUTS[0]!r}, as the model takes it, not {layout!r}.")
    layout = options.get("input_data_format")
    if layout is not None and str(getattr(layout, "value", layout)) not in LAYOUTS:
        raise ValueError(f"{name}: input_data_format must be one of {', '.join(LAYOUTS)}, not {layout!r}.")


def channels_last(image: Any, layout: Any) -> Any:
    """An array whose channels come first, as the caller says, with its channels last; anything else as it is."""
    if layout is None or str(getattr(layout, "value", layout)) != LAYOUTS[0] or getattr(image, "ndim", 0) != 3:
        return image
    return np.moveaxis(image, 0, -1) if isinstance(image, np.ndarray) else image.movedim(0, -1)


def on_device(features: Any, device: Any) -> Any:
    """The tensors of a batch where the caller wants them."""
    return features if device is None else features.to(device)


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
        do_rescale: multiply by `rescale_factor`.
        do_normalize: subtract the mean, divide by the deviation.
        rescale_factor: what 8-bit values are multiplied by.

    Raises:
        TypeError: an unknown setting.
        ValueError: a value that a setting cannot have.
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
        "rescale_factor",
    )
    STANDING = frozenset(FOREIGN_OPTIONS)

    upright: bool = True
    resample: int = 3
    image_mean: list[float] = [0.5, 0.5, 0.5]
    image_std: list[float] = [0.5, 0.5, 0.5]
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255

    def __init__(self, **kwargs: Any):
        check_foreign(self, kwargs)
        super().__init__(**self.take_settings(kwargs))

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
            images: one image, a list, or lists in a list, which are flattened.
            return_tensors: "pt", "np", or None for a list of arrays.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts. An argument of
                the call alone: what is downloaded with a model cannot switch it on.
            **kwargs: settings for this call; `device`, where tensors are wanted; `input_data_format`,
                "channels_first" or "channels_last", of arrays that could be either.

        Raises:
            MediaError: an image cannot be read; the message names it.
            TypeError: an unknown setting.
            ValueError: a value that a setting cannot have, or no images.
        """
        settings = self.settings_for(kwargs, FOREIGN_OPTIONS)

        def prepared(item: tuple[int, Any]) -> np.ndarray:
            return self.pixels(self.read(item, settings, allow_urls), settings, f"image {item[0]}")

        arrays = parallel(prepared, list(enumerate(self.sources(images, kwargs))))
        return on_device(self.batch(arrays, settings, return_tensors), kwargs.get("device"))

    def sources(self, images: Any, options: Mapping[str, Any]) -> list[Any]:
        """The images of a call, one by one.

        Raises:
            ValueError: there are none, or an option of the call cannot be followed.
        """
        check_foreign(self, options)
        flat = [channels_last(image, options.get("input_data_format")) for image in flat_images(images)]
        if not flat:
            raise ValueError(f"{type(self).__name__} was given no images: an empty list.")
        return flat

    def read(self, item: tuple[int, Any], settings: Mapping[str, Any], allow_urls: Any) -> Image.Image:
        """One image and its place in the batch -> the image, decoded, in its own mode."""
        return read_image(item[1], upright=settings["upright"], allow_urls=allow_urls, index=item[0])

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
            factor = settings["rescale_factor"]
            # Divided, as the originals do, where the factor says so: the last bit of a product may differ.
            array = np.divide(array, 255, out=array) if factor == 1 / 255 else np.multiply(array, factor, out=array)
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
    CHECKS: Mapping[str, Check] = {"size": rectangle, "resize_mode": one_of(*RESIZE_MODES)}

    size: dict[str, int] = {"height": 224, "width": 224}
    resize_mode: str = "shortest"
    fill_color: int | list[int] = 0
    antialias: bool = True

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if not settings["antialias"] and (settings["resize_mode"], settings["resample"]) != ("squash", 2):
            raise ValueError(f"{type(self).__name__}: antialias=False needs resize_mode 'squash' and resample 2.")
        return settings

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

    # Every row of a batch has one size already: there is nothing to pad or to cut.
    STANDING = frozenset({*FOREIGN_OPTIONS, "padding", "truncation", "return_attention_mask"})

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
            value = options.get(name)
            if not isinstance(value, bool | None):
                try:
                    check(value)
                except ValueError as error:
                    raise ValueError(f"{type(self).__name__}: {name} {error}, not {value!r:.200}.") from error

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
            **kwargs: what the class says of sources, and settings for this call. `padding` and `truncation` are
                taken and change nothing: every row has the model's size.

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
            medium = self.read(source, index=index, allow_urls=allow_urls, **options)
            self.check(medium, settings, name)
            try:
                return self.features(medium, settings)
            except MediaError as error:
                raise MediaError(str(error) if name in str(error) else f"{name}: {error}") from error

        # A tuple may be one video, of which it holds the frames.
        batch = self.split(sources if self.KIND == "video" else of_sources(sources))
        arrays = parallel(prepared, list(enumerate(batch)))
        if return_tensors is None:
            return BatchFeature({self.model_input_names[0]: arrays})
        return on_device(BatchFeature(self.batch(arrays), tensor_type=return_tensors), kwargs.get("device"))

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


def call_keywords(part: Any) -> frozenset[str]:
    """Keywords that a call of a part knows: hfvlm's, or transformers' own image processor or tokenizer."""
    if part is None:
        return frozenset()
    if isinstance(part, Settings):
        more = {*getattr(part, "SOURCE_OPTIONS", ()), "allow_urls", "return_tensors"}
        return frozenset({*part.SETTINGS, *part.STANDING, *more})
    if isinstance(part, PreTrainedTokenizerBase):
        return TOKENIZER_ARGUMENTS
    known = getattr(part, "valid_kwargs", None)
    return frozenset(known.__annotations__ if known else set().union(*GROUPS.values()))


class HfvlmProcessor(Published, ProcessorMixin):
    """Base of every processor. `parts` says which of its parts prepares a modality."""

    parts: dict[str, str] = {"image": "image_processor", "text": "tokenizer"}
    # What the values of a constructor's arguments may be.
    CHECKS: Mapping[str, Check] = {}

    def __init__(self, *parts: Any, **kwargs: Any):
        check_keywords(self, kwargs, self.arguments(), {*STORED, *LOADING})
        super().__init__(*parts, **{k: v for k, v in kwargs.items() if k not in {*STORED, *LOADING}})

    @classmethod
    def arguments(cls) -> frozenset[str]:
        """Names of the constructor's arguments."""
        named = inspect.signature(cls.__init__).parameters.values()
        more = {"chat_template", "audio_tokenizer", *cls.get_attributes()}
        return frozenset(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self") | more

    def set_arguments(self, **arguments: Any) -> None:
        """Set what a constructor was given.

        Raises:
            ValueError: naming the argument and what it must be.
        """
        for name, value in arguments.items():
            try:
                setattr(self, name, self.CHECKS[name](value) if name in self.CHECKS else value)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {name} {error}, not {value!r:.200}.") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; settings of the parts may be given, too.

        Raises:
            TypeError: a keyword that neither the processor nor a part of it knows.
            ValueError: processor_config.json holds no settings, or wrong ones.
        """
        with sharing(kwargs):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if not kwargs.get("return_unused_kwargs"):
            parts = [getattr(loaded, name) for name in cls.get_attributes()]
            settings = {name for part in parts if isinstance(part, Settings) for name in part.SETTINGS}
            given = [name for name in kwargs if not name.endswith("_token")]
            standing = {*TOKENIZER_SETTINGS, *STORED, *LOADING, "return_unused_kwargs"}
            check_keywords(cls, given, {*settings, *cls.arguments()}, standing)
        return loaded

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """As transformers'.

        Raises:
            ValueError: processor_config.json is no JSON object.
        """
        try:
            fields, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError) as error:
            raise _no_object(pretrained_model_name_or_path) from error
        if not isinstance(fields, Mapping):
            raise _no_object(pretrained_model_name_or_path)
        return dict(fields), rest

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            TypeError: processor_config.json names an argument that the processor does not have.
        """
        name = f"{cls.__name__} (processor_config.json)"
        check_keywords(name, processor_dict, cls.arguments(), {*STORED, *LOADING})
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What can be prepared."""
        return tuple(name for name, part in self.parts.items() if getattr(self, part, None) is not None)

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Sources of one modality -> the inputs of the model's `get_<modality>_features`.

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
        return BatchFeature(dict(part(sources, **{"return_tensors": return_tensors} | options)))

    def options_of(
        self, kwargs: Mapping[str, Any], known: Mapping[str, Collection[str]], flat: Collection[str]
    ) -> dict[str, dict[str, Any]]:
        """The keywords of a call, by the group of inputs that they are options of.

        Args:
            kwargs: of the call. `<group>_kwargs` are one group's, `common_kwargs` those of all that know them; any
                other keyword is an option of the first of the groups `flat` that knows it.
            known: keywords by group ("images", "text", ...).
            flat: groups.

        Raises:
            TypeError: a keyword that no group knows, naming the nearest one.
        """
        rest, name, options = dict(kwargs), type(self).__name__, dict[str, dict[str, Any]]()
        common = dict(rest.pop("common_kwargs", None) or {})
        for group in dict.fromkeys([*known, *GROUPS]):
            options[group] = dict(rest.pop(f"{group}_kwargs", None) or {})
            words = known[group] if group in known else GROUPS[group]
            check_keywords(f"{name}, {group}_kwargs", options[group], words)
        groups = [f"{group}_kwargs" for group in options]
        check_keywords(self, rest, {*(word for group in flat for word in known[group]), *groups})
        check_keywords(f"{name}, common_kwargs", common, set().union(*known.values()))
        for word, value in rest.items():
            first = next(group for group in flat if word in known[group])
            options[first].setdefault(word, value)
        for group, words in known.items():
            options[group] = {word: value for word, value in common.items() if word in words} | options[group]
        return options

    def check_licence(self, *places: Any) -> None:
        """Check the licences of the processor's origins, and of its parts'.

        Raises:
            LicenceError: one is not open.
        """
        parts = [getattr(self, name, None) for name in self.get_attributes()]
        super().check_licence(*places, *(origin for part in parts for origin in getattr(part, "origins", ())))

    def asked(self, question: str) -> str:
        """A question about one image, as the model was trained on it."""
        return question

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """The class behind a name in processor_config.json; transformers looks through native classes only."""
        from hfvlm.registry import find_class

        return find_class(module_name) or ProcessorMixin.get_possibly_dynamic_module(module_name)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


def _no_object(folder: Any) -> ValueError:
    return ValueError(f"{folder}/processor_config.json: no JSON object with a processor's settings; convert again.")


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
        """Images, texts or both -> the model's inputs.

        Args:
            images: one image or a list; see `hfvlm.media.read_image` for what an image may be.
            text: one text or a list.
            return_tensors: "pt", "np", or None for lists.
            images_kwargs: settings of the image processor for this call.
            text_kwargs: arguments of the tokenizer for this call.
            **kwargs: either of these, sorted by name; `common_kwargs` of both.

        Raises:
            MediaError: an image cannot be read; the message names it.
            TypeError: a keyword that neither part knows.
            ValueError: nothing is given, or an empty list.
        """
        for name in ("videos", "audio", "audios"):
            if not is_empty(kwargs.pop(name, None)):
                raise ValueError(f"{type(self).__name__} prepares images and text, not {name}.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        known = {"images": call_keywords(self.image_processor), "text": call_keywords(self.tokenizer)}
        given = {"images_kwargs": images_kwargs, "text_kwargs": text_kwargs, **kwargs}
        options = self.options_of(given, known, flat=("images", "text"))
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.tokenizer(text, **{"return_tensors": return_tensors} | options["text"])
        if images is not None:
            data |= self.image_processor(images, **{"return_tensors": return_tensors} | options["images"])
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
                and `imu_kwargs`, options of each part for this call: `audio_kwargs={"sampling_rate": 44_100}`;
                `common_kwargs`, of all. All else goes to the tokenizer.

        Raises:
            MediaError: a source cannot be read; the message names it.
            TypeError: a keyword that no part knows.
            ValueError: nothing is given, or an empty list, or an input that the processor has no part for.
        """
        names = ("images", "text", "videos", "audio", "depth", "thermal", "imu")
        given = dict(zip(names, (images, text, videos, audio, depth, thermal, imu), strict=True))
        if all(sources is None for sources in given.values()):
            raise ValueError(f"{type(self).__name__} needs one of {', '.join(names)}.")
        modalities = {name: name.removesuffix("s") if name in ("images", "videos") else name for name in names}
        parts = {name: getattr(self, self.parts.get(modality, ""), None) for name, modality in modalities.items()}
        options = self.options_of(kwargs, {name: call_keywords(part) for name, part in parts.items()}, ("text",))
        data: dict[str, Any] = {}
        for name, sources in given.items():
            if sources is not None:
                shared: dict[str, Any] = {"return_tensors": return_tensors}
                shared |= {} if name == "text" else {"allow_urls": allow_urls}
                data |= self.prepare(modalities[name], sources, **shared | options[name])
        return BatchFeature(data)
