"""Segments of videos as MERLOT Reserve takes them: when they are, and their audio.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/preprocess.py and finetune/tvqa/prep_data.py.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.media import MediaError
from hfvlm.media.spectrograms import slaney_mel
from hfvlm.media.video import Video

# Of the spectrograms: hertz that the filters are made for, samples of a frame and between two, filters' limits, what
# is added before the logarithm.
RATE, SIZE, SHIFT, LIMITS, FLOOR = 22_050, 1536, 588, (20.0, 11_025.0), 0.1
CLIPS = 3
# Of TVQA, whose spectrograms leave nothing out between clips, and whose frames are three a second.
TVQA_SEGMENTS, TVQA_SECONDS, TVQA_RATE, TVQA_FRAMES = 7, 14 / 3, 22_620, 3


def centred_in_silence(waveform: Tensor, length: int) -> Tensor:
    """Put silence around `(N,)` samples up to a length, of an odd number one more after them."""
    missing = max(length - len(waveform), 0)
    return torch.nn.functional.pad(waveform, (missing // 2, missing - missing // 2))


def spectrograms(
    waveform: Tensor, *, num_frames: int = 60, num_mel_bins: int = 64, gap: int = 2, playback_speed: int = 1
) -> Tensor:
    """Compute the three clips of a segment's `(N,)` samples -> `(3, num_frames, num_mel_bins + 1)`.

    Args:
        waveform: in -1..1, at 22,050 Hz.
        num_frames: of a clip.
        num_mel_bins: of the log mel spectrogram; the last channel is the playback speed.
        gap: frames that are left out before, between and after the clips.
        playback_speed: times as many samples a frame.

    Raises:
        MediaError: there are too few samples or too many.
    """
    wanted, shift = CLIPS * num_frames + (CLIPS + 1) * gap, SHIFT * playback_speed
    found = 1 + len(waveform) // shift
    if found != wanted:
        raise MediaError(
            f"{len(waveform)} samples at {RATE} Hz make {found} frames, {wanted} are needed: "
            f"{(wanted - 1) * shift} to {wanted * shift - 1} samples."
        )
    mel = slaney_mel(waveform, RATE, num_mel_bins, SIZE * playback_speed, shift, LIMITS)
    features = torch.nn.functional.pad((mel + FLOOR).log() - log(FLOOR), (0, 1), value=float(playback_speed))
    starts = [gap + i * (gap + num_frames) for i in range(CLIPS)]
    return torch.stack([features[start : start + num_frames] for start in starts])


def by_peak(waveform: Tensor) -> Tensor:
    """Scale `(N,)` samples by the largest, as the original scales 16-bit integers."""
    return waveform / waveform.abs().max().clamp_min(1 / 32768)


@dataclass
class ReserveSegment:
    """A piece of a video.

    Args:
        frame: an image, as `hfvlm.media.read_image` takes it.
        text: a text or ids that stand for the piece; None for its audio.
        clips: `(3, num_frames, num_mel_bins + 1)`, its audio.
        start: in the video, in seconds.
        end: in seconds.
    """

    frame: Any
    text: str | Sequence[int] | None = None
    clips: Any = None
    start: float = 0.0
    end: float = 0.0


@dataclass
class Recorded:
    """A video and its audio.

    Args:
        video: the video.
        waveform: `(N,)`, its audio.
        rate: of the waveform, in hertz.
        seconds_of_audio: how long that was.
    """

    video: Video
    waveform: Tensor
    rate: float
    seconds_of_audio: float

    @property
    def seconds(self) -> float:
        """How long there are both."""
        return min(self.video.seconds, self.seconds_of_audio)

    @property
    def rate_of_frames(self) -> float:
        """Frames a second."""
        return len(self.video) / self.video.seconds

    def frames(self, places: Sequence[int]) -> np.ndarray:
        """Decode frames by their numbers, `(n, H, W, 3)`; the last one for those beyond."""
        return self.video.frames([min(max(place, 0), len(self.video) - 1) for place in places])

    def piece(self, start: float, end: float) -> Tensor:
        """Cut the audio from `start` to `end`, in seconds, with silence where there is none."""
        first, last = int(self.rate * start), int(self.rate * end)
        # A time before the video is cut upwards, so that one sample more is missing.
        before = 1 - first if first < 0 else 0
        found = self.waveform[max(first, 0) : max(last, 0)]
        missing = max(last, 0) - max(first, 0) - len(found)
        return torch.nn.functional.pad(found, (before, missing))


def around(
    span: tuple[float, float] | None, seconds: float, number: int = TVQA_SEGMENTS
) -> tuple[list[float], tuple[float, float]]:
    """Return when TVQA's segments around a moment begin, in seconds, and the moment in shares of their whole time.

    Args:
        span: when the moment begins and ends; None for the whole video.
        seconds: that the video lasts.
        number: of segments, at most.

    Raises:
        ValueError: the span is none of the video.
    """
    check_integer("num_segments", number)
    latest = max(round(seconds * TVQA_FRAMES) - 1, 0) / TVQA_FRAMES
    first, last = (0.0, latest) if span is None else (check_number("span", each, 0) for each in span)
    if not first <= last or first > seconds:
        raise ValueError(f"span {span} is no time of a video of {seconds:g} s.")
    first, last = min(first, latest), min(last, latest)
    middle = round((first + last) / 2 * TVQA_FRAMES) / TVQA_FRAMES
    begin = middle - TVQA_SECONDS / 2
    starts = [begin]
    for step in range(1, number):
        for move in (-step * TVQA_SECONDS, step * TVQA_SECONDS):
            start, end = (round((at + move) * TVQA_FRAMES) / TVQA_FRAMES for at in (begin, begin + TVQA_SECONDS))
            if end >= 0 and start <= latest and len(starts) < number:
                starts.append(start)
    starts.sort()
    whole = starts[-1] + TVQA_SECONDS - starts[0]
    return starts, ((first - starts[0]) / whole, (last - starts[0]) / whole)


def middles(starts: Sequence[float], video: Video) -> list[float]:
    """Return the times of the segments' frames, which are the nearest of three a second."""
    count = max(round(video.seconds * TVQA_FRAMES), 1)
    places = [round((start + TVQA_SECONDS / 2) * TVQA_FRAMES) for start in starts]
    return [min(max(place, 0), count - 1) / TVQA_FRAMES for place in places]


def texts_between(starts: Sequence[float], subtitles: Sequence[Mapping[str, Any]]) -> list[str]:
    """Join the subtitles whose middle is in each segment.

    Raises:
        ValueError: one has no start, end or text.
    """
    limits = [*starts, starts[-1] + TVQA_SECONDS]
    texts: list[list[str]] = [[] for _ in starts]
    for subtitle in subtitles:
        if missing := [name for name in ("start", "end", "text") if subtitle.get(name) is None]:
            raise ValueError(f"subtitles: one has no {', '.join(missing)}; each needs start, end and text.")
        place = bisect_left(limits, (float(subtitle["start"]) + float(subtitle["end"])) / 2)
        if 0 < place <= len(starts):
            texts[place - 1].append(subtitle["text"])
    return [" ".join(own).replace("\n", " ") for own in texts]
