"""Channels sampled at a steady rate: audio and motion sensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.media.errors import MediaError

MAX_VALUES = 2**28
MAX_RATE = 1_000_000
MAX_PHASES = 2**25


@dataclass(frozen=True)
class Recording:
    """A recording.

    Args:
        samples: `(channels, N)`, float32.
        sampling_rate: samples a second and channel, in hertz.
    """

    samples: np.ndarray
    sampling_rate: float

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.sampling_rate


def with_rate(source: Any, sampling_rate: Any, name: str = "recording") -> tuple[Any, float | None]:
    """Return the values of a source and its rate, if it has one: of `(values, rate)` or a `datasets` row.

    Raises:
        MediaError: the rate is no number.
    """
    if isinstance(source, tuple) and len(source) == 2 and _is_number(source[1]):
        return source[0], as_rate(source[1], name)
    if isinstance(source, Mapping) and "array" in source:
        source, sampling_rate = source["array"], source.get("sampling_rate", sampling_rate)
    return source, None if sampling_rate is None else as_rate(sampling_rate, name)


def as_rate(value: Any, name: str) -> float:
    """Return a sampling or frame rate as a float."""
    if isinstance(value, bool) or not _is_number(value):
        raise MediaError(f"{name}: {str(value)[:40]!r} is no rate; it must be a number of hertz.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Fraction | np.number) or (
        isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0
    )


def check_size(values: int, rate: float | None, name: str) -> None:
    """Refuse recordings that are too long, and rates that are none."""
    if values > MAX_VALUES:
        raise MediaError(f"{name}: {values} samples; more than {MAX_VALUES} are refused. Cut it into parts.")
    if rate is not None and not 0 < rate <= MAX_RATE:
        raise MediaError(f"{name}: a sampling rate of {rate:g} Hz is none; it must be in 0..{MAX_RATE} Hz.")


def resample(samples: Tensor, old: float, new: float) -> Tensor:
    """Resample `(channels, N)` at `old` hertz -> `(channels, ceil(N * new / old))` at `new` hertz.

    A sinc with a Hann window over six zero crossings and a roll-off of 0.99: equal to torchaudio 2.11's
    `functional.resample`, through which the originals' recordings went.
    """
    ratio = Fraction(new) / Fraction(old)
    if ratio.numerator * ratio.denominator > MAX_PHASES:  # rates with no common measure, such as 198.37 Hz
        ratio = ratio.limit_denominator(1000)
    up, down = ratio.numerator, ratio.denominator
    if up == down:
        return samples
    kernels, width = _sinc_kernels(down, up, samples.dtype)
    padded = F.pad(samples, (width, width + down))
    resampled = F.conv1d(padded[:, None], kernels, stride=down).transpose(1, 2).flatten(1)
    return resampled[:, : ceil(up * samples.shape[1] / down)]


@lru_cache(maxsize=16)
def _sinc_kernels(down: int, up: int, dtype: torch.dtype, zeros: int = 6) -> tuple[Tensor, int]:
    """Return a filter for each of the `up` phases, `(up, 1, 2 * width + down)`, and the width."""
    cutoff = min(down, up) * 0.99
    width = ceil(zeros * down / cutoff)
    taps = torch.arange(-width, width + down, dtype=dtype) / down
    phases = torch.arange(0, -up, -1, dtype=dtype)[:, None] / up
    time = ((phases + taps) * cutoff).clamp(-zeros, zeros)
    window = torch.cos(time * torch.pi / zeros / 2) ** 2
    angle = time * torch.pi
    sinc = torch.where(angle == 0, torch.ones_like(angle), angle.sin() / angle)
    return (sinc * (window * (cutoff / down)))[:, None], width
