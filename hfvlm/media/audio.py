"""Audio from files, bytes, arrays and decoders."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from hfvlm.media.chunks import recordings
from hfvlm.media.containers import FORMATS, AudioFrames, open_container
from hfvlm.media.errors import MediaError
from hfvlm.media.recordings import Recording, check_size, with_rate
from hfvlm.media.sources import (
    AllowUrls,
    as_batch,
    check_finite,
    fetched,
    import_extra,
    name_of,
    opened,
    read_array,
    read_batch,
    short,
)
from hfvlm.media.streams import flac_info, flac_recordings, mp3_is_cut, ogg_links

MAX_CHANNELS = 64
# Beyond this, floating-point samples are integers that were never scaled.
MAX_AMPLITUDE = 16.0


class AudioAsRead(np.ndarray):
    """A recording that `read_audio` has read, in a form that transformers' pipelines, which know no rates, pass on as
    it is. `read_audio` takes the recording out again."""

    recording: Recording


def as_read(recording: Recording) -> AudioAsRead:
    """Wrap a recording for a pipeline of transformers."""
    array = recording.samples[0].view(AudioAsRead)
    array.recording = recording
    return array


def audio_batch(sources: Any) -> list[Any]:
    """Return a batch of audio as single sources; a list of numbers is one recording."""
    batch = as_batch(sources)
    return [batch] if batch and all(isinstance(value, int | float) for value in batch) else batch


def read_audios(sources: Any, *, sampling_rate: float | None = None, allow_urls: AllowUrls = False) -> list[Recording]:
    """Read a batch of audio: a list, a generator or a column. Anything else is a batch of one; see `read_audio`."""
    return read_batch(read_audio, audio_batch(sources), sampling_rate=sampling_rate, allow_urls=allow_urls)


def read_audio(
    source: Any,
    *,
    sampling_rate: float | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> Recording:
    """Read one recording, all its channels, with values in -1..1.

    The samples that a file has are decoded, whatever length its header claims. A file of several recordings, one
    after the other, is read as one.

    Args:
        source: a path, bytes or an open file of audio or of a video with audio; a `data:` URL; a `datasets` row with
            "bytes" or "path"; a torchcodec `AudioDecoder`; or an array or tensor of (N,), (channels, N) or
            (N, channels), floating point in -1..1 or integers over their type's whole range, with its rate: as
            `(array, rate)`, as a row with "array" and "sampling_rate", or with `sampling_rate`.
        sampling_rate: of arrays that bring none, in hertz.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
        ImportError: the file needs an optional package, which the message names.
    """
    if isinstance(source, AudioAsRead) and hasattr(source, "recording"):
        return source.recording
    name = name_of("audio", source, index)
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        source, sampling_rate = decoded.data, decoded.sample_rate
    values, rate = with_rate(source, sampling_rate, name)
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
            f"{name}: samples up to {np.abs(samples).max():g}; floating-point audio lies in -1..1. Divide 16-bit "
            "values by 32768, or pass them as integers."
        )
    return Recording(np.ascontiguousarray(samples, dtype=np.float32), rate)


def _to_floats(array: np.ndarray, name: str) -> np.ndarray:
    """Scale `(N,)`, `(channels, N)` or `(N, channels)` -> `(channels, N)`, in -1..1."""
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or min(array.shape) > MAX_CHANNELS:
        raise MediaError(f"{name}: shape {array.shape} is not (N,), (channels, N) or (N, channels).")
    array = array.T if array.shape[0] > array.shape[1] else array
    if array.dtype == np.uint8:  # as WAV stores 8 bits
        return (array.astype(np.float32) - 128) / 128
    if array.dtype.kind in "iu" and array.dtype not in (np.int8, np.int16, np.int32):
        raise MediaError(f"{name}: {array.dtype} is no audio format: pass int16, int32 or floating point.")
    if array.dtype.kind == "i":
        return array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    return array


def _read_file(source: Any, name: str) -> tuple[np.ndarray, float]:
    with opened(source, name, allow_urls=False) as file:
        if file is None:
            raise MediaError(f"{name}: audio is a path, bytes, an open file, a decoder, or (array, rate).")
        parts: list[np.ndarray] = []
        rates: set[tuple[float, int]] = set()
        for part in _recordings(file, name):
            samples, rate = _read_recording(part, name)
            parts.append(samples)
            rates.add((rate, len(samples)))
            check_size(sum(found.size for found in parts), rate, name)
        if len(rates) > 1:
            kinds = ", ".join(f"{channels} x {rate:g} Hz" for rate, channels in sorted(rates))
            raise MediaError(f"{name}: holds recordings of different kinds ({kinds}); split it into files.")
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)), rate


def _recordings(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Yield the recordings of a file, one after the other; nearly always the file itself."""
    place = file.tell()
    head = file.read(4)
    file.seek(place)
    if (chunked := recordings(file, name)) is not None:
        yield from chunked
        return
    ranges: list[tuple[int, int]] = []
    if head == b"OggS":
        ranges, cut = ogg_links(file)
        if cut:
            raise MediaError(f"{name}: truncated; it ends inside a page.")
    elif head == b"fLaC":
        ranges = flac_recordings(file)
    if len(ranges) < 2:
        yield file
        return
    for begin, end in ranges:
        file.seek(begin)
        yield io.BytesIO(file.read(end - begin))


