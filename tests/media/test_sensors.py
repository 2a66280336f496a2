"""Images, depth maps, thermal images and motion: the file's own numbers, upright, and a word where they look wrong."""

import base64
import io
import logging
import struct
import weakref
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, TiffImagePlugin

from hfvlm.inference.embedder import Embedder
from hfvlm.media import (
    MediaError,
    read_audio,
    read_audios,
    read_depth,
    read_depths,
    read_image,
    read_images,
    read_imu,
    read_imus,
    read_thermal,
    read_video,
    sources,
)
from hfvlm.media.images import to_8_bits
from hfvlm.media.video import Video
from hfvlm.models.clip import HfvlmCLIPImageProcessor
from hfvlm.models.imagebind import HfvlmImageBindDepthFeatureExtractor, HfvlmImageBindVideoFeatureExtractor
from hfvlm.models.languagebind import HfvlmLanguageBindVideoFeatureExtractor
from hfvlm.models.video_chatgpt import HfvlmVideoChatGPTFeatureExtractor
from hfvlm.training.data import ContrastiveCollator

Y, X = np.mgrid[:30, :40]
PHOTO = Image.fromarray(np.dstack([X * 6, Y * 8, (X > 20) * 200]).clip(0, 255).astype(np.uint8))


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def oriented(orientation, format="PNG", image=PHOTO, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, format, exif=exif, **options)


# Upright

TURNED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # an orientation, and what `transpose` makes it upright


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_every_road_to_an_image_is_upright(format, orientation, tmp_path):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(format, {})
    data = oriented(orientation, format, **options)
    (tmp_path / "a").write_bytes(data)
    right = np.asarray(Image.open(io.BytesIO(data)).transpose(TURNED[orientation]))
    url = "data:image/x;base64," + base64.b64encode(data).decode()
    for source in (tmp_path / "a", data, io.BytesIO(data), Image.open(tmp_path / "a"), {"bytes": data}, url):
        image = read_image(source)
        assert np.array_equal(np.asarray(image), right), type(source)
        assert np.array_equal(np.asarray(read_image(image)), right)  # once read, it is not turned again
        assert np.asarray(read_image(source, upright=False)).shape == (30, 40, 3)
    assert read_video([data, data]).frames([1])[0].shape == right.shape


def test_a_setting_keeps_pixels_as_they_are_stored(tmp_path):
    data = oriented(6)
    stored, upright = (HfvlmCLIPImageProcessor(size=24, upright=upright) for upright in (False, True))
    lying = stored(PHOTO)["pixel_values"][0]
    assert np.array_equal(stored(data)["pixel_values"][0], lying)
    assert np.array_equal(upright(data, upright=False)["pixel_values"][0], lying)
    assert np.array_equal(upright(data)["pixel_values"][0], stored(PHOTO.transpose(4))["pixel_values"][0])
    stored.save_pretrained(tmp_path)
    assert HfvlmCLIPImageProcessor.from_pretrained(tmp_path).upright is False


