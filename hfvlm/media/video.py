"""Videos from files, bytes, arrays, lists of frames and decoders. Frames are decoded when they are used."""

import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfvlm.media.containers import decoded, is_cut, is_partial, open_container
from hfvlm.media.errors import MediaError
from hfvlm.media.images import MAX_PIXELS, read_image, to_8_bits
from hfvlm.media.recordings import as_rate, with_rate
from hfvlm.media.sources import AllowUrls, as_batch, fetched, name_of, opened, read_batch, short

logger = logging.getLogger(__name__)

MAX_FRAMES = 2**20
MAX_DECODED_BYTES = 2**32
# Frames that a decoder of `datasets` decodes at a time.
DECODED_TOGETHER = 64
# Formats whose frames cannot be found by their times.
UNTIMED = ("avi", "mpeg", "mpegts")
# Codecs of which a packet in AVI may hold two frames or none.
PACKED = ("mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3")
# How far a header's frame rate may be from that of the frames' times.
RATE_TOLERANCE = 0.02


def video_batch(sources: Any) -> list[Any]:
    """Return a batch of videos as single sources."""
    return list(sources) if getattr(sources, "ndim", 0) == 5 else as_batch(sources)


def read_videos(sources: Any, *, fps: float | None = None, allow_urls: AllowUrls = False) -> list["Video"]:
    """Read a batch of videos: a list, a generator, a column, or an array of (B, T, H, W, 3). Anything else is a batch
    of one; see `read_video`.

    A list is always a batch: the frames of one video are a list inside it, or come with their rate as `(frames, fps)`.
    """
    return read_batch(read_video, video_batch(sources), fps=fps, allow_urls=allow_urls)


def read_video(
    source: Any,
    *,
    fps: float | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> "Video":
    """Read one video, whose frames are decoded when they are used.

    Example:
        >>> video = read_video("birds.mp4")
        >>> video.seconds, video.frames([0, 24]).shape
        >>> read_video(([first, second], 2.0))  # frames, as PIL images, arrays, paths or bytes, and their rate
        >>> read_video(np.zeros((16, 240, 320, 3), np.uint8), fps=8)

    Args:
        source: a path, bytes or an open file of MP4, MOV, MKV, WebM, AVI, GIF and the like; a `datasets` row with
            "bytes" or "path"; a torchcodec `VideoDecoder`, which `datasets` gives; a list of images, each as
            `read_image` takes them; an array or tensor of (T, H, W, 3) or (T, 3, H, W), as `read_image` takes its
            frames; frames with their rate, `(frames, fps)`; or a `Video`.
        fps: frames a second of frames that bring none.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
        ImportError: the file needs an optional package, which the message names.
    """
    if isinstance(source, Video):
        return source
    name = name_of("video", source, index)
    if hasattr(source, "get_frames_at"):
        return DecoderVideo(name, source)
    source, fps = with_rate(source, fps, name)
    if isinstance(source, Iterator) and not hasattr(source, "read"):
        source = list(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        if source.ndim != 4:
            raise MediaError(f"{name}: shape {tuple(source.shape)} is not (T, H, W, 3) or (T, 3, H, W).")
        return FrameVideo(name, source, fps)
    if isinstance(source, list | tuple):
        return FrameVideo(name, source, fps)
    if isinstance(source, Image.Image):
        raise MediaError(f"{name}: one image is no video: the frames of a video are a list of their own.")
    return FileVideo(name, fetched(source, name, allow_urls))


class Video(ABC):
    """A video.

    Args:
        name: for errors.
        num_frames: how many frames it has.
        fps: frames a second; None where it is unknown.
    """

    def __init__(self, name: str, num_frames: int, fps: float | None):
        if not 0 < num_frames <= MAX_FRAMES:
            raise MediaError(f"{name}: {num_frames} frames; a video has 1 to {MAX_FRAMES}.")
        if fps is not None and not 0 < fps <= 10_000:
            raise MediaError(f"{name}: {fps:g} frames a second is no frame rate.")
        self.name, self.num_frames, self.fps = name, num_frames, fps

    def __len__(self) -> int:
        return self.num_frames

    @property
    def seconds(self) -> float:
        """How long it lasts, in seconds.

        Raises:
            MediaError: its frame rate is not known.
        """
        if self.fps is None:
            raise MediaError(f"{self.name}: frames have no rate of their own: pass (frames, fps) or fps=.")
        return self.num_frames / self.fps

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode the frames at these positions, in this order -> `(N, H, W, 3)`, uint8.

        Raises:
            MediaError: the video is damaged, or the frames are too many or too large.
        """
        indices = [int(i) for i in indices]
        places = sorted(set(indices))
        found = np.empty((0,), np.uint8)
        for i, frame in enumerate(self.stream(places)):
            if not i:
                if frame.nbytes * len(places) > MAX_DECODED_BYTES:
                    raise MediaError(f"{self.name}: {len(places)} frames of {frame.shape} are too much. Take fewer.")
                found = np.empty((len(places), *frame.shape), np.uint8)
            found[i] = frame
        return found if indices == places else found[np.searchsorted(places, indices)]

    def stream(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode the frames at these positions, which ascend, one at a time, each `(H, W, 3)`, uint8.

        A long video need not fit into memory.

        Raises:
            MediaError: the video is damaged.
        """
        places = list(places)
        if not places or not 0 <= min(places) <= max(places) < self.num_frames:
            raise MediaError(f"{self.name}: there are no frames {places[:8]} in a video of {self.num_frames}.")
        count, first = 0, None
        for frame in self._decode(places):
            count += 1
            first = first or frame.shape
            if frame.shape != first:
                raise MediaError(f"{self.name}: frames of different sizes {[first, frame.shape]} make no video.")
            yield frame
        if count < len(places):
            raise MediaError(f"{self.name}: damaged or truncated; {len(places) - count} frames are not there.")

    def tensors(self, places: Sequence[int]) -> Iterator[torch.Tensor]:
        """Decode frames as `stream`, each `(3, H, W)`."""
        for frame in self.stream(places):
            yield torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)

    @abstractmethod
    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        """Decode the frames at ascending positions, each `(H, W, 3)`, uint8."""


class FrameVideo(Video):
    """Images in a row: PIL images, arrays, tensors, paths or bytes, or one array of them."""

    def __init__(self, name: str, images: Any, fps: float | None):
        super().__init__(name, len(images), fps)
        self.images = images

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        for i in places:
            name = f"{self.name}, frame {i}"
            yield np.asarray(to_8_bits(read_image(self.images[i], name=name), name).convert("RGB"))


class DecoderVideo(Video):
    """A video of a column of `datasets`: torchcodec's `VideoDecoder`, or an object that behaves as one."""

    def __init__(self, name: str, decoder: Any):
        rate = decoder.metadata.average_fps
        super().__init__(name, len(decoder), None if rate is None else as_rate(rate, name))
        self.decoder = decoder

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(places), DECODED_TOGETHER):
            some = places[start : start + DECODED_TOGETHER]
            try:
                frames = torch.as_tensor(self.decoder.get_frames_at(indices=some).data)
            except (RuntimeError, ValueError, IndexError) as error:
                raise MediaError(f"{self.name}: damaged or truncated ({short(error)}).") from error
            frames = frames.permute(0, 2, 3, 1) if frames.shape[-1] != 3 else frames
            yield from frames.cpu().numpy()


