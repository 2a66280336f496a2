"""The hits of a search as an HTML page or an image."""

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from hfvlm.inference.search import weighed
from hfvlm.media.depth import one_channel
from hfvlm.media.errors import MediaError
from hfvlm.media.images import image_format, read_image, to_8_bits
from hfvlm.writing import replaced

THUMBNAIL = 224
COLUMNS = 5
# The values that become the darkest and the brightest of a map, so that single pixels do not decide.
PERCENTILES = (2, 98)
Hits = Sequence[tuple[int | str, float]]

# Nothing in the page runs: names and captions come with the data.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="generator" content="hfvlm">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="script-src 'none'; object-src 'none'; base-uri 'none'">
<title>{title}</title>
<style>
body {{ font: 16px system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222 }}
main, header {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({size}px, 1fr)); gap: 1rem }}
header {{ border-bottom: 1px solid #ccc; margin-bottom: 1rem; padding-bottom: 1rem }}
figure {{ margin: 0; background: white; padding: .5rem; border-radius: .5rem; box-shadow: 0 1px 4px #0002 }}
img, video, audio {{ width: 100%; display: block; border-radius: .25rem }}
blockquote {{ margin: 0; padding: 1rem; font-size: 1.2rem; overflow-wrap: anywhere }}
figcaption {{ font-size: .8rem; overflow-wrap: anywhere; padding-top: .4rem }}
</style>
<h1>{title}</h1>
{queries}
<main>
{figures}
</main>
"""


def write_page(
    hits: Hits,
    paths: Mapping[str, str],
    title: str,
    output: Path,
    *,
    modality: str = "image",
    captions: Mapping[str, str] | None = None,
    queries: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write an HTML page: images and maps are in it, audio and video are played from their files.

    Args:
        hits: names and scores, the best first.
        paths: of the media, by name; they are linked to where they are files.
        title: of the page.
        output: the page; links are relative to its folder.
        modality: of the hits.
        captions: texts of the hits, by name.
        queries: {"text": ["a beach"], "audio": ["rain.wav"]}, by modality.
    """
    folder = output.resolve().parent
    figures = [
        figure(
            media_html(modality, paths.get(str(name)), folder),
            linked(str(name), paths.get(str(name)), folder),
            f"{score:.3f}",
            (captions or {}).get(str(name), ""),
        )
        for name, score in hits
    ]
    given = [query_figure(kind, query, folder) for kind, several in (queries or {}).items() for query in several]
    page = PAGE.format(
        title=escaped(title),
        size=THUMBNAIL,
        queries="\n".join(["<header>", *given, "</header>"]) if given else "",
        figures="\n".join(figures) or "<p>Nothing was found.</p>",
    )
    with replaced(output) as file:
        file.write_text(page, encoding="utf-8")


def escaped(text: str) -> str:
    """Escape a text for a page; what UTF-8 cannot hold of a file's name becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def figure(shown: str, name: str, note: str, text: str = "") -> str:
    """Return the HTML of an image or a player with its caption; `shown` and `name` are HTML."""
    below = f"<br>{escaped(text)}" if text else ""
    return f"<figure>{shown}<figcaption><b>{escaped(note)}</b> {name}{below}</figcaption></figure>"


def query_figure(modality: str, query: str, folder: Path) -> str:
    """Return the HTML of a query, with its weight where that is not 1."""
    source, weight = weighed(query)
    note = modality if weight == 1 else f"{modality}, weight {weight:g}"
    if modality == "text":
        return figure(f"<blockquote>{escaped(source)}</blockquote>", "", note)
    return figure(media_html(modality, source, folder), linked(source, source, folder), note)


def media_html(modality: str, path: str | None, folder: Path) -> str:
    """Return the HTML that shows or plays a file, empty where it cannot."""
    if path is None:
        return ""
    if modality in ("audio", "video"):
        address = address_of(path, folder)
        return f'<{modality} controls preload="metadata" src="{address}"></{modality}>' if address else ""
    image = drawn(modality, path)
    return f'<img src="{image_url(image)}" alt="">' if image else ""


def linked(name: str, path: str | None, folder: Path) -> str:
    """Return a name, as a link to its file where there is one."""
    address = address_of(path, folder) if path else None
    return f'<a href="{address}">{escaped(name)}</a>' if address else escaped(name)


def address_of(path: str, folder: Path) -> str | None:
    """Return a file's address, relative to the page's folder; a name in it is never a scheme or markup."""
    try:
        if not Path(path).is_file():
            return None
    except (OSError, ValueError):  # too long, or with a NUL
        return None
    try:
        relative = os.path.relpath(Path(path).resolve(), folder)
    except ValueError:  # on another drive
        return html.escape(Path(path).resolve().as_uri())
    return "./" + quote(os.fsencode(relative.replace(os.sep, "/")))


def draw_grid(hits: Hits, paths: Mapping[str, str], output: Path, *, modality: str = "image") -> None:
    """Draw one image of all hits, the nearest first, with their cosines.

    Raises:
        ValueError: the file's name does not end as an image's.
    """
    kind = image_format(output)
    rows = -(-len(hits) // COLUMNS)
    cell = THUMBNAIL + 24
    grid = Image.new("RGB", (COLUMNS * cell, max(1, rows) * cell), "white")
    draw = ImageDraw.Draw(grid)
    for i, (name, score) in enumerate(hits):
        x, y = i % COLUMNS * cell, i // COLUMNS * cell
        if image := drawn(modality, paths.get(str(name))):
            grid.paste(image, (x + (cell - image.width) // 2, y + (THUMBNAIL - image.height) // 2))
        draw.text((x + 8, y + THUMBNAIL + 4), f"{score:.3f} {Path(str(name)).name}"[:36], fill="black")
    about = PngInfo()
    about.add_text("Software", "hfvlm")
    with replaced(output) as file:
        grid.save(file, kind, **({"pnginfo": about} if kind == "PNG" else {}))


def drawn(modality: str, path: str | None) -> Image.Image | None:
    """Draw a small image of a file, or None if it has none; false colours of a sensor as they are."""
    sensor = thumbnail(path, SENSORS[modality]) if modality in SENSORS else None
    return sensor or thumbnail(path)


def draw_image(path: str) -> Image.Image:
    """Draw an image in RGB."""
    return to_8_bits(read_image(path)).convert("RGB")


def thumbnail(path: str | None, draw: Callable[[str], Image.Image] = draw_image) -> Image.Image | None:
    """Draw a file and scale it down; None for what cannot be read."""
    if path is None:
        return None
    try:
        image = draw(path)
    except (MediaError, OSError):  # a caption may be too long for a path
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def draw_depth(path: str) -> Image.Image:
    """Draw a depth map in colours: near is bright, far is blue, what was not measured is black."""
    values = one_channel(path, path, allow_urls=False).astype(np.float64)
    measured = np.isfinite(values) & (values > 0)
    image = ImageOps.colorize(stretched(-values, measured), (20, 20, 90), (255, 240, 150), mid=(60, 150, 140))
    image.paste((0, 0, 0), mask=Image.fromarray(~measured))
    return image


def draw_thermal(path: str) -> Image.Image:
    """Draw a thermal image in grey, hot in white."""
    values = one_channel(path, path, allow_urls=False).astype(np.float64)
    return stretched(values, np.isfinite(values)).convert("RGB")


SENSORS = {"depth": draw_depth, "thermal": draw_thermal}


def stretched(values: np.ndarray, measured: np.ndarray) -> Image.Image:
    """Draw values in grey, so that what was measured fills the range from black to white."""
    low, high = np.percentile(values[measured], PERCENTILES) if measured.any() else (0.0, 0.0)
    share = np.where(measured, np.clip((values - low) / max(high - low, 1e-12), 0, 1), 0)
    return Image.fromarray((share * 255).astype(np.uint8))


def image_url(image: Image.Image) -> str:
    """Return the address of an image that is within the page."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return data_url(file, "jpeg")


def data_url(file: io.BytesIO, kind: str) -> str:
    """Return the address of an encoded image that is within the page."""
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
