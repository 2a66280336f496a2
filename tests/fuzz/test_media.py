"""Damaged media: read, or refused by a short error of hfvlm's; nothing else, and in little time and memory."""

import io
import time
import tracemalloc

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from hfvlm.media import MediaError, read_audio, read_depth, read_image, read_imu, read_thermal, read_video
from hfvlm.media.images import to_8_bits

SECONDS, MEGABYTES, CHARACTERS = 10, 256, 600
RATE = 16_000
WAVE = (np.sin(np.arange(RATE // 2) * 0.05) / 2).astype(np.float32)
RANDOM = np.random.RandomState(0)
COLOURS = RANDOM.randint(0, 256, (24, 32, 3), dtype=np.uint8)


def saved(save, *args, **options):
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def image(array, format, **options):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(array).save, format, **({"exif": exif} if format != "PPM" else {}) | options)


def audio(format, subtype=None):
    return saved(lambda file: soundfile.write(file, WAVE, RATE, format=format, subtype=subtype))


def encoded(format, codec, kind="video"):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        if kind == "video":
            stream = container.add_stream(codec, rate=10, options={"g": "4"})
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(np.roll(COLOURS, i, 0), format="rgb24") for i in range(8)]
        else:
            stream = container.add_stream(codec, rate=RATE)
            frames = [av.AudioFrame.from_ndarray(WAVE[None], format="flt", layout="mono")]
            frames[0].sample_rate = RATE
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    return buffer.getvalue()


def every_image(source):
    return to_8_bits(read_image(source)).convert("RGB")


def every_frame(source):
    video = read_video(source)
    return [frame.shape for frame in video.stream(range(len(video)))]


def trace(source):
    return read_imu(source, sampling_rate=50, columns=["ax", "ay", "az", "gx", "gy", "gz"])


def plain_trace(source):
    return read_imu(source, sampling_rate=50)


def seeds():
    depth = RANDOM.randint(0, 9000, (12, 16)).astype(np.uint16)
    table = "ax,ay,az,gx,gy,gz\n" + "\n".join("0.1,9.8,0.2,0.01,0.02,0.03" for _ in range(20))
    return {
        "jpeg": (image(COLOURS, "JPEG"), every_image),
        "png": (image(COLOURS, "PNG"), every_image),
        "png-16": (image(depth, "PNG"), read_depth),
        "webp": (image(COLOURS, "WEBP"), every_image),
        "tiff": (image(COLOURS, "TIFF"), every_image),
        "tiff-thermal": (image(depth, "TIFF"), read_thermal),
        "gif": (image(COLOURS[..., 0], "GIF"), every_image),
        "bmp": (image(COLOURS, "BMP"), every_image),
        "pgm": (b"P5 16 12 9000\n" + depth.astype(">u2").tobytes(), read_depth),
        "pgm-plain": (b"P2 # plain\n4 2 999\n1 2 3 4\n5 6 7 8\n", read_depth),
        "ppm": (image(COLOURS, "PPM"), every_image),
        "npy": (saved(np.save, depth), read_depth),
        "npy-imu": (saved(np.save, np.ones((6, 50))), plain_trace),
        "csv": (table.encode(), trace),
        "wav": (audio("WAV"), read_audio),
        "aiff": (audio("AIFF"), read_audio),
        "w64": (audio("W64"), read_audio),
        "caf": (audio("CAF"), read_audio),
        "au": (audio("AU"), read_audio),
        "flac": (audio("FLAC"), read_audio),
        "ogg": (audio("OGG"), read_audio),
        "mp3": (audio("MP3"), read_audio),
        "m4a": (encoded("mp4", "aac", "audio"), read_audio),
        "mp4": (encoded("mp4", "libx264"), every_frame),
        "mkv": (encoded("matroska", "libx264"), every_frame),
        "avi": (encoded("avi", "mpeg4"), every_frame),
        "ts": (encoded("mpegts", "libx264"), every_frame),
        "gif-video": (
            saved(Image.fromarray(COLOURS).save, "GIF", save_all=True, append_images=[Image.fromarray(COLOURS[::-1])]),
            every_frame,
        ),
    }


def mutated(data, random):
    """One to four damages: bytes changed, cut, inserted, repeated, or a number set to an extreme."""
    data = bytearray(data)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(0, len(data) or 1))
        # Headers decide most.
        place = place % 128 if random.random() < 0.5 else place
        length = int(random.integers(1, 9))
        kind = random.integers(0, 6)
        if kind == 0:
            data[place : place + length] = random.bytes(length)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = random.bytes(length)
        elif kind == 4:
            data[place : place + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"][
                length % 4
            ]
        elif place < len(data):
            data[place] ^= 1 << int(random.integers(0, 8))
    return bytes(data)


def refusal(read, data):
    """The message with which data are refused; None where they are read."""
    try:
        read(data)
    except MediaError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
def test_media(fuzz_rounds):
    kinds, refused = seeds(), 0
    assert not any(refusal(read, data) for data, read in kinds.values())
    random = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for i in range(fuzz_rounds):
            kind = list(kinds)[i % len(kinds)]
            data, read = kinds[kind]
            damaged, start = mutated(data, random), time.monotonic()
            tracemalloc.reset_peak()
            try:
                message = refusal(read, damaged)
            except Exception as error:
                raise AssertionError(f"{kind}, round {i}: {type(error).__name__}: {error}") from error
            place = f"{kind}, round {i}: {message}"
            assert len(message or "") < CHARACTERS, place[:CHARACTERS]
            assert (message or "").isprintable(), repr(place)
            assert time.monotonic() - start < SECONDS, place
            assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 2**20, place
            refused += message is not None
    finally:
        tracemalloc.stop()
    assert fuzz_rounds // 10 < refused < fuzz_rounds * 9 // 10
