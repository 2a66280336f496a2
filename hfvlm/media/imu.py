"""Traces of inertial measurement units: how something moved."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hfvlm.media.errors import MediaError
from hfvlm.media.recordings import Recording, check_size, resample, with_rate
from hfvlm.media.sources import AllowUrls, check_finite, fetched, name_of, read_array, read_batch, to_numpy

CHANNELS = 6
# Units that fit no wearable: 16 g and 2,000 degrees a second are 157 m/s^2 and 35 rad/s.
MAX_MAGNITUDE = 1e4


def read_imus(sources: Any, *, sampling_rate: float | None = None, allow_urls: AllowUrls = False) -> list[Recording]:
    """A batch of traces: a list, or an array of (B, 6, N). Anything else is a batch of one; see `read_imu`."""
    batch = sources if isinstance(sources, list) else [sources]
    if getattr(sources, "ndim", 2) == 3:
        batch = list(sources)
    return read_batch(read_imu, batch, sampling_rate=sampling_rate, allow_urls=allow_urls)


def read_imu(
    source: Any,
    *,
    sampling_rate: float | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> Recording:
    """One trace of six channels, in this order and these units, as Ego4D has them:

    accelerometer x, y, z in m/s^2, gravity included; gyroscope x, y, z in rad/s.

    Example:
        >>> read_imu((trace, 200))  # (6, N) or (N, 6) at 200 Hz
        >>> read_imu({"accelerometer": a, "gyroscope": w, "sampling_rate": 200})  # (N, 3) or (3, N) each
        >>> read_imu("walk.npy", sampling_rate=200)

    Args:
        source: an array, a tensor, a nested list or a `.npy` file (a path, bytes or an open file) of (6, N) or (N, 6),
            with its rate: as `(array, rate)`, as a row with "array" and "sampling_rate", or with `sampling_rate`; or a
            row with "accelerometer", "gyroscope" and "sampling_rate".
        sampling_rate: of arrays that bring none, in hertz.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
    """
    name = name_of("IMU trace", source, index)
    if isinstance(source, Mapping) and "accelerometer" in source:
        sensors = [
            _channels_first(source.get(sensor), 3, f"{name}, {sensor}") for sensor in ("accelerometer", "gyroscope")
        ]
        if sensors[0].shape != sensors[1].shape:
            raise MediaError(f"{name}: accelerometer {sensors[0].shape} and gyroscope {sensors[1].shape} differ.")
        values, rate = np.concatenate(sensors), source.get("sampling_rate", sampling_rate)
    else:
        values, rate = with_rate(source, sampling_rate)
    array = read_array(fetched(values, name, allow_urls), name)
    if array is None:
        raise MediaError(f"{name}: a trace is an array with its rate, or a .npy file.")
    if rate is None:
        raise MediaError(f"{name}: an array has no sampling rate of its own: pass (array, rate) or sampling_rate=.")
    check_size(array.size, rate, name)
    samples = _channels_first(array, CHANNELS, name)
    check_finite(samples, name, "Cut those samples out, or interpolate them.")
    if np.abs(samples).max() > MAX_MAGNITUDE:
        raise MediaError(f"{name}: values up to {np.abs(samples).max():g}; pass m/s^2 and rad/s, not raw counts.")
    return Recording(np.ascontiguousarray(samples, dtype=np.float32), rate)


def _channels_first(values: Any, channels: int, name: str) -> np.ndarray:
    array = to_numpy(values)
    if array.ndim == 2 and array.shape[0] != channels and array.shape[1] == channels:
        array = array.T
    if array.ndim != 2 or array.shape[0] != channels:
        raise MediaError(f"{name}: shape {array.shape} is not ({channels}, N) or (N, {channels}).")
    return array


def windows(trace: Recording, sampling_rate: float, length: int, count: int) -> torch.Tensor:
    """`count` windows of `length` samples at `sampling_rate`, spread evenly from the start of a trace to its end; one
    alone is from the middle -> `(count, 6, length)`. A shorter trace goes on with its last sample.
    """
    samples = torch.from_numpy(trace.samples)
    if trace.sampling_rate != sampling_rate:
        # The filter fades to 0 at both ends; around the mean, gravity does not fade with it.
        mean = samples.mean(dim=1, keepdim=True)
        samples = resample(samples - mean, trace.sampling_rate, sampling_rate) + mean
    spare = max(samples.shape[1] - length, 0)
    starts = [spare // 2] if count == 1 else [spare * i // (count - 1) for i in range(count)]
    padding = samples[:, -1:].expand(-1, max(length - samples.shape[1], 0))
    samples = torch.cat([samples, padding], dim=1)
    return torch.stack([samples[:, start : start + length] for start in starts])
