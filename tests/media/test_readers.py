"""Audio, videos, depth maps, thermal images and motion: whatever users have becomes the right values, or an error
that names the input and what is wrong with it."""

import base64
import io

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from hfvlm import media
from hfvlm.media import (
    MediaError,
    read_audio,
    read_audios,
    read_depth,
    read_depths,
    read_imu,
    read_imus,
    read_thermal,
    read_video,
    read_videos,
)
from hfvlm.media.imu import windows
from hfvlm.media.recordings import Recording, resample
from hfvlm.media.spectrograms import kaldi_fbank

RATE = 16_000
TONE = (np.sin(np.arange(RATE) * 0.05) / 2).astype(np.float32)


def wav(samples=TONE, rate=RATE, format="WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.atleast_2d(samples).T, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def encoded_video(format="mp4", codec="libx264", frames=40, size=(64, 48), **options) -> bytes:
    """Frames at 25 a second whose grey grows from one to the next, with keyframes between them."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12"} | options)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for i in range(frames):
            frame = np.full((size[1], size[0], 3), 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def video_with_audio() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE)
        frame = av.AudioFrame.from_ndarray(TONE[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encoded_image(array, format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


# Audio


def test_every_kind_of_audio_gives_the_same_samples(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(data := wav(subtype="FLOAT"))
    np.save(tmp_path / "a.npy", TONE)

    class Decoder:  # as torchcodec's, which `datasets` gives
        def get_all_samples(self):
            return type("Samples", (), {"data": torch.from_numpy(TONE)[None], "sample_rate": RATE})()

    for source in (
        path,
        str(path),
        data,
        io.BytesIO(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        {"array": TONE, "sampling_rate": RATE},
        "data:audio/wav;base64," + base64.b64encode(data).decode(),
        (TONE, RATE),
        (torch.from_numpy(TONE), RATE),
        (TONE.tolist(), RATE),
        (TONE[None], RATE),
        (TONE[:, None], RATE),
        (tmp_path / "a.npy", RATE),
        Decoder(),
    ):
        recording = read_audio(source)
        assert np.array_equal(recording.samples, TONE[None]), type(source)
        assert (recording.sampling_rate, recording.seconds) == (RATE, 1.0)


@pytest.mark.parametrize(
    ("format", "subtype", "error"), [("WAV", "PCM_16", 1e-4), ("FLAC", None, 1e-4), ("OGG", None, 0.05)]
)
def test_formats_of_audio(format, subtype, error):
    both = read_audio(wav(np.stack([TONE, -TONE]), format=format, subtype=subtype))
    assert both.samples.shape == (2, RATE)
    assert np.abs(both.samples[0] - TONE).max() < error
    assert np.abs(both.samples[1] + TONE).max() < error


def test_the_audio_of_a_video():
    recording = read_audio(video_with_audio())
    assert recording.sampling_rate == RATE
    assert abs(recording.samples.shape[1] - RATE) < 2048
    with pytest.raises(MediaError, match="has no audio"):
        read_audio(encoded_video())


def test_integers_are_scaled_by_their_type():
    assert read_audio((np.array([0, 16384, -32768], np.int16), 8000)).samples.tolist() == [[0, 0.5, -1]]
    assert read_audio((np.array([128, 255, 0], np.uint8), 8000)).samples.tolist() == [[0, 127 / 128, -1]]


def test_batches_of_audio_keep_their_order():
    batch = read_audios([(TONE * i / 20, RATE) for i in range(20)])
    assert np.allclose([r.samples.max() for r in batch], [TONE.max() * i / 20 for i in range(20)])
    assert len(read_audios(TONE, sampling_rate=RATE)) == len(read_audios(TONE.tolist(), sampling_rate=RATE)) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (wav()[:RATE], "truncated"),
        (wav(format="FLAC")[:3000], "damaged or truncated"),
        (wav(format="OGG")[:2000], "truncated|damaged"),
        (video_with_audio()[:3000], "damaged"),
        (b"", "damaged"),
        (b"hello world" * 10, "not a video or audio"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:1/seg.ts\n", "not a video or audio"),
        ("nope.wav", "nope.wav: no such file"),
        ("http://example.org/a.wav", "URLs are refused"),
        (TONE, "no sampling rate of its own"),
        ((TONE, 0), "0 Hz is none"),
        ((TONE, float("nan")), "nan Hz is none"),
        ((TONE, 1e9), "Hz is none"),
        ((np.zeros(0), RATE), "is empty"),
        ((np.full(9, np.nan), RATE), "NaN or infinity"),
        ((TONE * 30_000, RATE), "Divide 16-bit values by 32768"),
        ((np.zeros((100, 100)), RATE), "is not \\(N,\\)"),
        ((np.zeros(9, np.int64), RATE), "no audio format"),
        ((np.array(["a"]), RATE), "not real numbers"),
        (3, "audio is a path"),
        (None, "audio is a path"),
    ],
)
def test_bad_audio_is_named(source, words):
    with pytest.raises(MediaError, match=words) as error:
        read_audios([(TONE, RATE), source])
    assert "audio 1: " in str(error.value)


def test_audio_of_absurd_length_are_refused(monkeypatch):
    monkeypatch.setattr(media.recordings, "MAX_VALUES", 1000)
    for source in (wav(), wav(format="FLAC"), video_with_audio(), (TONE, RATE)):
        with pytest.raises(MediaError, match="more than 1000 are refused"):
            read_audio(source)
    header = wav()[:40] + (2**31 - 100).to_bytes(4, "little") + b"\0" * 4000  # claims two gigabytes
    with pytest.raises(MediaError, match="more than 1000 are refused"):
        read_audio(header)


# Resampling and spectra, against independent formulations


@pytest.mark.parametrize(("old", "new"), [(8_000, 16_000), (44_100, 16_000), (50, 400), (16_000, 11_025)])
def test_resampling_keeps_a_tone(old, new):
    hertz = min(old, new) / 12
    tone = lambda rate: torch.sin(2 * torch.pi * hertz * torch.arange(rate * 2) / rate)[None]  # noqa: E731
    resampled = resample(tone(old), old, new)
    assert resampled.shape == (1, 2 * new)
    inner = slice(new // 4, -new // 4)
    assert (resampled - tone(new))[:, inner].abs().max() < 1e-2


def test_rates_without_a_common_measure_are_resampled():
    assert abs(resample(torch.randn(6, 2000), 198.37, 400).shape[1] - 2000 * 400 / 198.37) < 3


def test_the_filter_bank_against_a_loop():
    wave = torch.randn(1200, dtype=torch.float64)
    bank = kaldi_fbank(wave, RATE, 24)
    assert bank.shape == (6, 24)
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(RATE / 2), 26)
    for frame in (0, 5):
        piece = wave[frame * 160 : frame * 160 + 400].numpy()
        piece = piece - piece.mean()
        piece = piece - 0.97 * np.concatenate([piece[:1], piece[:-1]])
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(400), 512)) ** 2
        for b in (0, 7, 23):
            energy = 0.0
            for k in range(256):
                place = mel(k * RATE / 512)
                rise = (place - edges[b]) / (edges[b + 1] - edges[b])
                fall = (edges[b + 2] - place) / (edges[b + 2] - edges[b + 1])
                energy += max(0.0, min(rise, fall)) * spectrum[k]
            assert bank[frame, b].item() == pytest.approx(np.log(energy), abs=1e-3)
    with pytest.raises(ValueError, match="less than a frame"):
        kaldi_fbank(wave[:399], RATE, 24)


# Videos


@pytest.mark.parametrize(
    ("format", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3"}),
        ("matroska", "libx264", {"bf": "3", "x264-params": "open-gop=1"}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {"bf": "2"}),
        ("mpegts", "libx264", {"bf": "3"}),
        ("h264", "libx264", {"bf": "2"}),
        ("gif", "gif", {}),
    ],
)
def test_any_frame_of_any_video(format, codec, options, tmp_path):
    data = encoded_video(format, codec, **options)
    every = [f.to_ndarray(format="rgb24") for f in av.open(io.BytesIO(data)).decode(video=0)]
    path = tmp_path / f"a.{format}"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data), {"bytes": data}, {"path": str(path)}):
        found = read_video(source)
        assert (len(found), found.fps, found.seconds) == (40, 25.0, 1.6)
        places = [0, 3, 39, 20, 5, 5]
        assert np.array_equal(found.frames(places), np.stack([every[i] for i in places])), type(source)
        assert np.array_equal(np.stack(list(found.stream(range(40)))), np.stack(every)), type(source)


def test_every_kind_of_frames_gives_the_same_video(monkeypatch):
    monkeypatch.setattr(media.video, "DECODED_TOGETHER", 2)
    frames = np.random.RandomState(0).randint(0, 256, (5, 24, 32, 3), dtype=np.uint8)

    class Decoder:  # as torchcodec's, which `datasets` gives
        metadata = type("Metadata", (), {"average_fps": 2.5})

        def __len__(self):
            return 5

        def get_frames_at(self, indices):
            return type("Frames", (), {"data": torch.from_numpy(frames).permute(0, 3, 1, 2)[indices]})()

    for source in (
        (frames, 2.5),
        (torch.from_numpy(frames).permute(0, 3, 1, 2), 2.5),
        (list(frames), 2.5),
        ([Image.fromarray(frame) for frame in frames], 2.5),
        ([encoded_image(frame) for frame in frames], 2.5),
        Decoder(),
    ):
        found = read_video(source)
        assert (len(found), found.fps) == (5, 2.5)
        assert np.array_equal(found.frames([4, 0, 2]), frames[[4, 0, 2]]), type(source)
    assert [len(v) for v in read_videos([list(frames), frames, (frames[:2], 1.0)])] == [5, 5, 2]
    assert len(read_videos(np.stack([frames, frames]), fps=2)) == 2


FRAMES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (encoded_video()[:1000], "damaged"),
        (encoded_video("matroska")[:1600], "truncated"),
        (encoded_video("webm", "libvpx-vp9")[:900], "truncated"),
        (b"", "damaged"),
        (b"no video" * 20, "not a video or audio"),
        (wav(), "has no video"),
        ("nope.mp4", "nope.mp4: no such file"),
        ("https://example.org/a.mp4", "URLs are refused"),
        (Image.new("RGB", (8, 8)), "one image is no video"),
        (np.zeros((8, 8, 3), np.uint8), "is not \\(T, H, W, 3\\)"),
        (FRAMES[:0], "0 frames"),
        ([], "0 frames"),
        ((FRAMES, 0), "no frame rate"),
        ((FRAMES, float("nan")), "no frame rate"),
        (3, "a video is a path"),
    ],
)
def test_bad_videos_are_named(source, words):
    with pytest.raises(MediaError, match=words) as error:
        read_videos([(FRAMES, 1.0), source])
    assert "video 1: " in str(error.value)


def test_bad_frames_are_named(monkeypatch):
    with pytest.raises(MediaError, match="frame 1: .*NaN"):
        read_video([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)]).frames([0, 1])
    with pytest.raises(MediaError, match="frames of different sizes"):
        read_video([FRAMES[0], FRAMES[0, :4]]).frames([0, 1])
    with pytest.raises(MediaError, match="no frames \\[4\\] in a video of 4"):
        read_video((FRAMES, 1.0)).frames([4])
    damaged = read_video((FRAMES, 1.0))
    monkeypatch.setattr(damaged, "_decode", lambda places: iter(FRAMES[:1]))
    with pytest.raises(MediaError, match="damaged or truncated; 2 frames are not there"):
        damaged.frames([0, 1, 2])
    with pytest.raises(MediaError, match="no rate of their own"):
        _ = read_video(FRAMES).seconds
    monkeypatch.setattr(media.video, "MAX_DECODED_BYTES", 500)
    with pytest.raises(MediaError, match="Take fewer"):
        read_video((FRAMES, 1.0)).frames([0, 1, 2])
    monkeypatch.setattr(media.video, "MAX_FRAMES", 3)
    for source in ((FRAMES, 1.0), encoded_video()):
        with pytest.raises(MediaError, match="a video has 1 to 3"):
            read_video(source)
    monkeypatch.setattr(media.video, "MAX_PIXELS", 100)
    with pytest.raises(MediaError, match="64 x 48 are refused"):
        read_video(encoded_video())


# Depth

METRES = np.random.RandomState(0).uniform(0.5, 8, (6, 9)).round(3).astype(np.float32)
MILLIMETRES = np.rint(METRES * 1000).astype(np.uint16)


def test_every_kind_of_depth_map_gives_the_same_metres(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data := encoded_image(MILLIMETRES))
    np.save(tmp_path / "a.npy", METRES)
    for source in (
        path,
        data,
        {"bytes": data},
        Image.open(path),
        encoded_image(METRES, "TIFF"),
        tmp_path / "a.npy",
        METRES,
        METRES[None],
        METRES[..., None],
        METRES.astype(np.float64),
        torch.from_numpy(METRES),
        MILLIMETRES,
        MILLIMETRES.astype(np.int32),
    ):
        depth = read_depth(source)
        assert depth.dtype == np.float32
        assert np.allclose(depth, METRES, atol=1e-4), type(source)
    assert len(read_depths(np.stack([METRES] * 3))) == 3
    assert len(read_depths([METRES, data])) == 2
    assert read_depth(np.zeros((2, 2), np.uint16)).tolist() == [[0, 0], [0, 0]]


def test_conventions_of_datasets():
    millimetres = np.array([[1500, 9000]], np.uint16)
    rotated = (millimetres << 3) | (millimetres >> 13)
    assert read_depth(rotated, encoding="sun_rgbd").tolist() == [[1.5, 8.0]]
    assert read_depth(np.array([[256, 512]], np.uint16), encoding="kitti").tolist() == [[1.0, 2.0]]
    assert read_depth(np.array([[5000]], np.uint16), encoding="tum").tolist() == [[1.0]]
    with pytest.raises(ValueError, match="encoding must be one of millimetres"):
        read_depth(rotated, encoding="inches")


COLOURS = np.random.RandomState(0).randint(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (encoded_image(MILLIMETRES)[:60], "damaged or truncated"),
        (b"", "not an image"),
        (b"depth", "not an image"),
        ("nope.png", "no such file"),
        ("https://example.org/a.png", "URLs are refused"),
        (encoded_image(COLOURS), "is in colours"),
        (encoded_image(COLOURS[..., 0]), "uint8 holds no distances"),
        (METRES > 3, "bool holds no distances"),
        (COLOURS.astype(np.float32), "is not \\(H, W\\)"),
        (np.zeros((0, 4), np.float32), "is not \\(H, W\\)"),
        (np.full((2, 2), np.nan), "contains NaN or infinity. Set pixels without a measurement to 0"),
        (-METRES, "no depth in metres"),
        (METRES * 1000, "Pass millimetres as integers"),
        (np.full((2, 2), 70_000), "16 bits a pixel"),
        (np.broadcast_to(np.float32(1), (20_000, 20_000)), "Scale it down"),
        (3, "an image is a path"),
    ],
)
def test_bad_depth_maps_are_named(source, words):
    with pytest.raises(MediaError, match=words):
        read_depths([METRES, source])


# Thermal


def test_thermal_images_go_from_cold_to_hot():
    grey = np.arange(54, dtype=np.uint8).reshape(6, 9) * 4
    counts = (grey.astype(np.uint16) + 7000) * 2
    expected = grey.astype(np.float32) / 255
    for source in (
        grey,
        encoded_image(grey),
        encoded_image(np.stack([grey] * 3, axis=-1)),
        expected,
        torch.from_numpy(expected),
    ):
        assert np.allclose(read_thermal(source), expected, atol=1e-6), type(source)
    for source in (counts, encoded_image(counts), encoded_image(counts, "TIFF")):
        assert np.allclose(read_thermal(source), grey / 212, atol=1e-6), type(source)
    celsius = np.array([[5.0, 10, 25, 40, 50]])
    assert np.allclose(read_thermal(celsius, limits=(10, 40)), [[0, 0, 0.5, 1, 1]])
    assert read_thermal(np.full((2, 2), 7000, np.uint16)).tolist() == [[0, 0], [0, 0]]
    assert [len(t) for t in media.read_thermals(np.stack([grey, grey]))] == [6, 6]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (encoded_image(COLOURS), "is in colours"),
        (np.full((2, 2), np.nan), "contains NaN"),
        (np.full((2, 2), 20.5), "coldest and the hottest as limits"),
        (np.zeros((0, 2), np.uint8), "is not \\(H, W\\)"),
        (np.zeros((2, 2, 5), np.uint8), "is not \\(H, W\\)"),
        (encoded_image(COLOURS[..., 0])[:50], "damaged or truncated"),
        (b"warm", "not an image"),
        (np.broadcast_to(np.uint8(1), (20_000, 20_000)), "Scale it down"),
        (None, "an image is a path"),
    ],
)
def test_bad_thermal_images_are_named(source, words):
    with pytest.raises(MediaError, match=words):
        media.read_thermals([METRES / 10, source])


def test_limits_have_an_order():
    with pytest.raises(ValueError, match="coldest, hottest"):
        read_thermal(METRES, limits=(40, 10))


# Motion

TRACE = np.random.RandomState(0).standard_normal((6, 400)).astype(np.float32)


def test_every_kind_of_trace_gives_the_same_samples(tmp_path):
    np.save(tmp_path / "a.npy", TRACE)
    for source in (
        (TRACE, 200),
        (TRACE.T, 200),
        (torch.from_numpy(TRACE), 200),
        (TRACE.tolist(), 200),
        (tmp_path / "a.npy", 200),
        {"array": TRACE, "sampling_rate": 200},
        {"accelerometer": TRACE[:3].T, "gyroscope": TRACE[3:].T, "sampling_rate": 200},
    ):
        trace = read_imu(source)
        assert np.array_equal(trace.samples, TRACE), type(source)
        assert trace.seconds == 2.0
    assert len(read_imus(np.stack([TRACE, TRACE]), sampling_rate=200)) == 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TRACE, "no sampling rate of its own"),
        ((TRACE, 0), "0 Hz is none"),
        ((TRACE[:5], 200), "is not \\(6, N\\) or \\(N, 6\\)"),
        ((TRACE[0], 200), "is not \\(6, N\\)"),
        ((TRACE[:, :0], 200), "is empty"),
        ((np.where(TRACE > 2, np.nan, TRACE), 200), "contains NaN"),
        ((TRACE * 20_000, 200), "not raw counts"),
        ({"accelerometer": TRACE[:3], "gyroscope": TRACE[3:, :9], "sampling_rate": 200}, "differ"),
        ({"accelerometer": TRACE[:3], "sampling_rate": 200}, "gyroscope: shape \\(\\) is not"),
        (b"\x93NUMPYrubbish", "damaged or truncated array"),
        (b"trace", "an array with its rate"),
        ("nope.npy", "no such file"),
        (None, "an array with its rate"),
    ],
)
def test_bad_traces_are_named(source, words):
    with pytest.raises(MediaError, match=words) as error:
        read_imus([(TRACE, 200), source])
    assert "IMU trace 1: " in str(error.value)


def test_traces_of_absurd_length_are_refused(monkeypatch):
    monkeypatch.setattr(media.recordings, "MAX_VALUES", 1000)
    with pytest.raises(MediaError, match="2400 samples; more than 1000"):
        read_imu((TRACE, 200))


def test_windows_of_a_trace():
    ramp = Recording(np.arange(6 * 1000, dtype=np.float32).reshape(6, 1000), 400)
    whole = torch.from_numpy(ramp.samples)
    assert torch.equal(windows(ramp, 400, 200, 1), whole[None, :, 400:600])
    assert torch.equal(windows(ramp, 400, 200, 3), torch.stack([whole[:, i : i + 200] for i in (0, 400, 800)]))
    short = windows(ramp, 400, 1100, 1)
    assert short.shape == (1, 6, 1100)
    assert torch.equal(short[0, :, 999:], whole[:, -1:].expand(-1, 101))
    # Gravity stays where it is up to the edges.
    still = Recording(np.full((6, 100), 9.81, np.float32), 50)
    assert torch.allclose(windows(still, 400, 800, 1), torch.tensor(9.81))
