"""Processors of texts with videos in them: the inputs of chat models."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import MultiModalData

from hfvlm.media.video import read_videos
from hfvlm.processing.base import call_keywords
from hfvlm.processing.batches import is_empty, listed
from hfvlm.processing.media_text import UNCOUNTED, MediaTextProcessor


class VideoTextProcessor(MediaTextProcessor):
    """Base of processors of texts with videos. A subclass counts the tokens of videos in `count_tokens`."""

    modality = "video"
    parts = {"video": "video_feature_extractor", "text": "tokenizer"}
    video_token = "<video>"

    def __init__(
        self, video_feature_extractor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ):
        super().__init__(video_feature_extractor, tokenizer, chat_template=chat_template, **kwargs)
        self.mark_media()

    @property
    def video_processor(self) -> Any:
        """The part for videos, by the name that servers look for."""
        return self.media_processor

    @property
    def video_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    @abstractmethod
    def count_tokens(self, num_frames: Sequence[int]) -> list[int]:
        """Count the placeholders of videos of which these numbers of frames are taken."""

    def _get_num_multimodal_tokens(
        self, video_sizes: Sequence[tuple[int, int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count tokens of videos of these numbers of frames, heights and widths, as vLLM asks a processor to."""
        if further := sorted(set(kwargs) - UNCOUNTED):
            raise TypeError(f"{type(self).__name__} counts the tokens of videos as they are, without {further}.")
        if video_sizes is None:
            return MultiModalData()
        counts = [int(frames) for frames, *_ in video_sizes]
        if self.media_processor.do_sample_frames:
            counts = [min(count, self.media_processor.num_frames) for count in counts]
        return MultiModalData(num_video_tokens=self.count_tokens(counts))

    def count_each(self, media: Sequence[Any], **options: Any) -> list[int]:
        part = self.media_processor
        settings = part.settings_for(options, call_keywords(part))
        return self.count_tokens([len(part.frame_indices(video, settings)) for video in media])

    def read(self, sources: Any, *, allow_urls: Any = False) -> list[Any]:
        return read_videos(sources, allow_urls=allow_urls)

    def are_by_text(self, media: Any, wanted: Sequence[int]) -> bool:
        """Take a list of lists for a list a text only where the counts fit: it may be one video's frames, too."""
        return super().are_by_text(media, wanted) and [len(own) for own in media] == list(wanted)

    def __call__(
        self,
        images: None = None,
        text: Any = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts and their videos as inputs of the model, padded where there are several.

        Args:
            images: none; transformers' order of arguments.
            text: one text or a list, with `video_token` where each video is.
            videos: one video, a list, or a list of lists, one for each text; see `hfvlm.media.read_videos`.
            **kwargs: `return_tensors`, "pt", "np", or None for lists; `max_length`, tokens of the longest row;
                `truncation` to cut longer rows, never in a video: "pictures" drops those that do not fit, and what
                follows them, True refuses; `padding`, `padding_side`, `pad_to_multiple_of` of the tokenizer;
                `video_metadata` of each video, as servers give it, on which nothing here depends; and options of the
                feature extractor.

        Raises:
            ValueError: texts and videos do not fit each other, or a row does not fit `max_length`; or images are
                given: they are videos of one frame, `videos=[[image]]`.
        """
        if not is_empty(images):
            raise ValueError(f"{type(self).__name__} reads videos: give an image as one of a frame, [[image]].")
        metadata = kwargs.pop("video_metadata", None)
        if metadata is not None and len(metadata) != len(listed(videos)):
            raise ValueError(f"video_metadata is of {len(metadata)} videos, and there are {len(listed(videos))}.")
        return self.inputs_for(videos, text, **kwargs)