def test_depth_and_thermal_images_are_upright():
    values = (np.arange(12).reshape(3, 4) * 500 + 500).astype(np.uint16)
    data = oriented(6, image=Image.fromarray(values))
    assert np.allclose(read_depth(data), np.rot90(values, -1) / 1000)
    assert read_thermal(data).shape == (4, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_is_rubbish_condemns_no_image():
    data = saved(PHOTO, "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\xff" * 40)
    assert read_image(data).size == (40, 30)


def test_one_file_one_embedding(clip_folder, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(oriented(6, "JPEG", quality=100))
    embedder = Embedder.from_pretrained(clip_folder, device="cpu")
    roads = [path, str(path), path.read_bytes(), Image.open(path), {"bytes": path.read_bytes()}, read_image(path)]
    vectors = embedder.encode(image=roads)
    assert np.abs(vectors - vectors[0]).max() < 1e-6
    lying = embedder.encode(image=Image.open(path).convert("RGB").copy(), options={"image": {"upright": False}})
    assert np.abs(lying - vectors[0]).max() > 1e-3

    collator = ContrastiveCollator(embedder.processor)
    row = collator.read({"image": str(path), "text": "a one"}, None)
    assert row["image"].size == (30, 40)
    embedder.processor.image_processor.upright = False
    assert collator.read({"image": str(path), "text": "a one"}, None)["image"].size == (40, 30)


# In parts


def test_a_batch_is_never_decoded_as_a_whole(monkeypatch):
    monkeypatch.setattr(sources, "THREADS", 2)
    alive, most = [0], [0]

    def counted(*args, **options):
        image = read_image(*args, **options)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(image, lambda: alive.__setitem__(0, alive[0] - 1))
        return image

    monkeypatch.setattr("hfvlm.processing.images.read_image", counted)
    batch = [saved(PHOTO, "PNG")] * 24
    pixels = HfvlmCLIPImageProcessor(size=8)(batch)["pixel_values"]
    assert len(pixels) == 24
    assert most[0] <= 4


@pytest.mark.parametrize(
    "extractor",
    [
        HfvlmImageBindVideoFeatureExtractor(size=8),
        HfvlmLanguageBindVideoFeatureExtractor(size=8),
        HfvlmVideoChatGPTFeatureExtractor(size=8),
    ],
)
def test_frames_are_resized_one_by_one(extractor, monkeypatch):
    frames = np.random.RandomState(0).randint(0, 256, (40, 24, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(Video, "frames", lambda *_: pytest.fail("all frames at once"))
    found = extractor([(frames, 8.0), (frames[:3], 8.0)], return_tensors="np")["pixel_values_videos"]
    assert len(found) == 2
    assert np.isfinite(found).all()


# Bits


def with_chunk(png, kind, data):
    chunk = struct.pack(">I", len(data)) + kind + data
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(kind + data)) + png[33:]


def test_images_of_twelve_bits_are_as_bright_as_their_files_say(caplog):
    ramp = np.linspace(0, 4095, 40)[None].repeat(30, 0).astype(np.uint16)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095
    png, tiff = saved(Image.fromarray(ramp), "PNG"), saved(Image.fromarray(ramp), "TIFF", tiffinfo=tags)
    for image in (read_image(with_chunk(png, b"sBIT", b"\x0c")), read_image(tiff), read_image(png, bits=12)):
        assert np.abs(np.asarray(to_8_bits(image)).astype(int) - ramp // 16).max() <= 1
    assert "bits=12" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert np.asarray(to_8_bits(read_image(png))).max() == 15
    assert "pass hfvlm.media.read_image(source, bits=12)" in caplog.text
    # What PNG asks for: twelve bits spread over all sixteen.
    dark = (ramp // 8) << 4
    compliant = with_chunk(saved(Image.fromarray(dark), "PNG"), b"sBIT", b"\x0c")
    assert np.array_equal(np.asarray(read_image(compliant)), dark)


def test_integers_that_fit_no_image_are_refused():
    for values in ([0, 70_000], [-5, 10]):
        image = Image.fromarray(np.array([values] * 2, np.int32))
        with pytest.raises(MediaError, match="fit neither 8 nor 16 bits"):
            HfvlmCLIPImageProcessor(size=8)(saved(image, "TIFF"))


@pytest.mark.parametrize("shape", [(3, 9, 4), (4, 9, 4), (1, 9, 4), (3, 9, 1)])
def test_arrays_that_may_be_read_either_way_are_refused(shape):
    with pytest.raises(MediaError, match=r"may be \(H, W, C\) or \(C, H, W\)"):
        read_image(np.zeros(shape, np.uint8))


def test_base64_in_lines_and_folders(tmp_path):
    data = saved(PHOTO, "PNG")
    for body in (base64.encodebytes(data).decode(), base64.encodebytes(data).decode().replace("\n", "\r\n")):
        assert read_image("data:image/png;base64," + body).size == (40, 30)
    escaped = base64.b64encode(data).decode().replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    assert read_image("data:image/png;base64," + escaped).size == (40, 30)
    for read in (read_image, read_audio, read_depth, read_thermal):
        with pytest.raises(MediaError, match="is a folder"):
            read(tmp_path)


def test_batches_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(PHOTO, "PNG"))
    path = str(tmp_path / "a.png")
    for batch in ([path] * 2, (path, path), np.array([path] * 2), pd.Series([path] * 2), (path for _ in range(2))):
        assert [image.size for image in read_images(batch)] == [(40, 30)] * 2, type(batch)
    wave = (np.zeros(800, np.float32), 8000)
    assert [len(read_audios(batch)) for batch in ([wave] * 2, iter([wave] * 2), pd.Series([wave] * 2))] == [2, 2, 2]
    assert len(read_depths(pd.Series([np.ones((2, 2))] * 3))) == 3
    pixels = HfvlmCLIPImageProcessor(size=8)(path for _ in range(3))["pixel_values"]
    assert len(pixels) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_tensors_of_every_floating_type(dtype):
    grid = torch.full((6, 8), 0.5).to(dtype)
    assert np.asarray(read_image(grid)).max() == 128
    assert read_depth(grid).max() == 0.5
    assert read_thermal(grid).max() == 0.5
    assert read_audio((grid.flatten(), 8000)).samples.max() == 0.5
    assert read_audio(([grid[0], grid[1]], 8000)).samples.shape == (2, 8)


# Depth


@pytest.mark.parametrize("most", [5000, 9000, 65535])
def test_a_grey_map_holds_its_own_integers(most):
    values = np.array([[1, 2, 3], [1500, most, 0]], np.uint16)
    binary = b"P5\n# from a sensor\n3 2\n%d\n" % most + values.astype(">u2").tobytes()
    plain = b"P2 3 2 %d " % most + b" ".join(b"%d" % value for value in values.flat)
    for data in (binary, plain):
        assert np.allclose(read_depth(data), values / 1000, atol=1e-6)
    with pytest.raises(MediaError, match="truncated"):
        read_depth(binary[:-1])
    if most < 65535:
        with pytest.raises(MediaError, match="stretches the values of a PGM; pass its path"):
            read_depth(Image.open(io.BytesIO(binary)))


def test_holes_stay_holes():
    metres = np.ma.masked_greater(np.array([[1.5, 999.0], [2.0, np.nan]]), 900)
    metres.mask |= np.isnan(metres.data)
    assert read_depth(metres).tolist() == [[1.5, 0], [2.0, 0]]
    counts = np.ma.masked_equal(np.array([[1500, 65535]], np.uint16), 65535)
    assert read_depth(counts).tolist() == [[1.5, 0]]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[42113] = "-9999"
    tiff = saved(Image.fromarray(np.array([[1.5, -9999]], np.float32)), "TIFF", tiffinfo=tags)
    assert read_depth(tiff).tolist() == [[1.5, 0]]
    with pytest.raises(MediaError, match="masked values"):
        read_thermal(counts)
    with pytest.raises(MediaError, match="masked values"):
        read_audio((np.ma.masked_array([0.1, 9.0], [False, True]), 8000))


def test_maps_beyond_what_a_model_knows(caplog):
    extractor = HfvlmImageBindDepthFeatureExtractor(size=8)
    with pytest.raises(MediaError, match="depth map 1: ndarray: depths in 500..500 m, far beyond the 50 m"):
        extractor([np.full((9, 9), 1.0), np.full((9, 9), 500.0)])
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        extractor(np.full((9, 9), 90.0))
    assert "most are beyond the 50 m" in caplog.text


# Thermal


def test_one_hot_pixel_is_named(caplog):
    counts = np.random.RandomState(0).randint(7000, 7400, (40, 40)).astype(np.uint16)
    read_thermal(counts)
    assert not caplog.text
    counts[3, 4] = 65535
    with caplog.at_level(logging.WARNING):
        found = read_thermal(counts)
    assert "pass limits=(7" in caplog.text
    assert np.median(found) < 0.01  # as it was
    assert 0.3 < np.median(read_thermal(counts, limits=(7000, 7400))) < 0.7
    for limits in ((40, 10), (1, 1), (1, np.nan), (1,), "ab", (0, np.inf)):
        with pytest.raises(ValueError, match="limits must be"):
            read_thermal(counts, limits=limits)


# Motion

FORCE = np.random.RandomState(0).normal(0, 1, (3, 400)) + np.array([[0], [9.81], [0]])
WALK = np.concatenate([FORCE, np.full((3, 400), 0.2)])
NAMES = ["ax", "ay", "az", "gx", "gy", "gz"]


def table(samples=WALK, names=NAMES):
    return pd.DataFrame(samples.T, columns=names)


def test_tables_of_motion(tmp_path):
    table().to_csv(tmp_path / "a.csv", index=False)
    table().to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    (tmp_path / "b.csv").write_text("# a watch\n" + (tmp_path / "a.csv").read_text())
    columns = {"accelerometer": NAMES[:3], "gyroscope": NAMES[3:]}
    timed = table().assign(t=np.arange(400) * 20)
    for source, options in [
        (tmp_path / "a.csv", {"columns": NAMES, "sampling_rate": 50}),
        (str(tmp_path / "a.tsv"), {"sampling_rate": 50}),
        ((tmp_path / "b.csv").read_bytes(), {"columns": columns, "sampling_rate": 50}),
        (table(), {"sampling_rate": 50}),
        ((table(), 50), {}),
        (table()[NAMES[::-1]], {"columns": NAMES, "sampling_rate": 50}),
        (timed, {"columns": columns | {"time": "t"}, "units": {"time": "ms"}}),
        (dict(zip(NAMES, WALK, strict=True)), {"columns": NAMES, "sampling_rate": 50}),
    ]:
        found = read_imu(source, **options)
        assert np.allclose(found.samples, WALK, atol=1e-5), options
        assert found.sampling_rate == pytest.approx(50)
    assert len(read_imus([tmp_path / "a.csv", table()], sampling_rate=50)) == 2


def test_units_are_converted():
    other = np.concatenate([WALK[:3] / 9.80665, np.rad2deg(WALK[3:])])
    for units in (("g", "deg/s"), {"accelerometer": "g", "gyroscope": "deg/s"}):
        assert np.allclose(read_imu((other, 50), units=units).samples, WALK, atol=1e-5)
    for units in (("g", "furlongs"), "g", ("g",), {"magnetometer": "uT"}):
        with pytest.raises(ValueError, match="units"):
            read_imu((other, 50), units=units)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.concatenate([WALK[:3] / 9.80665, WALK[3:]]), "is it in g"),
        (np.concatenate([WALK[:3] * 1000 / 9.80665, WALK[3:]]), "is it in mg"),
        (np.concatenate([WALK[3:], WALK[:3]]), "Is the order other"),
        (np.concatenate([WALK[3:] * 100, WALK[:3] / 9.80665]), "Is the order other"),
        (np.concatenate([WALK[:3], WALK[3:] * 400]), "are these degrees"),
        (np.concatenate([WALK[:3] * 0.1 - [[0], [0.95], [0]], WALK[3:]]), "without gravity"),
        (WALK, None),
    ],
)
def test_gravity_shows_other_units_and_orders(samples, words, caplog):
    with caplog.at_level(logging.WARNING):
        read_imu((samples, 50))
    assert (words in caplog.text) if words else not caplog.text


def test_tables_that_are_not_understood_are_named(tmp_path):
    with pytest.raises(MediaError, match="no column 'acc'; it has ax, ay"):
        read_imu(table(), sampling_rate=50, columns=["acc", *NAMES[1:]])
    with pytest.raises(MediaError, match="which column is the accelerometer's x"):
        read_imu(table(names=list("abcdef")), sampling_rate=50)
    with pytest.raises(ValueError, match="six names"):
        read_imu(table(), sampling_rate=50, columns=NAMES[:5])
    with pytest.raises(ValueError, match="magnet is not known"):
        read_imu(table(), sampling_rate=50, columns={"magnet": NAMES})
    with pytest.raises(MediaError, match="neither"):
        read_imu((WALK, 50), columns=NAMES)
    with pytest.raises(MediaError, match="no sampling rate"):
        read_imu(table())
    jumps = table().assign(t=np.r_[np.arange(399) * 0.02, 100])
    with pytest.raises(MediaError, match="interpolate it to a steady rate"):
        read_imu(jumps, columns={"accelerometer": NAMES[:3], "gyroscope": NAMES[3:], "time": "t"})
    (tmp_path / "a.csv").write_text("ax,ay,az,gx,gy,gz\n1,2,3,4,5,6\n1,2,3,4,5\n")
    with pytest.raises(MediaError, match="row 3 has 5 cells"):
        read_imu(tmp_path / "a.csv", sampling_rate=50)
    (tmp_path / "a.csv").write_text("ax,ay,az,gx,gy,gz\n1,2,3,4,5,six\n")
    with pytest.raises(MediaError, match="column 'gz'.*six"):
        read_imu(tmp_path / "a.csv", sampling_rate=50)
    (tmp_path / "a.csv").write_text("ax,ay,az,gx,gy,gz\n1,2,3,4,5,\n")
    with pytest.raises(MediaError, match="NaN"):
        read_imu(tmp_path / "a.csv", sampling_rate=50)
