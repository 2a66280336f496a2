"""The page and the image of a search's hits, the page in a browser."""

import subprocess
import wave
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from hfvlm.inference.pages import draw_grid, drawn, write_page
from tests.support.browser import CHROMIUM, REASON

EVIL = "<img src=x onerror='document.title=1'>&\"#%?.wav"
SCRIPT = "</blockquote><script>document.title='run'</script>"


def write_audio(path):
    times = np.arange(8000) / 16000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.sin(2 * np.pi * 440 * times) * 20000).astype("<i2").tobytes())


def write_video(path):
    av = pytest.importorskip("av", reason="comes with hfvlm[video]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), (255, 0, 0), np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


class Elements(HTMLParser):
    """The page's elements with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media [red]"
    folder.mkdir()
    write_audio(folder / EVIL)
    ramp = np.linspace(500, 4000, 160, dtype=np.uint16)[None].repeat(120, 0)
    ramp[:20, :20] = 0
    Image.fromarray(ramp).save(folder / "depth.png")
    Image.fromarray((29000 + ramp // 8).astype(np.uint16)).save(folder / "thermal.png")
    Image.new("RGB", (60, 40), "red").save(folder / "a [red] <b>circle.png")
    return folder


def page_of(tmp_path, hits, **options):
    names = [(str(path), score) for path, score in hits]
    write_page(names, {name: name for name, _ in names}, "title", tmp_path / "page.html", **options)
    return Elements((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_audio_clips_are_played_from_their_files(media, tmp_path):
    page = page_of(tmp_path, [(media / EVIL, 0.9), (media / "gone.wav", 0.8)], modality="audio")
    (player,) = page.of("audio")
    assert "controls" in player
    assert (tmp_path / unquote(player["src"])).resolve() == (media / EVIL).resolve()
    (link,) = page.of("a")
    assert link["href"] == player["src"]
    assert any("gone.wav" in text for text in page.text)


def test_videos_are_played_from_their_files(media, tmp_path):
    (media / "v.webm").write_bytes(b"a video")
    (player,) = page_of(tmp_path, [(media / "v.webm", 0.9)], modality="video").of("video")
    assert player["src"].endswith("/v.webm")


def test_the_query_and_the_captions_are_shown(media, tmp_path):
    image, sound = media / "a [red] <b>circle.png", media / EVIL
    queries = {"text": ["rain::0.5"], "image": [str(image)], "audio": [f"{sound}::-1"], "imu": ["walk.csv"]}
    captions = {str(image): "a red circle"}
    page = page_of(tmp_path, [(image, 0.9)], queries=queries, captions=captions)
    assert len(page.of("img")) == 2
    assert len(page.of("audio")) == 1
    assert {"rain", "text, weight 0.5", "audio, weight -1", "imu", "a red circle"} <= set(map(str.strip, page.text))


@pytest.mark.parametrize("hostile", [EVIL, SCRIPT, "javascript:alert(1)", "a\0b", "x" * 1000, "\udcff.wav", "{title}"])
def test_names_and_captions_are_no_markup(hostile, media, tmp_path):
    write_page(
        [(hostile, 0.5)], {hostile: hostile}, hostile, tmp_path / "page.html", captions={hostile: hostile},
        queries={modality: [hostile] for modality in ("text", "image", "audio", "depth", "thermal", "imu")},
    )  # fmt: skip
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.of("script", "b ", "iframe", "img", "a", "audio") == []
    shown = hostile.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    assert sum(shown in text.replace("\0", "\ufffd") for text in page.text) >= 3


def test_depth_can_be_seen(media, tmp_path):
    image = np.asarray(drawn("depth", str(media / "depth.png"))).astype(int)
    assert image[0, 0].tolist() == [0, 0, 0], "not measured"
    brightness = image[100].sum(axis=1)
    assert brightness[0] > 500, "near"
    assert brightness[-1] < 200, "far"
    assert (np.diff(brightness[::10]) <= 0).all()
    heat = np.asarray(drawn("thermal", str(media / "thermal.png")))
    assert heat.max() == 255
    assert np.ptp(heat) > 250
    assert drawn("depth", str(media / EVIL)) is None
    flat = tmp_path / "flat.npy"
    np.save(flat, np.full((8, 8), 2.0))
    assert drawn("depth", str(flat)).size == (8, 8)
    np.save(flat, np.zeros((8, 8)))
    assert np.asarray(drawn("depth", str(flat))).max() == 0


def test_a_grid_is_an_image_of_any_kind(media, tmp_path):
    hits = [(str(media / "depth.png"), 0.9), (str(media / EVIL), 0.5)]
    paths = {name: name for name, _ in hits}
    for name in ("grid.png", "grid.jpg"):
        draw_grid(hits, paths, tmp_path / name, modality="depth")
        assert np.ptp(np.asarray(Image.open(tmp_path / name).convert("L").crop((0, 0, 200, 200)))) > 100
    with pytest.raises(ValueError, match=r"\.txt is no kind of image"):
        draw_grid(hits, paths, tmp_path / "grid.txt")
    assert {path.name for path in tmp_path.iterdir()} == {media.name, "grid.png", "grid.jpg"}


@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
def test_in_a_browser(media, tmp_path):
    """What Chromium makes of it: nothing runs, and the media are there."""
    write_video(media / "v.webm")
    hits = [(str(media / EVIL), 0.9), (str(media / "v.webm"), 0.8)]
    queries = {"text": [SCRIPT], "depth": [str(media / "depth.png")], "video": [str(media / "v.webm")]}
    captions = {name: SCRIPT for name, _ in hits}
    write_page(hits, dict.fromkeys(captions, hits[0][0]), SCRIPT, tmp_path / "page.html", modality="audio",
               captions=captions, queries=queries)  # fmt: skip
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800"]
    address = (tmp_path / "page.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120)
    page = Elements(dom.stdout)
    assert page.of("script") == []
    assert "<title>run</title>" not in dom.stdout
    shot = tmp_path / "page.png"
    for _ in range(8):  # a busy machine may not have decoded the video when Chromium's clock has run out
        subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, check=True, timeout=120)
        pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3).astype(int)
        red = (pixels[:, 0] > 150) & (pixels[:, 1] < 60) & (pixels[:, 2] < 60)
        if red.any():
            break
    assert (pixels.sum(axis=1) < 30).any(), "text and the map's hole"
    assert (np.abs(pixels - (20, 20, 90)).max(axis=1) < 30).sum() > 50, "what is far in the depth map"
    assert red.sum() > 1000, "the video's first frame"


def test_pages_are_whole_or_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_page([], {}, "title", Path(tmp_path / "absent" / "page.html"))
    assert list(tmp_path.iterdir()) == []
