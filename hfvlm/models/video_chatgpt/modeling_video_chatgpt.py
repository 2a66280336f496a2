"""Video-ChatGPT (https://arxiv.org/abs/2306.05424; github.com/mbzuai-oryx/Video-ChatGPT at 659e04b)."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.video_chatgpt.configuration_video_chatgpt import HfvlmVideoChatGPTConfig
from hfvlm.modules.parts import in_parts
from hfvlm.modules.projection import Projector


class HfvlmVideoChatGPTForConditionalGeneration(ImageTextModel):
    """A language model that reads a film as the average patch of each frame, and the average frame."""

    config: HfvlmVideoChatGPTConfig
    input_modalities = ["video", "text"]
    media_inputs = {"video": ("pixel_values_videos", "num_frames")}

    def __init__(self, config: HfvlmVideoChatGPTConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = HfvlmCLIPVisionModel._from_config(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, width, config.projector_depth)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_unread()

    @property
    def unread_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unread(self.config.vision_feature_layer)]

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], num_frames: Any = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """Films -> an output whose `pooler_output` has one `(tokens, hidden_size)` tensor a film.

        Args:
            pixel_values_videos: `(films, T, 3, H, W)`, padded at the end, or a list with each film's frames.
            num_frames: `(films,)`, how many frames each has; without it, all.
        """
        films = list(pixel_values_videos)
        if num_frames is not None:
            films = [film[: int(count)] for film, count in zip(films, num_frames, strict=True)]
        layer = self.config.vision_feature_layer
        vision = in_parts(self.vision_model, torch.cat(films), until=layer, **kwargs)
        patches = vision.last_hidden_state[:, 1:].split([film.shape[0] for film in films])
        averages = [average(film, self.config.temporal_tokens) for film in patches]
        rows = self.projector(torch.cat(averages)).split([film.shape[0] for film in averages])
        return media_features(vision, rows)

    def token_count_fields(self) -> str:
        return f"{super().token_count_fields()}, temporal_tokens {self.config.temporal_tokens}"


def average(patches: Tensor, temporal_tokens: int) -> Tensor:
    """The patches of a film, (T, N, D) -> (max(T, temporal_tokens) + N, D).

    First each frame's average over its patches, and zeros for the frames that it lacks, which the language model reads
    like the others; then each patch's average over the frames.
    """
    missing = max(temporal_tokens - patches.shape[0], 0)
    return torch.cat([F.pad(patches.mean(dim=1), (0, 0, 0, missing)), patches.mean(dim=0)])
