"""Traces of inertial measurement units: accelerometer and gyroscope."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hfvlm.media.errors import MediaError
from hfvlm.media.recordings import Recording, check_size, resample, with_rate
from hfvlm.media.sources import (
    AllowUrls,
    as_batch,
    check_finite,
    fetched,
    from_tensor,
    logger,
    name_of,
    read_array,
    read_batch,
)
from hfvlm.media.tables import Table, read_table

CHANNELS = 6
SENSORS = ("accelerometer", "gyroscope")
GRAVITY = 9.80665
# One of each unit in m/s^2, in rad/s, and in seconds.
UNITS: dict[str, dict[str, float]] = {
    "accelerometer": {"m/s^2": 1.0, "g": GRAVITY, "mg": GRAVITY / 1000},
    "gyroscope": {"rad/s": 1.0, "deg/s": np.pi / 180, "mdeg/s": np.pi / 180_000},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
}
DEFAULTS = {"accelerometer": "m/s^2", "gyroscope": "rad/s", "time": "s"}
# Units that fit no wearable: 16 g and 2,000 degrees a second are 157 m/s^2 and 35 rad/s.
MAX_MAGNITUDE = 1e4
MAX_RADIANS = 35.0
# Median accelerations of devices that people carry, gravity included, in m/s^2.
USUAL = (6.0, 16.0)
# Usual names of columns: ax, acc_x, accel.x, accelerometer_x, linear_acceleration.x; gx, gyro_x, ...
USUAL_NAMES = {
    "accelerometer": r"(?:a|acc|accel|accelerometer|acceleration|linear_acceleration)",
    "gyroscope": r"(?:g|w|gyr|gyro|gyroscope|angular_velocity)",
}
# By how much a step between samples may differ from the median one.
MAX_JITTER = 0.5


def imu_batch(sources: Any) -> list[Any]:
    """Return a batch of traces as single sources."""
    return list(sources) if getattr(sources, "ndim", 2) == 3 else as_batch(sources)


def read_imus(
    sources: Any,
    *,
    sampling_rate: float | None = None,
    columns: Any = None,
    units: Any = None,
    allow_urls: AllowUrls = False,
) -> list[Recording]:
    """Read a batch of traces: a list, a generator, a column, or an array of (B, 6, N). Anything else is a batch of
    one; see `read_imu`."""
    options = {"sampling_rate": sampling_rate, "columns": columns, "units": units, "allow_urls": allow_urls}
    return read_batch(read_imu, imu_batch(sources), **options)


def read_imu(
    source: Any,
    *,
    sampling_rate: float | None = None,
    columns: Sequence[str] | Mapping[str, Any] | None = None,
    units: Sequence[str] | Mapping[str, str] | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> Recording:
    """Read one trace of six channels, in this order and these units, as Ego4D has them:

    accelerometer x, y, z in m/s^2, gravity included; gyroscope x, y, z in rad/s. Values in other units are converted
    where `units` names them. A warning is logged where gravity shows that units or the order are others.

    Example:
        >>> read_imu((trace, 200))  # (6, N) or (N, 6) at 200 Hz
        >>> read_imu({"accelerometer": a, "gyroscope": w, "sampling_rate": 200})  # (N, 3) or (3, N) each
        >>> read_imu("walk.npy", sampling_rate=200)
        >>> read_imu("walk.csv", columns=["ax", "ay", "az", "gx", "gy", "gz"], units=("g", "deg/s"), sampling_rate=50)
        >>> read_imu(frame, columns={"accelerometer": ["x", "y", "z"], "gyroscope": ["u", "v", "w"], "time": "t"})

    Args:
        source: an array, a tensor, a nested list or a `.npy` file (a path, bytes or an open file) of (6, N) or (N, 6),
            a CSV file or a data frame, with its rate: as `(array, rate)`, as a row with "array" and "sampling_rate",
            or with `sampling_rate`; or a row with "accelerometer", "gyroscope" and "sampling_rate".
        sampling_rate: of sources that bring none, in hertz.
        columns: of a CSV file or a data frame: the six names in the order above, or {"accelerometer": [three],
            "gyroscope": [three], "time": one}, of which "time" gives the rate. By default usual names are found,
            as acc_x and gyro_x.
        units: of the accelerometer, "m/s^2", "g" or "mg", and of the gyroscope, "rad/s", "deg/s" or "mdeg/s"; or by
            name, {"accelerometer": "g", "gyroscope": "deg/s", "time": "ms"}, time in "s", "ms", "us" or "ns".
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
        ValueError: units or columns are not understood.
    """
    name = name_of("IMU trace", source, index)
    factors = unit_factors(units)
    values, rate = _values(source, sampling_rate, columns, factors, fetch=(name, allow_urls))
    if rate is None:
        raise MediaError(f"{name}: an array has no sampling rate of its own: pass (array, rate) or sampling_rate=.")
    check_size(values.size, rate, name)
    samples = _channels_first(values, CHANNELS, name)
    check_finite(samples, name, "Cut those samples out, or interpolate them.")
    samples = np.asarray(samples, np.float64)
    if units is not None:
        samples = samples * np.repeat([factors[sensor] for sensor in SENSORS], 3)[:, None]
    if np.abs(samples).max() > MAX_MAGNITUDE:
        raise MediaError(f"{name}: values up to {np.abs(samples).max():g}; pass m/s^2 and rad/s, not raw counts.")
    check_gravity(samples, name)
    return Recording(np.ascontiguousarray(samples, dtype=np.float32), rate)


def unit_factors(units: Any) -> dict[str, float]:
    """Return the factor of each sensor's values.

    Raises:
        ValueError: a unit is not known.
    """
    if units is None or isinstance(units, Mapping):
        named = dict(units or {})
    elif isinstance(units, str) or len(units) != 2:
        raise ValueError(f"units must be of the accelerometer and of the gyroscope, ('g', 'deg/s'), not {units!r}.")
    else:
        named = dict(zip(SENSORS, units, strict=True))
    for sensor, unit in named.items():
        if sensor not in UNITS or unit not in UNITS[sensor]:
            known = "; ".join(f"{name}: {', '.join(table)}" for name, table in UNITS.items())
            raise ValueError(f"units: {sensor!r} in {unit!r} is not known; known are {known}.")
    return {sensor: UNITS[sensor][unit] for sensor, unit in (DEFAULTS | named).items()}


def _values(
    source: Any, sampling_rate: Any, columns: Any, factors: Mapping[str, float], *, fetch: tuple[str, AllowUrls]
) -> tuple[np.ndarray, float | None]:
    """Read the channels in their own units, and their rate where it is known."""
    name, allow_urls = fetch
    if isinstance(source, Mapping) and "accelerometer" in source and columns is None:
        return _from_sensors(source, sampling_rate, name)
    values, rate = with_rate(source, sampling_rate, name)
    values = fetched(values, name, allow_urls)
    if isinstance(values, Mapping) and columns is not None and not {"bytes", "path"} & set(values):
        return _from_table(Table(values, name), columns, rate, factors)
    if (table := read_table(values, name)) is not None:
        return _from_table(table, columns, rate, factors)
    if columns is not None:
        raise MediaError(f"{name}: columns are of CSV files and data frames, and this is neither.")
    array = read_array(values, name)
    if array is None:
        raise MediaError(f"{name}: a trace is an array with its rate, a .npy or CSV file, or a data frame.")
    return array, rate


def _from_sensors(source: Mapping[str, Any], sampling_rate: Any, name: str) -> tuple[np.ndarray, float | None]:
    sensors = [_channels_first(source.get(sensor), 3, f"{name}, {sensor}") for sensor in SENSORS]
    if sensors[0].shape != sensors[1].shape:
        raise MediaError(f"{name}: accelerometer {sensors[0].shape} and gyroscope {sensors[1].shape} differ.")
    values = np.ma.concatenate(sensors) if any(map(np.ma.is_masked, sensors)) else np.concatenate(sensors)
    _, rate = with_rate({"array": values, "sampling_rate": source.get("sampling_rate", sampling_rate)}, None, name)
    return values, rate


def _from_table(
    table: Table, columns: Any, rate: float | None, factors: Mapping[str, float]
) -> tuple[np.ndarray, float | None]:
    names, time = _columns(table, columns)
    values = np.stack([table.column(name) for name in names])
    if rate is None and time is not None:
        rate = _rate_of(table.column(time) * factors["time"], table.name)
    return values, rate


def _columns(table: Table, columns: Any) -> tuple[list[str], str | None]:
    """Return the names of the six columns, and that of the time."""
    if columns is None:
        return _usual_columns(table), None
    time = None
    if isinstance(columns, Mapping):
        if unknown := sorted(set(columns) - {*SENSORS, "time"}):
            raise ValueError(
                f"columns: {', '.join(map(str, unknown))} is not known; known are accelerometer, gyroscope and time."
            )
        time = columns.get("time")
        columns = [name for sensor in SENSORS for name in columns.get(sensor, ())]
    if isinstance(columns, str) or len(columns) != CHANNELS or len(set(columns)) != CHANNELS:
        raise ValueError(f"columns must be six names, accelerometer x, y, z and gyroscope x, y, z, not {columns!r}.")
    return list(columns), time


def _usual_columns(table: Table) -> list[str]:
    found = []
    for sensor in SENSORS:
        for axis in "xyz":
            pattern = re.compile(rf"{USUAL_NAMES[sensor]}[\s_.]*{axis}\b.*", re.IGNORECASE)
            matching = [name for name in table.columns if pattern.fullmatch(str(name).strip())]
            if len(matching) != 1:
                raise MediaError(
                    f"{table.name}: which column is the {sensor}'s {axis}? {table.named()}. Pass columns=[...], six "
                    "names."
                )
            found += matching
    return found


def _rate_of(seconds: np.ndarray, name: str) -> float:
    """Return the rate of samples at these times.

    Raises:
        MediaError: they are not at a steady rate.
    """
    steps = np.diff(seconds)
    if not steps.size or not np.isfinite(steps).all() or steps.min() <= 0:
        raise MediaError(f"{name}: its times do not grow from one sample to the next.")
    median = float(np.median(steps))
    if np.abs(steps - median).max() > MAX_JITTER * median:
        raise MediaError(
            f"{name}: sampled at steps of {steps.min():g} to {steps.max():g} s; interpolate it to a steady rate."
        )
    return float(steps.size / (seconds[-1] - seconds[0]))


def _channels_first(values: Any, channels: int, name: str) -> np.ndarray:
    array = from_tensor(values) if isinstance(values, torch.Tensor) else np.asanyarray(values)
    if array.ndim == 2 and array.shape[0] != channels and array.shape[1] == channels:
        array = array.T
    if array.ndim != 2 or array.shape[0] != channels:
        raise MediaError(f"{name}: shape {array.shape} is not ({channels}, N) or (N, {channels}).")
    return array


def check_gravity(samples: np.ndarray, name: str) -> None:
    """Warn where `(6, N)` cannot be m/s^2 and rad/s in this order: gravity is in every accelerometer's trace."""
    force, turn = (float(np.median(np.linalg.norm(part, axis=0))) for part in (samples[:3], samples[3:]))
    low, high = USUAL
    problem = None
    if low <= force <= high:
        fastest = float(np.quantile(np.linalg.norm(samples[3:], axis=0), 0.99))
        if fastest > MAX_RADIANS:
            problem = f"the gyroscope turns by {fastest:.3g} rad/s; are these degrees? Pass units=('m/s^2', 'deg/s')"
    elif low <= turn <= high or 0.6 <= turn <= 1.6 < force:
        problem = "gravity is in the last three channels: the first three are the accelerometer's. Is the order other?"
    elif 0.6 <= force <= 1.6:
        problem = f"the median acceleration is {force:.3g} m/s^2; is it in g? Pass units=('g', 'rad/s' or 'deg/s')"
    elif 600 <= force <= 1600:
        problem = f"the median acceleration is {force:.4g} m/s^2; is it in mg? Pass units=('mg', 'rad/s' or 'deg/s')"
    elif force < low:
        problem = f"the median acceleration is {force:.3g} m/s^2: without gravity, which the model knows it with"
    else:
        problem = f"the median acceleration is {force:.4g} m/s^2, and gravity is 9.81. What is its unit? Pass units"
    if problem:
        logger.warning("%s: %s.", name, problem)


def windows(trace: Recording, sampling_rate: float, length: int, count: int) -> torch.Tensor:
    """Cut `count` windows of `length` samples at `sampling_rate`, spread evenly from the start of a trace to its end;
    a single one is from the middle -> `(count, 6, length)`. A shorter trace is padded with its last sample.
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
