"""Rows of MERLOT Reserve's joint encoder: text, with audio in its place, before the frames.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/modeling.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

from hfvlm.models.merlot_reserve.configuration_merlot_reserve import HfvlmMERLOTReserveVisionConfig
from hfvlm.models.merlot_reserve.encoders import grid_coordinates
from hfvlm.modules.embeddings import padded_positions

# What segments and positions of tokens are divided by.
MOST_SEGMENTS, MOST_TOKENS = 16.0, 1024.0


@dataclass
class JointInputs:
    """Rows of the joint encoder.

    Args:
        x: `(B, N, D)`.
        coordinates: `(B, N, 4)`, row and column in a frame, segment, position in the text.
        valid: `(B, N)`, False for padding.
        videos: `(B, N)`, the video that each token is of, where a row has several; tokens attend to their own alone.
    """

    x: Tensor
    coordinates: Tensor
    valid: Tensor
    videos: Tensor | None = None

    def padded(self, length: int) -> "JointInputs":
        """Return the rows with padding up to a length."""
        more = length - self.x.shape[1]
        videos = self.valid.new_zeros(self.valid.shape, dtype=torch.long) if self.videos is None else self.videos
        x, coordinates = (F.pad(each, (0, 0, 0, more)) for each in (self.x, self.coordinates))
        return JointInputs(x, coordinates, F.pad(self.valid, (0, more)), F.pad(videos, (0, more), value=-1))

    def mask(self, config: Any) -> Any:
        """Make the attention mask in the form that `config`'s attention takes."""
        videos, own = self.videos, None
        if videos is not None:

            def own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return videos[batch, query] == videos[batch, key]

        return create_bidirectional_mask(
            config=config, inputs_embeds=self.x, attention_mask=self.valid.long(), and_mask_function=own
        )


def concatenated(parts: list[JointInputs]) -> JointInputs:
    """Put rows of several lengths into one batch."""
    longest = max(part.x.shape[1] for part in parts)
    rows = [part.padded(longest) for part in parts]
    videos = None
    if any(part.videos is not None for part in parts):
        videos = torch.cat([row.videos for row in rows if row.videos is not None])
    x, coordinates, valid = (torch.cat([getattr(r, name) for r in rows]) for name in ("x", "coordinates", "valid"))
    return JointInputs(x, coordinates, valid, videos)


def arranged(
    x: Tensor,
    valid: Tensor,
    config: HfvlmMERLOTReserveVisionConfig,
    segment_ids: Tensor | None = None,
    image_tokens: Tensor | None = None,
    video_ids: Tensor | None = None,
    *,
    first_segment: int = 0,
    grid: tuple[int, int] | None = None,
) -> JointInputs:
    """Put embedded text and audio before the frames.

    Args:
        x: `(B, N, D)`, texts with audio in their places.
        valid: `(B, N)`, False for padding.
        config: of the frames.
        segment_ids: `(B, N)`, the segment of each token; by default 0.
        image_tokens: `(B, S, T, D)`, frames of the segments from `first_segment` on.
        video_ids: `(B, S)`, the video of each segment, where rows hold several.
        first_segment: of the frames.
        grid: rows and columns of a frame's tokens; by default those of `image_size`.
    """
    segments = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device) if segment_ids is None else segment_ids
    place = (1 + padded_positions(valid)) / MOST_TOKENS
    zero = torch.zeros_like(place)
    coordinates = torch.stack([zero, zero, segments / MOST_SEGMENTS, place], dim=-1)
    if image_tokens is not None:
        number, size = image_tokens.shape[1:3]
        shown = torch.arange(number, device=x.device).repeat_interleave(size)
        image = F.pad(image_coordinates(config, size, grid, x.device).repeat(number, 1), (0, 2))
        image[:, 2] = (shown + first_segment) / MOST_SEGMENTS
        x = torch.cat([x, image_tokens.flatten(1, 2).to(x.dtype)], dim=1)
        coordinates = torch.cat([coordinates, image.expand(len(x), -1, -1)], dim=1)
        valid = F.pad(valid, (0, number * size), value=True)
        segments = torch.cat([segments, shown.expand(len(x), -1)], dim=1)
    videos = None if video_ids is None else video_ids.gather(1, segments.clamp_min(0))
    return JointInputs(x, coordinates, valid, videos)


def image_coordinates(
    config: HfvlmMERLOTReserveVisionConfig, size: int, grid: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """Return the coordinates of a frame's tokens.

    Raises:
        ValueError: there is another number of them.
    """
    rows, columns = grid or tuple(edge // config.pool_size for edge in config.grid)
    if rows * columns != size:
        raise ValueError(
            f"Frames have {size} tokens, a grid of {rows} x {columns} has {rows * columns}: prepare them at "
            f"image_size {config.image_size}."
        )
    return grid_coordinates(rows, columns, device)


def with_audio(x: Tensor, here: Tensor, audio_tokens: Tensor, audio_ids: Tensor | None) -> Tensor:
    """Put tokens of audio, `(B, A, K, D)`, into `(B, N, D)` where `here`, `(B, N)`, is true: by default K of each clip
    in order, or of the clips that `audio_ids`, `(B, N)`, name."""
    count, (clips, size) = here.long().cumsum(dim=1) - 1, audio_tokens.shape[1:3]
    which = count.div(size, rounding_mode="floor") % clips if audio_ids is None else audio_ids
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    # The original counts on through the whole row: a clip's tokens are expected in one piece.
    audio = audio_tokens[rows, which.clamp(0, clips - 1), count.clamp_min(0) % size]
    return torch.where(here.unsqueeze(-1), audio.to(x.dtype), x)