def _read_recording(file: BinaryIO, name: str) -> tuple[np.ndarray, float]:
    """Read one recording, by libsndfile where that is sure to read all of it, else by FFmpeg."""
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] >= 0xE0):
        return _read_container(file, name, "MP3 and AAC are read by FFmpeg")
    soundfile = import_extra("soundfile", "audio", f"{name}: reading audio files")
    try:
        with soundfile.SoundFile(file) as opened_file:
            if opened_file.format != "FLAC":  # whose number of samples may be 0 for unknown
                check_size(opened_file.frames * opened_file.channels, opened_file.samplerate, name)
            samples, rate, frames = _samples_of(opened_file, name), opened_file.samplerate, opened_file.frames
    except soundfile.LibsndfileError as error:
        file.seek(start)
        return _read_container(file, name, short(error.error_string) or "it cannot be opened")
    file.seek(start)
    if (info := flac_info(file)) is not None and (len(samples) != info.samples or not info.holds(samples.T)):
        return _read_container(file, name, "its header does not fit its samples")
    if len(samples) < frames:
        raise MediaError(f"{name}: truncated; the file ends after {len(samples)} of {frames} samples.")
    return samples.T, rate


def _samples_of(file: Any, name: str) -> np.ndarray:
    """Read `(N, channels)` in blocks, so that the number of samples in the header allocates no memory."""
    blocks: list[np.ndarray] = []
    total = 0
    while len(block := file.read(2**20, dtype="float32", always_2d=True)):
        blocks.append(block)
        total += block.size
        check_size(total, file.samplerate, name)
    return np.concatenate(blocks) if blocks else np.empty((0, file.channels), np.float32)


def _read_container(file: BinaryIO, name: str, reason: str) -> tuple[np.ndarray, float]:
    """Decode the audio of MP3, MP4, WebM and the like, and of files that libsndfile cannot read, by FFmpeg."""
    import_extra("av", "audio", f"{name}: decoding by FFmpeg ({reason})")
    start = file.tell()
    with open_container(file, name) as container:
        if not container.streams.audio:
            raise MediaError(
                f"{name}: has no audio. Formats that are read: WAV, FLAC, OGG, MP3, {', '.join(FORMATS)}."
            )
        frames = AudioFrames(container, name)
        samples, format = frames.read(), container.format.name
    file.seek(start)
    if format == "mp3" and mp3_is_cut(file, samples.shape[1]):
        raise MediaError(f"{name}: truncated; it is shorter, in bytes and in samples, than its header claims.")
    file.seek(start)
    info = flac_info(file)
    if info is not None and samples.shape[1] < info.samples and any(info.md5) and not info.holds(samples):
        raise MediaError(f"{name}: damaged or truncated; {samples.shape[1]} of {info.samples} samples are there.")
    return samples, frames.rate
