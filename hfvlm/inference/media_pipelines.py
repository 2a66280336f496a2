"""transformers' own pipelines, for hfvlm's models: they read media as `hfvlm.media` does, like the processors.

transformers' readers convert images to RGB before they are resized, whatever their mode, know one sampling rate, and
fetch every URL. Here a pipeline of a path gives what `model(**processor(path))` gives, and fetches no URL unless
`allow_urls=` allows it. The tasks stay transformers': their entries in the registry of pipelines make these classes
for models of hfvlm, and transformers' own for all others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.pipelines import (
    PIPELINE_REGISTRY,
    AnyToAnyPipeline,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageTextToTextPipeline,
    ZeroShotAudioClassificationPipeline,
    ZeroShotImageClassificationPipeline,
)

# The readers are imported where they read: this module is imported with transformers' pipelines.
if TYPE_CHECKING:
    from hfvlm.media.sources import AllowUrls


class MediaPipeline:
    """What the pipelines below share: `allow_urls`, and media that are read before transformers gets them."""

    image_processor: Any
    feature_extractor: Any
    processor: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the pipeline; of a model that is not hfvlm's, transformers' own."""
        if is_ours(kwargs.get("model", args[0] if args else None)):
            return super().__new__(cls)
        return native_of(cls)(*args, **kwargs)

    def _sanitize_parameters(self, allow_urls: "AllowUrls | None" = None, **kwargs: Any) -> tuple[Any, Any, Any]:
        before, forward, after = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        return before if allow_urls is None else {**before, "allow_urls": allow_urls}, forward, after

    def preprocess(self, inputs: Any, *args: Any, allow_urls: "AllowUrls" = False, **kwargs: Any) -> Any:
        return super().preprocess(self.read(inputs, allow_urls), *args, **kwargs)  # type: ignore[misc]

    def read(self, source: Any, allow_urls: "AllowUrls") -> Any:
        """Read an image, in a form that transformers gives on to the processor."""
        from hfvlm.media.images import ImageAsRead, read_image, to_8_bits
        from hfvlm.processing.base import HfvlmProcessor
        from hfvlm.processing.images import HfvlmImageProcessor

        ours = (HfvlmImageProcessor, HfvlmProcessor)
        image = read_image(source, upright=False, allow_urls=allow_urls)
        if any(isinstance(part, ours) for part in (self.image_processor, self.processor)):
            return ImageAsRead(image)
        return to_8_bits(read_image(image)).convert("RGB")


