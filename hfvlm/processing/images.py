"""Images to pixels: the bases of the image processors."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from hfvlm.media.images import read_image, read_images, to_8_bits
from hfvlm.media.resizing import contain, cover, squash, squash_sampled
from hfvlm.media.sources import parallel
from hfvlm.processing.batches import flat_images
from hfvlm.processing.settings import Deviations, Edge, Factor, Filter, Flag, Means, Settings, Size, color, one_of

# Of CLIP's training images, per channel, of values in 0..1.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
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
    if _layout(options.get("data_format")) not in (None, LAYOUTS[0]):
        layout = options["data_format"]
        raise ValueError(f"{name}: data_format must be {LAYOUTS[0]!r}, as the model takes it, not {layout!r}.")
    if _layout(options.get("input_data_format")) not in (None, *LAYOUTS):
        layout = options["input_data_format"]
        raise ValueError(f"{name}: input_data_format must be one of {', '.join(LAYOUTS)}, not {layout!r}.")


def _layout(option: Any) -> str | None:
    """Return the name of a layout, which may come as a string or as transformers' enumeration."""
    return None if option is None else str(getattr(option, "value", option))


def channels_last(image: Any, layout: Any) -> Any:
    """Return an array of the layout "channels_first" with its channels last; anything else as it is."""
    if _layout(layout) != LAYOUTS[0] or getattr(image, "ndim", 0) != 3:
        return image
    return np.moveaxis(image, 0, -1) if isinstance(image, np.ndarray) else image.movedim(0, -1)


def on_device(features: Any, device: Any) -> Any:
    """Move the tensors of a batch to a device; None leaves them."""
    return features if device is None else features.to(device)


class HfvlmImageProcessor(Settings, BaseImageProcessor):
    """Images to normalised pixels, as the originals' PIL pipelines make them: resize in the image's own mode, convert
    to RGB, scale, normalise.

    Takes whatever `hfvlm.media.read_image` reads, in any mixture. Each image is decoded and resized in one task, on
    several threads, so that a batch of large images is never in memory as a whole.

    Args:
        upright: turn images by their EXIF orientation, as viewers do; False takes pixels as they are stored, as the
            originals do.
        resample: Pillow's filter; 2 is bilinear, 3 is bicubic.
        image_mean: per channel, of values in 0..1.
        image_std: per channel, of values in 0..1.
        do_resize: False takes images that have the model's size already.
        do_rescale: multiply by `rescale_factor`.
        do_normalize: subtract the mean, divide by the deviation.
        rescale_factor: of 8-bit values.

    Raises:
        TypeError: an unknown setting.
        ValueError: a value that a setting cannot have.
    """

    model_input_names = ["pixel_values"]
    STANDING = frozenset(FOREIGN_OPTIONS)

    upright: Flag = True
    resample: Filter = 3
    image_mean: Means = [0.5, 0.5, 0.5]
    image_std: Deviations = [0.5, 0.5, 0.5]
    do_resize: Flag = True
    do_rescale: Flag = True
    do_normalize: Flag = True
    rescale_factor: Factor = 1 / 255

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
        """Prepare images -> `pixel_values` `(B, 3, H, W)`, float32.

        Args:
            images: one image, a list, or lists in a list, which are flattened.
            return_tensors: "pt", "np", or None for a list of arrays.
            allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts. An argument of
                the call only: nothing that is downloaded with a model can switch it on.
            **kwargs: settings for this call; `device` of the tensors; `input_data_format`, "channels_first" or
                "channels_last", of arrays that could be either.

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
        """Return the images of a call, one by one.

        Raises:
            ValueError: there are none, or an option of the call cannot be followed.
        """
        check_foreign(self, options)
        flat = [channels_last(image, options.get("input_data_format")) for image in flat_images(images)]
        if not flat:
            raise ValueError(f"{type(self).__name__} was given no images: an empty list.")
        return flat

    def read(self, item: tuple[int, Any], settings: Mapping[str, Any], allow_urls: Any) -> Image.Image:
        """Read one image, given with its index in the batch -> the image, decoded, in its own mode."""
        return read_image(item[1], upright=settings["upright"], allow_urls=allow_urls, index=item[0])

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """Prepare one image -> `(3, H, W)`, float32."""
        image = to_8_bits(image, name)
        if settings["do_resize"]:
            image = self.resize(image, settings)
        array = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(np.float32, order="C")
        return self.scaled(array, settings)

    def scaled(self, array: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        """Rescale and normalise `(3, H, W)` in 0..255, in place."""
        if settings["do_rescale"]:
            factor = settings["rescale_factor"]
            # Divided, as the originals do, where the factor is 1/255: the last bit of a product may differ.
            array = np.divide(array, 255, out=array) if factor == 1 / 255 else np.multiply(array, factor, out=array)
        if settings["do_normalize"]:
            array -= np.asarray(settings["image_mean"], dtype=np.float32)[:, None, None]
            array /= np.asarray(settings["image_std"], dtype=np.float32)[:, None, None]
        return array

    def resize(self, image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
        """Return the image at the size the model takes, in its own mode; here, as it is."""
        return image

    def batch(self, arrays: list[np.ndarray], settings: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
        """Make the model's inputs of the images' arrays."""
        if return_tensors is None:
            return BatchFeature({"pixel_values": arrays})
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ValueError(f"Images of different sizes {shapes} make no batch: leave do_resize on.")
        return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoImageProcessor") -> None:
        """Do nothing: hfvlm is installed code, and a module of it copied next to the weights could not import."""


class FixedSizeImageProcessor(HfvlmImageProcessor):
    """For models that take images of one size.

    Args:
        size: the model's `{"height", "width"}` in pixels; one integer means a square.
        resize_mode: "shortest" covers the size and crops the centre, "longest" fits into it and pads, "squash" ignores
            the aspect ratio.
        fill_color: of the padding, in the image's own mode.
        antialias: False samples as TensorFlow's resize does by default; only for "squash", bilinear.
    """

    size: Size = {"height": 224, "width": 224}
    resize_mode: Annotated[str, one_of("shortest", "longest", "squash")] = "shortest"
    fill_color: Annotated[int | list[int], color] = 0
    antialias: Flag = True

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


class CroppedImageProcessor(FixedSizeImageProcessor):
    """For models that take the centre of a larger image.

    Args:
        resized: edge in pixels that images are resized to before the centre of `size` is cropped.
    """

    resized: Edge

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().checked(settings)
        if settings["resized"] < max(settings["size"].values()):
            raise ValueError(f"resized must be an edge no shorter than size {settings['size']}.")
        return settings