class FileVideo(Video):
    """A file that FFmpeg decodes.

    Frames are counted and found by their times, in the order in which they are shown, and decoding starts at the
    keyframe before each, so that a few frames of a long video are cheap. Raw streams have no times, and AVI and MPEG
    none that can be trusted to lead to a frame; there, frames are counted while they are decoded.

    A file begins with its first frame that can be decoded, whatever its time, and ends with its last. Cover art is no
    video.
    """

    def __init__(self, name: str, source: Any):
        self.name, self.source = name, source
        with self._open() as (container, stream):
            found = Scan(container, stream, name)
            self.times = found.times if container.format.name not in UNTIMED else None
            self.keys, counted = found.keys, found.count
            fps = found.fps
            count_all = self.times is None and (found.lost or not found.clean or self._is_packed(container, stream))
        if count_all:
            with self._open(threads=True) as (container, stream):
                counted = sum(1 for _ in decoded(container.demux(stream), []))
        if skipped := max(found.packets - counted, 0):
            logger.warning("%s: the first %d frames cannot be decoded, and are left out.", name, skipped)
        super().__init__(name, counted, fps)

    @staticmethod
    def _is_packed(container: Any, stream: Any) -> bool:
        return container.format.name == "avi" and stream.codec_context.name in PACKED

    @contextmanager
    def _open(self, *, threads: bool = False) -> Iterator[tuple[Any, Any]]:
        with opened(self.source, self.name, allow_urls=False) as file:
            if file is None:
                raise MediaError(
                    f"{self.name}: a video is a path, bytes, an open file, frames, an array or a decoder."
                )
            with open_container(file, self.name) as container:
                stream = video_stream(container, self.name)
                if stream.width * stream.height > MAX_PIXELS:
                    raise MediaError(f"{self.name}: frames of {stream.width} x {stream.height} are refused.")
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                if threads:
                    stream.thread_type = "AUTO"
                yield container, stream

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        with self._open(threads=True) as (container, stream):
            frames = with_matrices(decoded(container.demux(stream), []))
            if self.times is None:
                wanted, last = set(places), places[-1]
                for i, (frame, matrix) in enumerate(frames):
                    if i in wanted:
                        yield _pixels(frame, matrix)
                    if i == last:
                        return
                return
            reached = self.times[0]
            for time in (self.times[place] for place in places):
                key = self.keys[max(bisect_right(self.keys, time) - 1, 0)] if self.keys else reached
                if key > reached:
                    container.seek(key, stream=stream)
                    frames = with_matrices(decoded(container.demux(stream), []))
                found = next((found for found in frames if found[0].pts == time), None)
                if found is None:
                    return
                yield _pixels(*found)
                reached = time


