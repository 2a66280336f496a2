"""Recordings, videos and sensors' maps to arrays: the bases of the feature extractors."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from transformers import FeatureExtractionMixin
from transformers.image_processing_base import BatchFeature

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import as_batch, name_of, parallel
from hfvlm.processing.batches import is_empty, of_sources
from hfvlm.processing.images import FOREIGN_OPTIONS, check_foreign, on_device
from hfvlm.processing.settings import Settings, flag, one_of
from hfvlm.processing.tokenization import PADDINGS


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
