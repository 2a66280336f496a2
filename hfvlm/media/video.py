"""Films from files, bytes, arrays, lists of frames and decoders. Frames are decoded when they are asked for."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfvlm.media.containers import open_container
from hfvlm.media.errors import MediaError
from hfvlm.media.images import MAX_PIXELS, read_image, to_8_bits
from hfvlm.media.recordings import with_rate
from hfvlm.media.sources import AllowUrls, fetched, name_of, opened, read_batch

MAX_FRAMES = 2**20
MAX_DECODED_BYTES = 2**32
# Frames that a decoder of `datasets` is asked for at a time.
DECODED_TOGETHER = 64
# Formats whose frames cannot be found by their times.
UNTIMED = ("avi", "mpeg", "mpegts")


def read_videos(sources: Any, *, fps: float | None = None, allow_urls: AllowUrls = False) -> list["Video"]:
    """A batch of films: a list, or an array of (B, T, H, W, 3). Anything else is a batch of one; see `read_video`.

    A list is always a batch: the frames of one film are a list inside it, or come with their rate as `(frames, fps)`.
    """
    batch = sources if isinstance(sources, list) else [sources]
    if getattr(sources, "ndim", 0) == 5:
        batch = list(sources)
    return read_batch(read_video, batch, fps=fps, allow_urls=allow_urls)


def read_video(
    source: Any,
    *,
    fps: float | None = None,
    allow_urls: AllowUrls = False,
    index: int | None = None,
) -> "Video":
    """One film, whose frames are decoded when they are asked for.

    Example:
        >>> film = read_video("birds.mp4")
        >>> film.seconds, film.frames([0, 24]).shape
        >>> read_video(([first, second], 2.0))  # frames, as PIL images, arrays, paths or bytes, and their rate
        >>> read_video(np.zeros((16, 240, 320, 3), np.uint8), fps=8)

    Args:
        source: a path, bytes or an open file of MP4, MOV, MKV, WebM, AVI, GIF and the like; a `datasets` row with
            "bytes" or "path"; a torchcodec `VideoDecoder`, which `datasets` gives; a list of pictures, each as
            `read_image` takes them; an array or tensor of (T, H, W, 3) or (T, 3, H, W), as `read_image` takes its
            frames; frames with their rate, `(frames, fps)`; or a `Video`.
        fps: frames a second of frames that bring none.
        allow_urls: fetch `http(s)` URLs: True for every public host, or the names of the hosts.
        index: position in a batch, for the error's message.

    Raises:
        MediaError: naming the input and what is wrong with it.
        ImportError: the file needs an optional package; the message says which.
    """
    if isinstance(source, Video):
        return source
    name = name_of("video", source, index)
    if hasattr(source, "get_frames_at"):
        return DecoderVideo(name, source)
    source, fps = with_rate(source, fps)
    if isinstance(source, np.ndarray | torch.Tensor):
        if source.ndim != 4:
            raise MediaError(f"{name}: shape {tuple(source.shape)} is not (T, H, W, 3) or (T, 3, H, W).")
        return FrameVideo(name, source, fps)
    if isinstance(source, list | tuple):
        return FrameVideo(name, source, fps)
    if isinstance(source, Image.Image):
        raise MediaError(f"{name}: one picture is no film: the frames of a film are a list of their own.")
    return FileVideo(name, fetched(source, name, allow_urls))


class Video(ABC):
    """A film.

    Args:
        name: for errors.
        num_frames: how many frames it has.
        fps: frames a second; None where nobody said.
    """

    def __init__(self, name: str, num_frames: int, fps: float | None):
        if not 0 < num_frames <= MAX_FRAMES:
            raise MediaError(f"{name}: {num_frames} frames; a film has 1 to {MAX_FRAMES}.")
        if fps is not None and not 0 < fps <= 10_000:
            raise MediaError(f"{name}: {fps:g} frames a second is no frame rate.")
        self.name, self.num_frames, self.fps = name, num_frames, fps

    def __len__(self) -> int:
        return self.num_frames

    @property
    def seconds(self) -> float:
        """How long it lasts.

        Raises:
            MediaError: its frame rate is not known.
        """
        if self.fps is None:
            raise MediaError(f"{self.name}: frames have no rate of their own: pass (frames, fps) or fps=.")
        return self.num_frames / self.fps

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at these places, in this order -> `(N, H, W, 3)`, uint8.

        Raises:
            MediaError: the film is damaged, or the frames are too many or too large.
        """
        indices = [int(i) for i in indices]
        places = sorted(set(indices))
        found: dict[int, np.ndarray] = {}
        for i, frame in zip(places, self.stream(places), strict=True):
            if frame.nbytes * len(places) > MAX_DECODED_BYTES:
                raise MediaError(f"{self.name}: {len(places)} frames of {frame.shape} are too much. Ask for fewer.")
            found[i] = frame
        shapes = {frame.shape for frame in found.values()}
        if len(shapes) > 1:
            raise MediaError(f"{self.name}: frames of different sizes {sorted(shapes)} make no film.")
        return np.stack([found[i] for i in indices])

    def stream(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames at these places, which ascend, one at a time, each `(H, W, 3)`, uint8: a long film need not fit
        into memory.

        Raises:
            MediaError: the film is damaged.
        """
        places = list(places)
        if not places or not 0 <= min(places) <= max(places) < self.num_frames:
            raise MediaError(f"{self.name}: there are no frames {places[:8]} in a film of {self.num_frames}.")
        count = 0
        for frame in self._decode(places):
            count += 1
            yield frame
        if count < len(places):
            raise MediaError(f"{self.name}: damaged or truncated; {len(places) - count} frames are not there.")

    @abstractmethod
    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        """The frames at ascending places, each `(H, W, 3)`, uint8."""


class FrameVideo(Video):
    """Pictures in a row: PIL images, arrays, tensors, paths or bytes, or one array of them."""

    def __init__(self, name: str, pictures: Any, fps: float | None):
        super().__init__(name, len(pictures), fps)
        self.pictures = pictures

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        for i in places:
            name = f"{self.name}, frame {i}"
            yield np.asarray(to_8_bits(read_image(self.pictures[i], name=name), name).convert("RGB"))


class DecoderVideo(Video):
    """What `datasets` gives for a column of films: torchcodec's `VideoDecoder`, or what behaves as one."""

    def __init__(self, name: str, decoder: Any):
        super().__init__(name, len(decoder), float(decoder.metadata.average_fps))
        self.decoder = decoder

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(places), DECODED_TOGETHER):
            some = places[start : start + DECODED_TOGETHER]
            frames = torch.as_tensor(self.decoder.get_frames_at(indices=some).data)
            frames = frames.permute(0, 2, 3, 1) if frames.shape[-1] != 3 else frames
            yield from frames.cpu().numpy()


