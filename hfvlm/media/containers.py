"""Videos and audio that FFmpeg opens: through a file that Python holds, and never by a name FFmpeg could follow."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from hfvlm.media.errors import MediaError
from hfvlm.media.recordings import check_size
from hfvlm.media.sources import import_extra, short
from hfvlm.media.streams import matroska_is_cut, ogg_links

logger = logging.getLogger(__name__)

FORMATS = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "FLV", "ASF", "OGG", "GIF")
# FFmpeg knows more, but some of those are playlists, which open other files and hosts.
DEMUXERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,mjpeg,ivf,nut,mxf,"
    "wav,mp3,flac,aac,ac3,amr,aiff,au,caf,w64"
)
# Streams in which decoders resume after data that they cannot decode: tags, and the seams of recordings.
RESUMED = ("mp3", "aac", "ac3", "mpegts", "mpeg")
# Formats that know how long a packet is, so that a shorter one is the file's end.
SIZED = ("mp4", "avi", "flv")
MAX_LOST = 0.1
# Codecs of which MP4's table lists samples, and many make a packet.
OF_SAMPLES = ("pcm_", "adpcm_", "mace", "gsm")


@contextmanager
def open_container(file: BinaryIO, name: str) -> Iterator[Any]:
    """Open a file as PyAV's container, with FFmpeg's errors as ours.

    Raises:
        MediaError: the file is damaged, or of a format that is not read.
        ImportError: PyAV is not installed.
    """
    av = import_extra("av", "video", f"{name}: decoding")
    try:
        container = av.open(file, options={"format_whitelist": DEMUXERS})
    except (av.FFmpegError, ValueError, UnicodeError) as error:
        raise MediaError(
            f"{name}: not a video or audio in one of the formats {', '.join(FORMATS)}, or damaged."
        ) from error
    try:
        yield container
    except MediaError:
        raise
    except (av.FFmpegError, ValueError, UnicodeError, OverflowError, MemoryError) as error:
        reason = short(getattr(error, "strerror", None) or error)
        raise MediaError(f"{name}: damaged or truncated ({reason}).") from error
    finally:
        container.close()


def is_partial(container: Any, packet: Any) -> bool:
    """Whether the file ends inside a packet."""
    return bool(packet.size) and packet.is_corrupt and any(name in SIZED for name in container.format.name.split(","))


def is_cut(container: Any, stream: Any, packets: int, *, last_is_partial: bool) -> bool:
    """Whether a file ends inside one of its own parts although its header claims more.

    A recording that was never finished claims no end, and is not cut.

    Args:
        packets: whole ones that were found.
        last_is_partial: another one followed that is not whole.
    """
    formats, file = container.format.name.split(","), container.file.file
    file.seek(0)
    listed = "mp4" in formats and not stream.codec_context.name.startswith(OF_SAMPLES)
    if listed or last_is_partial:
        # In MP4 this is no header's claim: a table lists every packet.
        return packets < stream.frames
    if "matroska" in formats:
        return matroska_is_cut(file)
    return "ogg" in formats and ogg_links(file)[1]


def decoded(packets: Iterable[Any], lost: list[str]) -> Iterator[Any]:
    """Yield the frames of packets. Undecodable packets before the first frame are skipped, and noted in `lost`."""
    av = import_extra("av", "video", "decoding")
    begun = False
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if begun or isinstance(error, av.EOFError):
                raise
            lost.append(short(error.strerror))
            continue
        for frame in frames:
            begun = True
            yield frame


class AudioFrames:
    """The audio of a container.

    Args:
        container: PyAV's.
        name: for errors.
    """

    def __init__(self, container: Any, name: str):
        self.container, self.name = container, name
        streams = [s for s in container.streams.audio if s.codec_context is not None]
        if not streams:
            raise MediaError(f"{name}: FFmpeg has no decoder for its audio.")
        self.stream = next((s for s in streams if s.disposition & type(s.disposition).default), streams[0])
        if container.format.name == "flac":
            self.stream.codec_context.options = {"err_detect": "crccheck+explode"}
        self.packets = self.lost = 0
        self.rate: float = 0

    def read(self) -> np.ndarray:
        """Decode all audio -> `(channels, N)`, float32.

        Raises:
            MediaError: nothing can be decoded, or the file is damaged or cut.
        """
        av = import_extra("av", "audio", f"{self.name}: decoding")
        planar = av.AudioResampler(format="fltp")
        parts: list[np.ndarray] = []
        kind, values = None, 0
        for frame in self._frames(av):
            found = (frame.sample_rate, frame.layout.nb_channels)
            if kind not in (None, found):
                raise MediaError(
                    f"{self.name}: changes from {kind[1]} x {kind[0]} Hz to {found[1]} x {found[0]} Hz; split it into "
                    "files."
                )
            kind = found
            values += frame.samples * found[1]
            check_size(values, frame.sample_rate, self.name)
            parts += [part.to_ndarray() for part in planar.resample(frame)]
        if not parts or kind is None or self.lost > MAX_LOST * self.packets:
            raise MediaError(
                f"{self.name}: damaged or truncated; {self.lost or 'all'} of its packets are not decoded."
            )
        if self.lost:
            logger.warning("%s: %d of %d packets cannot be decoded.", self.name, self.lost, self.packets)
        self.rate = kind[0]
        return np.concatenate(parts, axis=1)

    def _frames(self, av: Any) -> Iterator[Any]:
        resumed, partial, begun = self.container.format.name in RESUMED, False, False
        for packet in self.container.demux(self.stream):
            if is_partial(self.container, packet):
                partial = True
                continue
            self.packets += bool(packet.size)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if begun and not resumed:
                    raise
                self.lost += 1
                continue
            begun = begun or bool(frames)
            yield from frames
        if is_cut(self.container, self.stream, self.packets, last_is_partial=partial):
            raise MediaError(f"{self.name}: truncated; it ends before its audio does.")
