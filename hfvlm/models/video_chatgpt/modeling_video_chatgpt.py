"""Video-ChatGPT (https://arxiv.org/abs/2306.05424; github.com/mbzuai-oryx/Video-ChatGPT at 659e04b)."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ProjectedModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.scoring import TextScorer
from hfvlm.models.video_chatgpt.configuration_video_chatgpt import HfvlmVideoChatGPTConfig
from hfvlm.modules.parts import in_parts


class HfvlmVideoChatGPTForConditionalGeneration(ProjectedModel):
    """A language model that attends to a video as the average patch of each frame, and the average frame."""

    config: HfvlmVideoChatGPTConfig
    input_modalities = ["video", "text"]
    media_inputs = {"video": ("pixel_values_videos", "num_frames")}

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], num_frames: Any = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Project videos to an output whose `pooler_output` has one `(tokens, hidden_size)` tensor a video.

        Args:
            pixel_values_videos: `(videos, T, 3, H, W)`, padded at the end, or a list with each video's frames.
            num_frames: `(videos,)`, how many frames each has; without it, all.
        """
        videos = list(pixel_values_videos)
        if num_frames is not None:
            videos = [video[: int(count)] for video, count in zip(videos, num_frames, strict=True)]
        layer = self.config.vision_feature_layer
        vision = in_parts(self.vision_model, torch.cat(videos), until=layer, **kwargs)
        patches = vision.last_hidden_state[:, 1:].split([video.shape[0] for video in videos])
        averages = [average(video, self.config.temporal_tokens) for video in patches]
        rows = self.projector(torch.cat(averages)).split([video.shape[0] for video in averages])
        return media_features(vision, rows)


class HfvlmVideoChatGPTForSequenceClassification(TextScorer, HfvlmVideoChatGPTForConditionalGeneration):
    """A reward, or other scores, of answers about videos."""


def average(patches: Tensor, temporal_tokens: int) -> Tensor:
    """Average the patches of a video, (T, N, D) -> (max(T, temporal_tokens) + N, D).

    First each frame's average over its patches, and zeros for the frames that it lacks, to which the language model
    attends as to the others; then each patch's average over the frames.
    """
    missing = max(temporal_tokens - patches.shape[0], 0)
    return torch.cat([F.pad(patches.mean(dim=1), (0, 0, 0, missing)), patches.mean(dim=0)])
