"""Waveforms to spectra over time, in the arithmetic of the front ends that the originals used."""

from functools import lru_cache
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from hfvlm.media.errors import MediaError

FRAME_SECONDS, SHIFT_SECONDS = 0.025, 0.010
LOWEST_HERTZ = 20.0
PREEMPHASIS = 0.97


def kaldi_fbank(waveform: Tensor, sampling_rate: int, num_mel_bins: int) -> Tensor:
    """Compute Kaldi's log mel filter bank energies of `(N,)` samples -> `(frames, num_mel_bins)`.

    Frames of 25 ms every 10 ms that lie inside the waveform, without their mean, with a pre-emphasis of 0.97 and a
    Hann window, and no dither: equal to torchaudio 2.11's `compliance.kaldi.fbank(window_type="hanning", dither=0.0,
    htk_compat=True, use_energy=False)`.

    Raises:
        MediaError: the waveform is shorter than a frame.
    """
    size, shift = int(sampling_rate * FRAME_SECONDS), int(sampling_rate * SHIFT_SECONDS)
    if len(waveform) < size:
        raise MediaError(
            f"Audio of {len(waveform) / sampling_rate * 1000:.3g} ms is less than a frame, too short: at least "
            f"{FRAME_SECONDS * 1000:.0f} ms are needed."
        )
    frames = waveform.unfold(0, size, shift)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = F.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    frames = (frames - PREEMPHASIS * before) * torch.hann_window(size, periodic=False, dtype=frames.dtype)
    padded = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(F.pad(frames, (0, padded - size))).abs().pow(2.0)
    energies = power @ _mel_triangles(num_mel_bins, padded, sampling_rate).to(power.dtype).t()
    return energies.clamp_min(torch.finfo(torch.float32).eps).log()


@lru_cache(maxsize=16)
def _mel_triangles(bins: int, size: int, sampling_rate: int) -> Tensor:
    """Return `(bins, size / 2 + 1)` triangles of equal width in mel, from 20 Hz to half the sampling rate."""
    low, high = (1127.0 * log(1.0 + hertz / 700.0) for hertz in (LOWEST_HERTZ, sampling_rate / 2))
    step = (high - low) / (bins + 1)
    left, centre, right = (low + (torch.arange(bins)[:, None] + corner) * step for corner in (0.0, 1.0, 2.0))
    mel = 1127.0 * (1.0 + sampling_rate / size * torch.arange(size / 2) / 700.0).log()
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    # Kaldi leaves out the highest frequency.
    return F.pad(torch.minimum(rising, falling).clamp_min(0), (0, 1))


@lru_cache(maxsize=16)
def _slaney_triangles(bins: int, size: int, sampling_rate: int, lowest: float, highest: float) -> Tensor:
    """Return `(size / 2 + 1, bins)` triangles of equal area, as wide as Slaney's mel scale has them."""
    filters = mel_filter_bank(size // 2 + 1, bins, lowest, highest, sampling_rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


def slaney_mel(
    waveform: Tensor, sampling_rate: int, num_mel_bins: int, size: int, shift: int, limits: tuple[float, float]
) -> Tensor:
    """Compute mel energies of `(N,)` samples -> `(1 + N // shift, num_mel_bins)`.

    Frames of `size` samples, centred on every `shift`-th, with silence around the waveform, under a symmetric Hann
    window: equal to librosa 0.10's `feature.melspectrogram` with SciPy's `signal.windows.hann`, filters from the lower
    to the upper of `limits`, in hertz.
    """
    window = torch.hann_window(size, periodic=False, dtype=torch.float64).to(waveform.dtype)
    spectrum = torch.stft(waveform, size, shift, window=window, center=True, pad_mode="constant", return_complex=True)
    filters = _slaney_triangles(num_mel_bins, size, sampling_rate, *limits)
    return spectrum.abs().square().t() @ filters.to(waveform.dtype)