class FileVideo(Video):
    """A file that FFmpeg decodes.

    Frames are counted and found by their times, in the order in which they are shown, and decoding starts at the
    keyframe before each, so that a few frames of a long film are cheap. Raw streams have no times, and AVI and MPEG
    none that can be trusted to lead to a place; there, frames are counted while they are decoded.
    """

    def __init__(self, name: str, source: Any):
        self.name, self.source = name, source
        with self._open() as (container, stream):
            packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            found = [(packet.pts, packet.is_keyframe) for packet in islice(packets, MAX_FRAMES + 1)]
            timed = container.format.name not in UNTIMED and all(time is not None for time, _ in found)
            self.times = sorted(time for time, _ in found) if timed else None
            self.keys = sorted(time for time, key in found if key) if timed else []
            super().__init__(name, len(found), float(stream.average_rate) if stream.average_rate else None)
            claimed = _claimed_seconds(container, stream)
            if self.times and float((self.times[-1] - self.times[0]) * stream.time_base) < 0.9 * claimed - 1 / (
                self.fps or 1
            ):
                raise MediaError(f"{name}: truncated; its {len(found)} frames end before its {claimed:g} seconds.")

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with opened(self.source, self.name, allow_urls=False) as file:
            if file is None:
                raise MediaError(f"{self.name}: a film is a path, bytes, an open file, frames, an array or a decoder.")
            if file is self.source:
                file.seek(0)
            with open_container(file, self.name) as container:
                if not container.streams.video:
                    raise MediaError(f"{self.name}: has no pictures.")
                stream = container.streams.video[0]
                if stream.width * stream.height > MAX_PIXELS:
                    raise MediaError(f"{self.name}: frames of {stream.width} x {stream.height} are refused.")
                stream.thread_type = "AUTO"
                yield container, stream

    def _decode(self, places: list[int]) -> Iterator[np.ndarray]:
        with self._open() as (container, stream):
            if self.times is None:
                last, wanted = places[-1], set(places)
                shown = enumerate(islice(container.decode(stream), last + 1))
                yield from (_pixels(frame) for i, frame in shown if i in wanted)
                return
            frames, reached = container.decode(stream), self.times[0]
            for time in (self.times[place] for place in places):
                key = self.keys[max(bisect_right(self.keys, time) - 1, 0)]
                if key > reached:
                    container.seek(key, stream=stream)
                    frames = container.decode(stream)
                frame = next((frame for frame in frames if frame.pts == time), None)
                if frame is None:
                    return
                yield _pixels(frame)
                reached = time


def _claimed_seconds(container: Any, stream: Any) -> float:
    """How long the file says that its pictures last; 0 where it says nothing of them alone."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else 0.0


def _pixels(frame: Any) -> np.ndarray:
    """As it is meant to be seen: telephones store upright films lying down, and how far to turn them."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
