"""What headers claim of a file's length neither shortens nor condemns it; what is cut is refused."""

import io
import struct
import wave

import av
import numpy as np
import pytest
import soundfile

from hfvlm.media import MediaError, read_audio

RATE = 16_000
TONE = (0.5 * np.sin(np.arange(RATE) * 0.05)).astype(np.float32)


def audio(format, subtype=None, samples=TONE, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def at(data, mark, offset, value):
    """`data` with bytes of `value` where `mark` stands, so many bytes on."""
    place = data.index(mark) + offset
    return data[:place] + value + data[place + len(value) :]


def little(value, size=4):
    return (value % 256**size).to_bytes(size, "little")


def big(value, size=4):
    return (value % 256**size).to_bytes(size, "big")


def total(data, samples):
    """A FLAC file that claims so many samples."""
    packed = int.from_bytes(data[18:26], "big")
    return data[:18] + big((packed >> 36 << 36) | samples, 8) + data[26:]


WAV, AIFF, AU, CAF, W64, RF64, FLAC = (audio(f, "PCM_16") for f in ("WAV", "AIFF", "AU", "CAF", "W64", "RF64", "FLAC"))
LONG_MP3 = audio("MP3", samples=np.tile(TONE, 8))
W64_DATA = b"data\xf3\xac\xd3\x11"
SIZE = 2 * RATE

CLAIMS = {
    "wav, no data": at(WAV, b"data", 4, little(0)),
    "wav, unknown data": at(WAV, b"data", 4, little(-1)),
    "wav, as much as 2 GiB": at(WAV, b"data", 4, little(0x7FFFFFFF - 36)),
    "wav, too little data": at(WAV, b"data", 4, little(1000)),
    "wav, too much data": at(WAV, b"data", 4, little(SIZE + 5000)),
    "wav, nothing known": at(at(WAV, b"data", 4, little(0)), b"RIFF", 4, little(0)),
    "wav, both unknown": at(at(WAV, b"data", 4, little(-1)), b"RIFF", 4, little(-1)),
    "wav, both flushed early": at(at(WAV, b"data", 4, little(400)), b"RIFF", 4, little(436)),
    "wav, another file's": at(WAV, b"RIFF", 4, little(31_239_256)),
    "aiff, no data": at(AIFF, b"SSND", 4, big(0)),
    "aiff, unknown data": at(AIFF, b"SSND", 4, big(-1)),
    "aiff, too little data": at(AIFF, b"SSND", 4, big(1008)),
    "aiff, no frames": at(AIFF, b"COMM", 10, big(0)),
    "aiff, no form": at(AIFF, b"FORM", 4, big(0)),
    "au, no data": at(AU, b".snd", 8, big(0)),
    "au, unknown data": at(AU, b".snd", 8, big(-1)),
    "au, too little data": at(AU, b".snd", 8, big(1000)),
    "caf, no data": at(CAF, b"data", 4, big(0, 8)),
    "caf, unknown data": at(CAF, b"data", 4, big(-1, 8)),
    "caf, too little data": at(CAF, b"data", 4, big(1004, 8)),
    "w64, no data": at(W64, W64_DATA, 16, little(0, 8)),
    "w64, unknown data": at(W64, W64_DATA, 16, little(-1, 8)),
    "w64, too little data": at(W64, W64_DATA, 16, little(1024, 8)),
    "rf64, no data": at(RF64, b"ds64", 8, bytes(24)),
    "rf64, unknown data": at(RF64, b"ds64", 8, b"\xff" * 24),
    "flac, unknown": total(FLAC, 0),
    "flac, too few": total(FLAC, 5000),
    "flac, too many": total(FLAC, 10**6),
    "flac, never finished": total(FLAC, 0)[:26] + bytes(16) + FLAC[42:],
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claimed_length_changes_nothing(name):
    found = read_audio(CLAIMS[name]).samples
    assert found.shape == (1, RATE)
    assert np.abs(found[0] - TONE).max() < 1e-4


def test_chunks_and_tags_after_the_samples_are_no_samples():
    for extra in (b"LIST" + little(4) + b"INFO", b"TAG" + bytes(125), b"ID3\x03\0\0\0\0\0\0"):
        assert read_audio(WAV + extra).samples.shape == (1, RATE)
        assert read_audio(at(WAV, b"RIFF", 4, little(0)) + extra).samples.shape == (1, RATE)
    odd = audio("WAV", "PCM_U8", TONE[:8001])
    assert read_audio(odd[: 44 + 8001]).samples.shape == (1, 8001)
    assert read_audio(odd[: 44 + 8001] + b"LIST" + little(4) + b"INFO").samples.shape == (1, 8001)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 3, RATE, 0, "NONE", ""))
        file.writeframes(b"\1\2\3" * 8001)
    assert read_audio(buffer.getvalue()).samples.shape == (1, 8001)


