"""Videos as players show them: the right stream, upright, from the first frame that can be decoded to the last."""

import io
import logging
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from hfvlm.media import MediaError, read_video
from hfvlm.media.video import displayed

SIZE = (64, 48)


def grey(i):
    return np.full((SIZE[1], SIZE[0], 3), 10 + 10 * i, np.uint8)


def write(frames, *, format="mp4", codec="libx264", times=None, last=None, options=None, matrix=None, start=0):
    """A video with frames at these times in milliseconds; the last is shown for `last`."""
    times = times or [start + 100 * i for i in range(len(frames))]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        packets = []
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets:
            if last is not None and packet.pts == max(p.pts for p in packets):
                packet.duration = int(last * Fraction(1, 1000) / packet.time_base)
            container.mux(packet)
    return buffer.getvalue()


def values(video):
    return [round(float(frame.mean())) for frame in video.stream(range(len(video)))]


def expected(indices):
    return pytest.approx([10 + 10 * i for i in indices], abs=4)


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "webm", "mpegts", "flv"])
@pytest.mark.parametrize(("start", "last"), [(0, 5000), (700, None), (90_000, None), (3000, 2000)])
def test_when_a_video_starts_and_how_long_its_last_frame_is_shown(format, start, last):
    codec = "libvpx-vp9" if format == "webm" else "libx264"
    data = write([grey(i) for i in range(8)], format=format, codec=codec, start=start, last=last, options={"bf": "0"})
    video = read_video(data)
    assert values(video) == expected(range(8))
    assert [round(float(frame.mean())) for frame in video.frames([7, 2])] == expected([7, 2])
    if last is None:
        assert video.seconds == pytest.approx(0.8, abs=0.05)


def test_a_varying_frame_rate_is_measured_by_its_times():
    data = write([grey(i) for i in range(6)], format="matroska", times=[0, 100, 200, 1200, 1300, 2300])
    video = read_video(data)
    assert values(video) == expected(range(6))
    assert 2.2 < video.seconds < 3.5


def test_a_gif_whose_last_frame_is_shown_long():
    first, *others = [Image.fromarray(grey(i)) for i in range(4)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=[100, 100, 100, 9000])
    assert values(read_video(buffer.getvalue())) == expected(range(4))


TURNS = [  # a, b, c, d, and what they make of an array
    ((1, 0, 0, 1), lambda x: x),
    ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    ((1, 0, 0, -1), lambda x: x[::-1]),
    ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
]


def by_hand(pixels, a, b, c, d):
    """Each pixel where the matrix puts it."""
    height, width = pixels.shape[:2]
    moved = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in moved), min(y for _, y in moved)
    right, bottom = max(x for x, _ in moved), max(y for _, y in moved)
    rows = [[moved[x, y] for x in range(left, right + 1)] for y in range(top, bottom + 1)]
    return np.array(rows)


@pytest.mark.parametrize(("numbers", "turn"), TURNS)
def test_all_eight_display_matrices(numbers, turn):
    a, b, c, d = numbers
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    one = 1 << 16
    matrix = np.array([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30], np.int32)
    assert np.array_equal(displayed(pixels, matrix), by_hand(pixels, a, b, c, d))
    assert np.array_equal(displayed(pixels, matrix), turn(pixels))


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_matrix"), reason="this PyAV writes no display matrices")
@pytest.mark.parametrize(("numbers", "turn"), TURNS)
@pytest.mark.parametrize("format", ["mp4", "mov"])
def test_files_with_display_matrices(format, numbers, turn):
    a, b, c, d = numbers
    one = 1 << 16
    corner = np.zeros((48, 64, 3), np.uint8)
    corner[:20, :30] = 255
    data = write([corner] * 3, format=format, matrix=[a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
    shown, right = read_video(data).frames([1])[0], turn(corner)
    assert shown.shape == right.shape
    assert np.abs(shown.astype(int) - right).mean() < 8


def split_packets(data, format, dropped, damaged=()):
    """The same video without its first packets, or with rubbish in them."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=format) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if not packet.size or i < dropped:
                continue
            if i in damaged:
                start = b"\0\0\0\1\x65" if format == "mpegts" else b"\0\0\0\4\x7f"
                rubbish = av.Packet((start + b"\xff\xff\xff") * 4)
                rubbish.pts, rubbish.dts, rubbish.time_base = packet.pts, packet.dts, packet.time_base
                rubbish.is_keyframe = packet.is_keyframe
                packet = rubbish
            packet.stream = stream
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize(("dropped", "damaged"), [(2, ()), (0, (0,)), (0, (0, 1, 2))])
def test_leading_frames_that_cannot_be_decoded_are_left_out(format, dropped, damaged, caplog):
    frames = [grey(i) for i in range(16)]
    whole = write(frames, format=format, options={"g": "6", "bf": "0", "sc_threshold": "0"})
    with caplog.at_level(logging.WARNING):
        video = read_video(split_packets(whole, format, dropped, damaged))
        found = values(video)
    # The next keyframe is the seventh frame.
    assert found == expected(range(6, 16))
    assert "cannot be decoded, and are left out" in caplog.text


def test_cover_art_is_no_video(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 255)).save(jpeg, "JPEG")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as container:
        audio = container.add_stream("libmp3lame", rate=44_100)
        cover = container.add_stream("mjpeg")
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(jpeg.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 10)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for part in [packet, *audio.encode(frame), *audio.encode(None)]:
            container.mux(part)
    with pytest.raises(MediaError, match="has no video, only cover art"):
        read_video(buffer.getvalue())


def two_streams(default):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for i, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = (64, 48, "yuv420p") if i == 0 else (32, 24, "yuv420p")
            stream.disposition = av.stream.Disposition.default if i == default else av.stream.Disposition(0)
        for i in range(6):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(grey(i)[: stream.height, : stream.width], format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return buffer.getvalue()


def test_the_default_stream_is_the_video():
    assert [read_video(two_streams(i)).frames([0]).shape[1:3] for i in range(2)] == [(48, 64), (24, 32)]


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_what_is_cut_is_refused(format, tmp_path):
    frames = [np.random.RandomState(i).randint(0, 256, (48, 64, 3), dtype=np.uint8) for i in range(12)]
    data = write(frames, format=format, codec="mpeg4" if format == "avi" else "libx264")
    if format == "mp4":  # with its table first, as for streaming
        path = tmp_path / "a.mp4"
        with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    copy.mux(packet)
        data = path.read_bytes()
    assert len(read_video(data)) == 12
    with pytest.raises(MediaError, match="truncated"):
        read_video(data[: len(data) // 7 if format == "avi" else len(data) * 2 // 3])


def test_a_recording_that_was_never_finished_is_read_as_far_as_it_goes():
    class Pipe(io.RawIOBase):  # nothing can be written into its header later
        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with av.open(pipe, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "3", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(9):
            noise = np.random.RandomState(i).randint(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    whole = read_video(pipe.data)
    half = read_video(pipe.data[: len(pipe.data) * 3 // 4])
    assert len(whole) == 9
    assert 3 <= len(half) < 9
    assert values(half) == values(whole)[: len(half)]
