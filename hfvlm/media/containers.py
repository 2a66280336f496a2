"""Films and sounds that FFmpeg opens: through a file that Python holds, and never by a name FFmpeg could follow."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from hfvlm.media.errors import MediaError
from hfvlm.media.sources import import_extra

FORMATS = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "FLV", "ASF", "OGG", "GIF")
# FFmpeg knows more, but some of those are playlists, which open other files and hosts.
DEMUXERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,mjpeg,ivf,nut,mxf,"
    "wav,mp3,flac,aac,ac3,amr,aiff,au,caf,w64"
)


@contextmanager
def open_container(file: BinaryIO, name: str) -> Iterator[Any]:
    """An open file as PyAV's container, with FFmpeg's errors as ours.

    Raises:
        MediaError: the file is damaged, or of a format that is not read.
        ImportError: PyAV is not installed.
    """
    av = import_extra("av", "video", f"{name}: decoding")
    try:
        container = av.open(file, options={"format_whitelist": DEMUXERS})
    except av.FFmpegError as error:
        raise MediaError(
            f"{name}: not a film or a sound in one of the formats {', '.join(FORMATS)}, or damaged."
        ) from error
    try:
        yield container
    except av.FFmpegError as error:
        raise MediaError(f"{name}: damaged or truncated ({error.strerror}).") from error
    finally:
        container.close()