def video_stream(container: Any, name: str) -> Any:
    """Choose the stream that players show: no cover art, and the default one where there are several.

    Raises:
        MediaError: the file has none.
    """
    streams = list(container.streams.video)
    if not streams:
        raise MediaError(f"{name}: has no video.")
    kinds = type(streams[0].disposition)
    shown = [s for s in streams if not s.disposition & (kinds.attached_pic | kinds.timed_thumbnails)]
    if not shown:
        raise MediaError(f"{name}: has no video, only cover art.")
    shown = [s for s in shown if s.codec_context is not None]
    if not shown:
        raise MediaError(f"{name}: FFmpeg has no decoder for its video.")
    best = container.streams.best("video")
    return max(
        shown,
        key=lambda s: (
            not s.disposition & kinds.still_image,
            s.frames != 1,
            bool(s.disposition & kinds.default),
            best is not None and s.index == best.index,
            -s.index,
        ),
    )


class Scan:
    """The content of a stream: the times of its frames, from the first that can be decoded.

    Args:
        container: PyAV's.
        stream: of it.
        name: for errors.

    Raises:
        MediaError: the file is cut, or no frame can be decoded.
    """

    def __init__(self, container: Any, stream: Any, name: str):
        self.container, self.stream = container, stream
        self.packets, self.clean, self.partial = 0, True, False
        self.lost: list[str] = []
        self.keys: list[int] = []
        self.times: list[int] | None = []
        self.last: tuple[int, int] | None = None
        packets = self._packets()
        first = next(decoded(packets, self.lost), None)
        for _ in packets:
            pass
        if self.packets > MAX_FRAMES:
            return
        if is_cut(container, stream, self.packets, last_is_partial=self.partial):
            raise MediaError(f"{name}: truncated; after {self.packets} frames it ends inside one of its parts.")
        if first is None:
            reason = f" ({self.lost[0]})" if self.lost else ""
            raise MediaError(f"{name}: damaged or truncated; none of {self.packets} frames can be decoded{reason}.")
        self._begin_at(first.pts)

    def _packets(self) -> Iterator[Any]:
        """Yield every packet to decode, and note it."""
        for packet in self.container.demux(self.stream):
            if is_partial(self.container, packet):
                self.partial = True
                continue
            if packet.size and not packet.is_discard:
                self._note(packet)
                if self.packets > MAX_FRAMES:
                    return
            yield packet

    def _note(self, packet: Any) -> None:
        self.packets += 1
        self.clean = self.clean and (self.packets > 1 or packet.is_keyframe)
        if packet.pts is None:
            self.times = None
        elif self.times is not None:
            self.times.append(packet.pts)
            self.last = max(self.last or (packet.pts, 0), (packet.pts, packet.duration or 0))
            if packet.is_keyframe:
                self.keys.append(packet.pts)

    def _begin_at(self, time: int | None) -> None:
        """Leave out the frames before the first that is decoded."""
        if self.times is None or time is None:
            self.times = None
            return
        self.keys.sort()
        self.times = sorted(known for known in self.times if known >= time)
        if not self.times or self.times[0] != time:
            self.times = None

    @property
    def count(self) -> int:
        """The number of frames, if every packet is one."""
        return self.packets if self.times is None else len(self.times)

    @property
    def fps(self) -> float | None:
        """Frames a second: the header's, unless the frames' times contradict it."""
        claimed = float(self.stream.average_rate) if self.stream.average_rate else None
        if not self.times or len(self.times) < 2 or not self.stream.time_base or self.last is None:
            return claimed
        length = self.last[1] or int(np.median(np.diff(self.times)))
        seconds = float((self.last[0] + length - self.times[0]) * self.stream.time_base)
        measured = len(self.times) / seconds if seconds > 0 else None
        if claimed and measured and abs(claimed / measured - 1) <= RATE_TOLERANCE:
            return claimed
        return measured or claimed


def with_matrices(frames: Iterator[Any]) -> Iterator[tuple[Any, np.ndarray | None]]:
    """Yield each frame with its display matrix, None if it has none.

    It is read at keyframes, and where the rotation changes: PyAV's side data refer to their frame, which then keeps
    its memory until Python's collector finds the circle.
    """
    matrix, rotation = None, None
    for frame in frames:
        if frame.key_frame or frame.rotation != rotation:
            data = frame.side_data.get("DISPLAYMATRIX")
            matrix = None if data is None else np.frombuffer(bytes(data), np.int32)
            rotation = frame.rotation
        yield frame, matrix


def _pixels(frame: Any, matrix: np.ndarray | None) -> np.ndarray:
    """Convert a frame to `(H, W, 3)`, uint8, upright: phones store videos lying or mirrored, with a display matrix."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(f"frames of {frame.width} x {frame.height} are refused")
    pixels = frame.to_ndarray(format="rgb24")
    return pixels if matrix is None else displayed(pixels, matrix)


def displayed(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror `(H, W, 3)` by a display matrix, `(9,)` in rows, to quarters of a turn.

    A pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift, where the matrix begins with a, b, 0, c, d.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return pixels[::-1] if d < 0 else pixels
