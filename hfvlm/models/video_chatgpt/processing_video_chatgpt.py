"""Inputs of Video-ChatGPT.

Source: https://github.com/mbzuai-oryx/Video-ChatGPT at 659e04b: eval/model_utils.py, inference.py, train/train.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch.nn import functional as F

from hfvlm.media import read_video
from hfvlm.media.video import Video, video_batch
from hfvlm.models.video_chatgpt.configuration_video_chatgpt import count_tokens
from hfvlm.models.video_chatgpt.conversations import CONVERSATIONS
from hfvlm.processing.conversations import Conversation, Encoder
from hfvlm.processing.features import HfvlmFeatureExtractor
from hfvlm.processing.images import CLIP_MEAN, CLIP_STD
from hfvlm.processing.protection import Protected
from hfvlm.processing.settings import Deviations, Flag, Frames, Means, square, string, whole
from hfvlm.processing.tokenization import PieceTokenizer
from hfvlm.processing.video_text import VideoTextProcessor


class HfvlmVideoChatGPTFeatureExtractor(HfvlmFeatureExtractor):
    """Prepares videos, as `hfvlm.media.read_video` takes them, as `pixel_values_videos`, `(B, T, 3, H, W)`, and how
    many of the T frames each has, `num_frames`, `(B,)`.

    A video is cut into as many parts as frames are taken, the middle one of each. Frames are squashed to the tower's
    square, each pixel the nearest of the frame's. Shorter videos are padded at their end.

    Example:
        >>> extractor("birds.mp4", return_tensors="pt")["pixel_values_videos"].shape
        (1, 100, 3, 224, 224)

    Args:
        size: the tower's `{"height", "width"}` in pixels, or one edge.
        num_frames: taken of a video; of a shorter one as many as it has.
        do_sample_frames: False takes the frames as they are.
        image_mean: of each colour.
        image_std: of each colour.
    """

    model_input_names = ["pixel_values_videos", "num_frames"]
    KIND = "video"
    split = staticmethod(video_batch)

    size: Annotated[dict[str, int], square] = {"height": 224, "width": 224}
    num_frames: Frames = 100
    do_sample_frames: Flag = True
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD

    def read(self, source: Any, **options: Any) -> Video:
        return read_video(source, **options)

    def frame_indices(self, video: Video, settings: Mapping[str, Any]) -> list[int]:
        """Choose the frames that are taken."""
        if not settings["do_sample_frames"]:
            return list(range(len(video)))
        count = min(len(video), settings["num_frames"])
        part = (len(video) - 1) / count
        # Halves are rounded to even, and the last frame of a video is taken where it is the only one.
        return [(round(part * i) + round(part * (i + 1))) // 2 for i in range(count)]

    def features(self, medium: Video, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare frames (T, 3, H, W), float32."""
        indices = self.frame_indices(medium, settings)
        distinct = sorted(set(indices))
        size = (settings["size"]["height"], settings["size"]["width"])
        # One at a time: large frames become small ones.
        frames = torch.stack(
            [
                frame if frame.shape[1:] == size else F.interpolate(frame[None], size=size, mode="nearest")[0]
                for frame in medium.tensors(distinct)
            ]
        )
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        row_of = {index: i for i, index in enumerate(distinct)}
        return ((frames / 255 - mean) / std)[[row_of[index] for index in indices]].numpy()

    def batch(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        counts = [len(array) for array in arrays]
        padded = [np.pad(a, ((0, max(counts) - len(a)), (0, 0), (0, 0), (0, 0))) for a in arrays]
        return {"pixel_values_videos": np.stack(padded), "num_frames": np.array(counts)}


class HfvlmVideoChatGPTTokenizer(PieceTokenizer):
    """The language model's own, with a placeholder for videos and tokens around them."""


class HfvlmVideoChatGPTProcessor(VideoTextProcessor):
    """Conversations about videos in Video-ChatGPT's format.

    Args:
        video_feature_extractor: of the videos.
        tokenizer: of the texts.
        chat_template: by default the conversation's.
        conversation: the authors' name of the conversation of prompts; by default that of the release.
        training_conversation: of the one in which they train; `labels` follow it.
        video_patch: token that is the placeholder.
        video_start: token before each video, of checkpoints trained with `mm_use_vid_start_end`.
        video_end: token after each video.
        patch_size: of the vision tower, in pixels.
        temporal_tokens: as in the model's configuration.
    """

    media_mark = AddedToken("<video>", normalized=False)
    conversations = CONVERSATIONS
    default_conversation = "video-chatgpt_v1"
    video_patch: Annotated[str, string]
    video_start: Annotated[str, string]
    video_end: Annotated[str, string]
    patch_size: Annotated[int, whole(1, 2**10)]
    temporal_tokens: Annotated[int, whole(1, 2**16)]

    def __init__(  # noqa: PLR0913 (what is saved with a processor are the arguments by their names)
        self,
        video_feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        conversation: str | None = None,
        training_conversation: str = "vicuna_v1_1",
        video_patch: str = "<vid_patch>",
        video_start: str = "<vid_start>",
        video_end: str = "<vid_end>",
        patch_size: int = 14,
        temporal_tokens: int = 100,
        **kwargs: Any,
    ):
        conversation = conversation or self.default_conversation
        for name in (conversation, training_conversation):
            if name not in self.conversations:
                raise ValueError(f"A conversation is one of {', '.join(self.conversations)}, not {name!r}.")
        self.conversation, self.training_conversation = conversation, training_conversation
        self.set_arguments(video_patch=video_patch, video_start=video_start, video_end=video_end)
        self.set_arguments(patch_size=patch_size, temporal_tokens=temporal_tokens)
        chat_template = chat_template or self.style.chat_template()
        super().__init__(video_feature_extractor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def style(self) -> Conversation:
        return self.conversations[self.conversation]

    @property
    def stop_strings(self) -> list[str]:
        return list(self.style.stop)

    @property
    def turn_marks(self) -> set[str]:
        return self.style.marks | self.conversations[self.training_conversation].marks

    @property
    def video_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.video_patch)

    def count_tokens(self, num_frames: Sequence[int]) -> list[int]:
        edge = self.media_processor.size["height"] // self.patch_size
        return [count_tokens(count, (edge, edge), self.temporal_tokens) for count in num_frames]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        marked = f"{self.video_start}{self.video_token}{self.video_end}"
        return super().encode(text.replace(self.video_token, marked), add_special_tokens=add_special_tokens)

    def encode_trained(self, text: str) -> list[int]:
        """Encode a text as in training, where the authors' other tokenizer drops the blanks around a video."""
        return self.encode(re.sub(rf"\s*({re.escape(self.video_token)})\s*", r"\1", text))

    def labelled(self, messages: Protected) -> tuple[list[int], list[int]]:
        style = self.conversations[self.training_conversation]
        system = [message for message in messages if message["role"] == "system"]
        turns = messages[len(system) :]
        if turns and turns[0]["role"] == "assistant":  # an answer to nothing
            turns = turns[1:]
        text = self.render([*system, *turns], chat_template=style.chat_template())
        ids = self.encode_trained(text)
        return ids, style.labels(text, (), ids, Encoder(self.encode_trained, self.tokenizer.legacy))
