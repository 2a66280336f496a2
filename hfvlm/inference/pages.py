"""Hits of a search to look at."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image, to_8_bits

THUMBNAIL = 224
COLUMNS = 5
Hits = Sequence[tuple[int | str, float]]

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({size}px, 1fr)); gap: 1rem }}
figure {{ margin: 0; background: white; padding: .5rem; border-radius: .5rem; box-shadow: 0 1px 4px #0002 }}
img {{ width: 100%; display: block; border-radius: .25rem }}
figcaption {{ font-size: .8rem; overflow-wrap: anywhere; padding-top: .4rem }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
"""


def write_page(hits: Hits, paths: Mapping[str, str], title: str, output: Path) -> None:
    """An HTML page that needs no other file: pictures where there are any, else names."""
    figures = []
    for name, score in hits:
        image = thumbnail(paths.get(str(name)))
        picture = f'<img src="{data_url(image)}" alt="">' if image else ""
        figures.append(f"<figure>{picture}<figcaption>{score:.3f} {html.escape(str(name))}</figcaption></figure>")
    page = PAGE.format(title=html.escape(title), size=THUMBNAIL, figures="\n".join(figures))
    output.write_text(page, encoding="utf-8")


def draw_grid(hits: Hits, paths: Mapping[str, str], output: Path) -> None:
    """One picture of all hits, the nearest first, with their cosines."""
    rows = -(-len(hits) // COLUMNS)
    cell = THUMBNAIL + 24
    grid = Image.new("RGB", (COLUMNS * cell, max(1, rows) * cell), "white")
    draw = ImageDraw.Draw(grid)
    for i, (name, score) in enumerate(hits):
        x, y = i % COLUMNS * cell, i // COLUMNS * cell
        if image := thumbnail(paths.get(str(name))):
            grid.paste(image, (x + (cell - image.width) // 2, y + (THUMBNAIL - image.height) // 2))
        draw.text((x + 8, y + THUMBNAIL + 4), f"{score:.3f} {Path(str(name)).name}"[:36], fill="black")
    grid.save(output)


def thumbnail(path: str | None) -> Image.Image | None:
    """A small version of a picture, or None for what is not one."""
    if path is None:
        return None
    try:
        image = to_8_bits(read_image(path)).convert("RGB")
    except MediaError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
