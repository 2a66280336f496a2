"""Sound from files, bytes, arrays and decoders."""

import re
from typing import Any, BinaryIO

import numpy as np

from hfvlm.media.containers import FORMATS, open_container
from hfvlm.media.errors import MediaError
from hfvlm.media.recordings import Recording, check_size, with_rate
from hfvlm.media.sources import AllowUrls, check_finite, fetched, import_extra, name_of, opened, read_array, read_batch

MAX_CHANNELS = 64
# Beyond this, floating-point samples are integers that were never scaled.
MAX_AMPLITUDE = 16.0
# libsndfile reads on silently where a chunk is shorter than its header says, but notes it.
CLAIMED_SIZE = re.compile(r": (\d+) \(should be (\d+)\)")
# What programs write into headers of sound whose end they do not know yet.
STREAMED = 0x7FFFF000


def read_audios(sources: Any, *, sampling_rate: float | None = None, allow_urls: AllowUrls = False) -> list[Recording]:
    """A batch of sounds: a list. Anything else is a batch of one; see `read_audio`."""
    batch = sources if isinstance(sources, list) else [sources]
    if batch and all(isinstance(value, int | float) for value in batch):
        batch = [batch]
    return read_batch(read_audio, batch, sampling_rate=sampling_rate, allow_urls=allow_urls)


def read_audio(
    source: Any,
    *,
    sampling_rate: float | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> Recording:
    """One sound, all its channels, with values in -1..1.

    Args:
        source: a path, bytes or an open file of sound or of a film with sound; a `data:` URL; a `datasets` row with
            "bytes" or "path"; a torchcodec `AudioDecoder`; or an array or tensor of (N,), (channels, N) or
            (N, channels), floating point in -1..1 or integers over their type's whole range, with its rate: as
            `(array, rate)`, as a row with "array" and "sampling_rate", or with `sampling_rate`.
        sampling_rate: of arrays that bring none, in hertz.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
        ImportError: the file needs an optional package; the message says which.
    """
    name = name_of("audio", source, index)
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        source, sampling_rate = decoded.data, decoded.sample_rate
    values, rate = with_rate(source, sampling_rate)
    values = fetched(values, name, allow_urls)
    array = read_array(values, name)
    if array is None:
        samples, rate = _read_file(values, name)
    elif rate is None:
        raise MediaError(f"{name}: an array has no sampling rate of its own: pass (array, rate) or sampling_rate=.")
    else:
        check_size(array.size, rate, name)
        samples = _to_floats(array, name)
    check_finite(samples, name, "Cut those samples out, or set them to 0.")
    if np.abs(samples).max() > MAX_AMPLITUDE:
        raise MediaError(
            f"{name}: samples up to {np.abs(samples).max():g}; floating-point sound lies in -1..1. Divide 16-bit "
            "values by 32768, or pass them as integers."
        )
    return Recording(np.ascontiguousarray(samples, dtype=np.float32), rate)


def _to_floats(array: np.ndarray, name: str) -> np.ndarray:
    """(N,), (channels, N) or (N, channels) -> (channels, N), in -1..1."""
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or min(array.shape) > MAX_CHANNELS:
        raise MediaError(f"{name}: shape {array.shape} is not (N,), (channels, N) or (N, channels).")
    array = array.T if array.shape[0] > array.shape[1] else array
    if array.dtype == np.uint8:  # as WAV stores 8 bits
        return (array.astype(np.float32) - 128) / 128
    if np.issubdtype(array.dtype, np.signedinteger):
        if array.dtype.itemsize > 4:
            raise MediaError(f"{name}: {array.dtype} is no format of sound: pass int16, int32 or floating point.")
        return array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    return array


def _read_file(source: Any, name: str) -> tuple[np.ndarray, float]:
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            raise MediaError(f"{name}: a sound is a path, bytes, an open file, a decoder, or (array, rate).")
        soundfile = import_extra("soundfile", "audio", f"{name}: reading sound files")
        start = file.tell()
        try:
            sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError as error:
            file.seek(start)
            return _read_container(file, name, error.error_string)
        with sound:
            check_size(sound.frames * sound.channels, sound.samplerate, name)
            try:
                samples = sound.read(dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise MediaError(f"{name}: damaged or truncated ({error.error_string}).") from error
            claims = [(int(size), int(found)) for size, found in CLAIMED_SIZE.findall(sound.extra_info)]
            if len(samples) < sound.frames or any(found < size < STREAMED for size, found in claims):
                raise MediaError(f"{name}: truncated; after {len(samples)} samples the file ends before its time.")
            return samples.T, sound.samplerate


def _read_container(file: BinaryIO, name: str, reason: str) -> tuple[np.ndarray, float]:
    """The sound of MP4, WebM and the like, decoded by FFmpeg."""
    av = import_extra("av", "video", f"{name}: not a format that libsndfile reads ({reason}); trying FFmpeg")
    parts: list[np.ndarray] = []
    with open_container(file, name) as container:
        if not container.streams.audio:
            raise MediaError(
                f"{name}: has no sound. Formats that are read: WAV, FLAC, OGG, MP3, {', '.join(FORMATS)}."
            )
        stream = container.streams.audio[0]
        planar, values = av.AudioResampler(format="fltp"), 0
        for frame in container.decode(stream):
            for part in planar.resample(frame):
                values += part.samples * len(part.layout.channels)
                check_size(values, stream.rate, name)
                parts.append(part.to_ndarray())
        if not parts:
            raise MediaError(f"{name}: damaged or truncated; no sound could be decoded.")
        return np.concatenate(parts, axis=1), stream.rate