@pytest.mark.parametrize(
    "data",
    [WAV, AIFF, AU, CAF, W64, RF64, FLAC, audio("OGG"), audio("OGG", "OPUS"), LONG_MP3, audio("WAV", "ULAW")],
)
def test_what_is_cut_is_refused(data):
    for share in (0.3, 0.5, 0.9):
        with pytest.raises(MediaError, match="truncated|damaged"):
            read_audio(data[: int(len(data) * share)])


def test_flac_that_is_cut_between_two_frames_is_refused():
    with av.open(io.BytesIO(FLAC)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    with pytest.raises(MediaError, match="of 16000 samples are there"):
        read_audio(FLAC[: packets[2][0]] if packets[2][0] else FLAC[: -packets[-1][1]])


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "AIFF"])
def test_several_recordings_are_one(format):
    other = TONE[::-1].copy()
    parts = [audio(format, samples=samples) for samples in (TONE, other)]
    found = read_audio(b"".join(parts)).samples
    assert np.array_equal(found, np.concatenate([read_audio(part).samples for part in parts], axis=1))
    with pytest.raises(MediaError, match="recordings of different kinds"):
        read_audio(parts[0] + audio(format, samples=TONE, rate=8_000))


def test_several_mp3_files_in_one():
    one = audio("MP3")
    for between in (b"", b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)):
        length = read_audio(one + between + one).samples.shape[1]
        assert 2 * RATE <= length < 2 * RATE + 4 * 1152


def mp3(samples, **options):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, **options)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"options": {"flags": "+qscale", "global_quality": str(4 * 118)}}])
def test_mp3_without_a_header_of_its_length(options):
    noise, quiet = np.random.RandomState(0).normal(0, 0.2, 3 * RATE), np.zeros(9 * RATE)
    for parts in ((noise, quiet), (quiet, noise)):
        samples = np.concatenate(parts).astype(np.float32)
        found = read_audio(mp3(samples, **options)).samples.shape[1]
        assert 0 <= found - len(samples) <= 2 * 1152 + 1105


def test_an_mp3_that_claims_more_frames_than_it_has_is_read_whole():
    one = audio("MP3")
    assert read_audio(at(one, b"Xing", 8, big(100_000))).samples.shape[1] >= RATE


def test_audio_is_the_default_stream_and_cut_mp4_is_refused(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("aac", rate=RATE)
        frame = av.AudioFrame.from_ndarray(np.tile(TONE, 4)[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert abs(read_audio(data).samples.shape[1] - 4 * RATE) < 2048
    with pytest.raises(MediaError, match="truncated"):
        read_audio(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    ("format", "codec"), [("mov", "pcm_s16le"), ("mov", "pcm_f32le"), ("avi", "pcm_s16le"), ("matroska", "pcm_s16le")]
)
def test_samples_in_containers_of_videos(format, codec):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.tile(TONE, 3)[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        for part in av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=RATE).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    assert np.abs(read_audio(data).samples - np.tile(TONE, 3)).max() < 1e-4
    with pytest.raises(MediaError, match="truncated|damaged"):
        read_audio(data[: len(data) // 2])


def test_a_claimed_length_reserves_no_memory():
    header = WAV[:40] + struct.pack("<I", 0x7FFFF000 - 1) + bytes(100)
    with pytest.raises(MediaError, match="truncated"):
        read_audio(header)


def test_files_are_read_from_their_start_and_in_binary(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    with path.open("rb") as file:
        for _ in range(2):
            assert read_audio(file).samples.shape == (1, RATE)
    with pytest.raises(MediaError, match="cannot be read|closed"):
        read_audio(file)
    with path.open(encoding="latin-1") as text, pytest.raises(MediaError, match="mode 'rb'"):
        read_audio(text)
    with pytest.raises(MediaError, match="is a folder"):
        read_audio(tmp_path)
    for view in (bytearray(WAV), memoryview(WAV)):
        assert read_audio(view).samples.shape == (1, RATE)