class ZeroShotPipeline(MediaPipeline):
    """For pipelines that compare media with labels: the labels' tokens and embeddings are cached between calls."""

    model: Any
    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        from hfvlm.inference.label_cache import LabelCache, RecentlyUsed

        super().__init__(*args, **kwargs)
        self.tokens, self.embeddings = RecentlyUsed(), LabelCache()

    def preprocess(self, inputs: Any, candidate_labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        labels = candidate_labels if isinstance(candidate_labels, list | tuple) else [None]
        if args or not all(isinstance(label, str) for label in labels):
            return super().preprocess(inputs, candidate_labels, *args, **kwargs)
        simple = {name: x for name, x in vars(self.tokenizer).items() if isinstance(x, str | int | float | None)}
        settings = repr((self.tokenizer, simple, kwargs))
        key = self.tokenizer, settings, tuple(labels)
        # One label is enough to prepare the media where the tokens of all are known.
        needed = labels[:1] if key in self.tokens.entries else labels
        given = super().preprocess(inputs, needed, **kwargs)
        tokens = self.tokens.get(key, lambda: given["text_inputs"][0])
        given["candidate_labels"], given["text_inputs"] = labels, [tokens]
        return given

    def _forward(self, model_inputs: Any) -> Any:
        media = dict(model_inputs)
        labels, texts = media.pop("candidate_labels"), media.pop("text_inputs")[0]
        # Media in batches come with the texts of each.
        features = self.embeddings.features(self.model, texts[0] if isinstance(texts, list) else texts)
        if features is None:
            return super()._forward(model_inputs)  # type: ignore[misc]
        return {"candidate_labels": labels, "logits": self.model.logits_with(features, **media)}


class HfvlmZeroShotImageClassificationPipeline(ZeroShotPipeline, ZeroShotImageClassificationPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media.read_image` reads."""


class HfvlmImageClassificationPipeline(MediaPipeline, ImageClassificationPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media.read_image` reads."""


class HfvlmImageFeatureExtractionPipeline(MediaPipeline, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media.read_image` reads."""


class HfvlmZeroShotAudioClassificationPipeline(ZeroShotPipeline, ZeroShotAudioClassificationPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media.read_audio` reads."""

    def read(self, source: Any, allow_urls: "AllowUrls") -> Any:
        """Read an audio clip; arrays without a rate are at the feature extractor's, as transformers takes them."""
        from hfvlm.media.audio import as_read, read_audio
        from hfvlm.processing.features import HfvlmFeatureExtractor

        if isinstance(source, np.ndarray):
            source = (source, self.feature_extractor.sampling_rate)
        recording = read_audio(source, allow_urls=allow_urls)
        if isinstance(self.feature_extractor, HfvlmFeatureExtractor):
            return as_read(recording)
        return recording.samples[0]


class ConversationPipeline(MediaPipeline):
    """For pipelines that take texts, texts with images, or conversations."""

    def preprocess(self, inputs: Any = None, *args: Any, allow_urls: "AllowUrls" = False, **kwargs: Any) -> Any:
        if isinstance(inputs, Mapping) and inputs.get("images") is not None:
            inputs = {**inputs, "images": self.read_each(inputs["images"], allow_urls)}
        elif allow_urls and not isinstance(inputs, str | list | tuple):
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "allow_urls": allow_urls}
        return super(MediaPipeline, self).preprocess(inputs, *args, **kwargs)  # type: ignore[misc]

    def read_each(self, sources: Any, allow_urls: "AllowUrls") -> Any:
        """Read images, or lists of them, one for each text."""
        if isinstance(sources, list | tuple):
            return [self.read_each(source, allow_urls) for source in sources]
        return self.read(sources, allow_urls)


class HfvlmImageTextToTextPipeline(ConversationPipeline, ImageTextToTextPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media.read_image` reads."""


class HfvlmAnyToAnyPipeline(ConversationPipeline, AnyToAnyPipeline):  # type: ignore[misc]
    """As transformers', of whatever `hfvlm.media` reads."""


TASKS: dict[str, type] = {
    "any-to-any": HfvlmAnyToAnyPipeline,
    "image-classification": HfvlmImageClassificationPipeline,
    "image-feature-extraction": HfvlmImageFeatureExtractionPipeline,
    "image-text-to-text": HfvlmImageTextToTextPipeline,
    "zero-shot-audio-classification": HfvlmZeroShotAudioClassificationPipeline,
    "zero-shot-image-classification": HfvlmZeroShotImageClassificationPipeline,
}


def register_media_pipelines() -> None:
    """Enter the pipelines above for their tasks. Entries that another library has taken stay as they are."""
    for task, pipeline in TASKS.items():
        entry = PIPELINE_REGISTRY.supported_tasks.get(task)
        native = native_of(pipeline)
        # Some versions of transformers name a class that they have not imported yet.
        if entry is not None and entry["impl"] in (native, f"{native.__module__}.{native.__qualname__}"):
            entry["impl"] = pipeline


def is_ours(model: Any) -> bool:
    """Recognise a model of hfvlm's, in an adapter or compiled, too."""
    return str(getattr(getattr(model, "config", None), "model_type", "")).startswith("hfvlm_")


def native_of(pipeline: type) -> type:
    """Find the pipeline of transformers that one of ours extends."""
    return next(base for base in pipeline.__mro__ if base.__module__.startswith("transformers."))
