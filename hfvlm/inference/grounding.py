"""Drawing of the regions that models name in their answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hfvlm.media.images import read_image, to_8_bits

# Apart from each other for those who see fewer colours too (Okabe and Ito, 2008).
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def draw_boxes(image: Any, boxes: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw boxes and their labels on a copy of an image, each label in a colour of its own.

    Args:
        image: whatever `hfvlm.media.read_image` reads.
        boxes: as a processor's `post_process_grounding` returns them: "box_xyxy", left, top, right and bottom in
            pixels, "quad_xy", four corners, or "point_xy"; and "label", which may be None.
    """
    canvas = to_8_bits(read_image(image), "image").convert("RGB")
    draw, width = ImageDraw.Draw(canvas), max(2, round(max(canvas.size) / 300))
    font = ImageFont.load_default(max(12, round(max(canvas.size) / 40)))
    labels = list(dict.fromkeys(box.get("label") for box in boxes))
    for box in boxes:
        color = COLORS[labels.index(box.get("label")) % len(COLORS)]
        if "point_xy" in box:
            draw.circle(box["point_xy"], 2 * width, fill=color)
            corners = [tuple(box["point_xy"])]
        else:
            corners = [tuple(corner) for corner in box["quad_xy"]] if "quad_xy" in box else _corners(*box["box_xyxy"])
            draw.line([*corners, corners[0]], fill=color, width=width, joint="curve")
        if box.get("label"):
            _draw_label(draw, str(box["label"]), min(x for x, _ in corners), min(y for _, y in corners), color, font)
    return canvas


def _corners(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _draw_label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, color: str, font: Any) -> None:
    """Draw a label above its region, or inside where the image ends."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x, y = max(0, min(x, draw.im.size[0] - (right - left))), max(0, y - (bottom - top) - 4)
    draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=color)
    draw.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
