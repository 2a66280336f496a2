"""Images of every kind become the right pixels, or an error that names the image."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hfvlm.media import MediaError, images, read_image
from hfvlm.models.clip import HfvlmCLIPImageProcessor
from hfvlm.models.siglip import HfvlmSigLIPImageProcessor, HfvlmSigLIPNaFlexImageProcessor

NOISE = np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def sample():
    return Image.fromarray(NOISE)


@pytest.fixture
def processor():
    return HfvlmCLIPImageProcessor(size=32)


def encoded(image, format="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(sample, processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data := encoded(sample))
    expected = processor(sample, return_tensors="pt")["pixel_values"]
    for source in (
        path,
        str(path),
        data,
        bytearray(data),
        io.BytesIO(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        "data:image/png;base64," + base64.b64encode(data).decode(),
        NOISE,
        NOISE.transpose(2, 0, 1),
        torch.from_numpy(NOISE),
        torch.from_numpy(NOISE).permute(2, 0, 1),
        NOISE / 255,
        (NOISE / 255).astype(np.float32),
        NOISE.astype(np.int64),
    ):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected), type(source)


def test_batches_keep_their_order_on_several_threads(processor):
    several = [Image.new("RGB", (40 + i, 30), (i, 0, 0)) for i in range(40)]
    batch = processor(several, return_tensors="pt")["pixel_values"]
    one_by_one = torch.cat([processor(p, return_tensors="pt")["pixel_values"] for p in several])
    assert torch.equal(batch, one_by_one)
    stacked = processor(torch.from_numpy(np.stack([NOISE, NOISE[::-1]])), return_tensors="pt")["pixel_values"]
    assert stacked.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "La", "RGBX"]
)
def test_every_mode_shows_the_image(mode):
    """A red square on blue stays darker or lighter than its ground whatever the mode."""
    image = Image.new("RGB", (60, 60), (20, 20, 20))
    ImageDraw.Draw(image).rectangle((0, 0, 59, 29), fill=(230, 230, 230))
    steps = {"PA": ("P", "PA"), "La": ("LA", "La")}.get(mode, (mode,))
    for step in steps:
        image = image.convert(step)
    processor = HfvlmCLIPImageProcessor(size=30, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    assert pixels[:, :12].mean() > 0.8, mode
    assert pixels[:, 18:].mean() < 0.2, mode


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    processor = HfvlmCLIPImageProcessor(size=64, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        pixels = processor(image, return_tensors="pt")["pixel_values"][0, 0].numpy()
        assert np.abs(pixels - values / 65535).max() < 0.01


def test_floating_point_images_need_a_known_range():
    with pytest.raises(MediaError, match=r"values in 0..1"):
        HfvlmCLIPImageProcessor()(Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3000, 2), (2, 3000), (33, 32), (31, 500)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_any_aspect_ratio(size, mode):
    processor = HfvlmCLIPImageProcessor(size={"height": 24, "width": 32}, resize_mode=mode)
    pixels = processor(Image.new("RGB", size, "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 32)
    assert torch.isfinite(pixels).all()


def test_thin_images_cost_no_memory(monkeypatch):
    """Only the crop is computed where the whole would be huge; the pixels are the same."""
    from hfvlm.media import resizing

    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (3, 400, 3), dtype=np.uint8))
    whole = np.asarray(resizing.cover(image, (64, 64), 3), dtype=int)
    monkeypatch.setattr(resizing, "MAX_RESIZED_PIXELS", 1000)
    part = np.asarray(resizing.cover(image, (64, 64), 3), dtype=int)
    assert np.abs(whole - part).max() <= 1


def test_settings_are_saved_and_checked(tmp_path):
    processor = HfvlmCLIPImageProcessor(size=48, resize_mode="longest", fill_color=7)
    processor.save_pretrained(tmp_path)
    again = HfvlmCLIPImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in again.SETTINGS} == {
        name: getattr(processor, name) for name in processor.SETTINGS
    }
    for wrong, words in (
        ({"size": "large"}, "size must be an integer or"),
        ({"size": {"height": 0, "width": 3}}, "size must be"),
        ({"resize_mode": "stretch"}, "resize_mode must be one of shortest, longest, squash"),
        ({"antialias": False}, "needs resize_mode 'squash'"),
    ):
        with pytest.raises(ValueError, match=words):
            HfvlmCLIPImageProcessor(**wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'szie'. The nearest that it knows is 'size'"):
        processor(Image.new("RGB", (4, 4)), szie=3)


def test_settings_of_one_call(sample, processor):
    assert processor(sample, return_tensors="pt", size=16)["pixel_values"].shape == (1, 3, 16, 16)
    raw = processor(sample, return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values"]
    assert raw.max() > 200
    unresized = processor([sample, sample], return_tensors="pt", do_resize=False)["pixel_values"]
    assert unresized.shape == (2, 3, 48, 64)
    with pytest.raises(ValueError, match="make no batch"):
        processor([sample, Image.new("RGB", (3, 3))], return_tensors="pt", do_resize=False)
    assert processor.size == {"height": 32, "width": 32}


def test_sampling_without_antialiasing_is_tensorflows():
    """Bilinear between half-pixel centres, fractions cut; expectations worked out by hand."""
    values = np.array([[0, 10, 20, 30]], dtype=np.uint8).repeat(4, axis=0)
    processor = HfvlmSigLIPImageProcessor(size=2, resample=2, antialias=False, image_mean=[0] * 3, image_std=[1] * 3)
    pixels = processor(values, return_tensors="pt")["pixel_values"][0, 0] * 255
    assert torch.equal(pixels.round(), torch.tensor([[5.0, 25.0], [5.0, 25.0]]))
    bigger = processor(values[:, :2], return_tensors="pt", size={"height": 1, "width": 4})["pixel_values"][0, 0] * 255
    assert torch.equal(bigger.round(), torch.tensor([[0.0, 2.0, 7.0, 10.0]]))


def test_naflex_needs_whole_patches_and_room():
    processor = HfvlmSigLIPNaFlexImageProcessor(patch_size=4, max_num_patches=6)
    out = processor([Image.new("RGB", (30, 10)), Image.new("RGB", (9, 9))], return_tensors="pt")
    assert out["pixel_values"].shape == (2, 6, 48)
    assert out["spatial_shapes"].tolist() == [[1, 3], [2, 2]]
    assert out["pixel_attention_mask"].sum(dim=1).tolist() == [3, 4]
    for size in ((10, 8), (32, 32)):
        with pytest.raises(ValueError, match="not made of at most 6 patches of 4 x 4"):
            processor(Image.new("RGB", size), return_tensors="pt", do_resize=False)


# Errors


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.png", "image 1: absent.png: no such file"),
        (b"", "not an image"),
        (b"GIF89a but no", "damaged|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in one of the formats"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.full((4, 4), 3.5), r"values in 3.5..3.5; pass 0..1"),
        (np.full((4, 4), 300), "integers in 300..300"),
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\) is not"),
        (np.zeros((0, 4)), "is not"),
        (3, "an image is a path, bytes"),
        (None, "an image is a path, bytes"),
        ("data:image/png;base64,@@", "damaged base64"),
        ("data:text/plain,hello", "only base64 data URLs"),
    ],
)
def test_bad_images_are_named(processor, sample, source, words):
    with pytest.raises(MediaError, match=words):
        processor([sample, source])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused(processor, sample):
    with pytest.raises(MediaError, match=r"image 1: .*(60000 x 60000 pixels|exceeds limit)"):
        processor([sample, bomb()])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_images_below_pillows_own_limit_are_refused(monkeypatch, sample):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="64 x 48 pixels; more than 1000 are refused"):
        read_image(encoded(sample))
    with pytest.raises(MediaError, match="more than 1000 are refused"):
        read_image(NOISE)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_named(processor, sample, tmp_path, format):
    path = tmp_path / f"cut.{format.lower()}"
    data = encoded(sample, format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=f"cut.{format.lower()}"):
        processor(path)


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "https://example.com/a.png", "HTTP://x/y", "file:///etc/passwd", "ftp://x/y"]
)
def test_urls_are_refused(processor, url):
    with pytest.raises(MediaError, match="URLs are refused"):
        processor(url)


def test_a_downloaded_configuration_cannot_allow_urls(tmp_path):
    HfvlmCLIPImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text().replace("{", '{"allow_urls": true,', 1))
    with pytest.raises(TypeError, match="unexpected keyword argument 'allow_urls'"):
        HfvlmCLIPImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(MediaError, match="URLs are refused"):
        HfvlmCLIPImageProcessor()("http://127.0.0.1/a.png")
