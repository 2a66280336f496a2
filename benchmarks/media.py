"""Preprocessing of images and reading of videos, next to transformers' processor and to PyAV by hand.

python -m benchmarks.media [--quick] [--rounds 7] [--output media.json]
"""

import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import av
import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.measuring import Growth, Item, Row, Size, peak_memory
from benchmarks.report import main
from hfvlm.media import read_image, read_video
from hfvlm.models.clip import HfvlmCLIPImageProcessor

# Sizes whose margins are even: at others transformers crops a pixel beside where the authors do.
SIZES = ((640, 480), (500, 375), (480, 640), (1024, 768))


def rows(size: Size) -> Iterator[Item]:
    ours = HfvlmCLIPImageProcessor()
    theirs = CLIPImageProcessorPil()
    images = [image(i, *SIZES[i % 4]) for i in range(size.pick(4, 16))]
    files = [jpeg(x) for x in images]
    ways = {
        "hfvlm": lambda: ours(images, return_tensors="np")["pixel_values"],
        "transformers": lambda: theirs(images, return_tensors="np")["pixel_values"],
    }
    yield Row(f"{len(images)} images", ways, tolerance=1e-5)
    ways = {
        "hfvlm": lambda: ours(files, return_tensors="np")["pixel_values"],
        "transformers": lambda: theirs([opened(f) for f in files], return_tensors="np")["pixel_values"],
    }
    yield Row(f"{len(files)} JPEG files", ways, tolerance=1e-5)
    yield Row(
        "a JPEG file",
        {"hfvlm": lambda: np.array(read_image(files[0])), "careful": lambda: np.array(opened(files[0]))},
        0.0,
    )
    count = size.pick(24, 300)
    file = video(count)
    places = list(range(0, count, count // 8))[:8]
    yield Row(
        f"8 of {count} frames",
        {"hfvlm": lambda: read_video(file).frames(places), "careful": lambda: frames(file, places)},
        0.0,
    )
    every = list(range(count))
    yield Row(
        f"all {count} frames",
        {"hfvlm": lambda: read_video(file).frames(every), "careful": lambda: frames(file, every)},
        0.0,
    )
    yield Growth(
        "memory of a video's frames, one at a time, with frames",
        (400, 1600),
        # What the decoder holds varies below this; 1,600 frames at once would be 369 MB.
        lambda n: max(100.0, peak_memory("benchmarks.media", "streaming", n)),
        0.3,
    )


def image(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def video(count: int) -> bytes:
    with av.open(file := io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((240, 320, 3), i % 256, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def frames(file: bytes, places: list[int]) -> np.ndarray:
    """Decode up to the last wanted frame, on several threads."""
    wanted = set(places)
    with av.open(io.BytesIO(file)) as container:
        container.streams.video[0].thread_type = "AUTO"
        decoded = enumerate(islice(container.decode(video=0), places[-1] + 1))
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in wanted])


def streaming(count: str) -> Any:
    file = video(int(count))
    for _ in read_video(file).stream([0, 1]):
        pass
    return lambda: [frame.mean() for frame in read_video(file).stream(range(int(count)))]


if __name__ == "__main__":
    main({"media": rows}, __doc__)
