"""The joints of a person as colours, and back (baaivision/Painter at cfec845, data/mmpose_custom): red is how near a
joint is, green and blue are which it is."""

from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.models.painter.codes import pixels_of, stepped_colors

# COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, the left one of each pair first.
JOINTS = 17
# Height and width of the original's crops of people, and widths of its Gaussians in pixels: of the areas that have a
# joint's colour, and of red.
CROP = (256, 192)
SIGMAS = (1.5, 3.0)


def joint_colors() -> np.ndarray:
    """Return green and blue of each joint, `(17, 2)`, uint8."""
    return stepped_colors(JOINTS, int(JOINTS**0.5) + 1, channels=2)


def heat_maps(joints: Any, visible: Any = None, size: tuple[int, int] = CROP, sigma: float = 3.0) -> np.ndarray:
    """Draw a Gaussian around each joint, in a square of three sigmas to each side (MSRA's targets, as mmpose makes
    them) -> `(N, height, width)`, float32.

    Args:
        joints: `(N, 2)`, x and y in pixels.
        visible: `(N,)`, 0 for joints that are not drawn.
        size: height and width.
        sigma: in pixels.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 2 or joints.shape[1] != 2:
        raise ValueError(f"Joints are (N, 2), x and y, not {joints.shape}.")
    for edge in size:
        check_integer("size", edge)
    check_number("sigma", sigma, 0, open_low=True)
    shown = np.ones(len(joints)) if visible is None else np.asarray(visible)
    maps, radius = np.zeros((len(joints), *size), np.float32), 3 * sigma
    line = np.arange(0, 2 * radius + 1, dtype=np.float32) - (2 * radius + 1) // 2
    gaussian = np.exp(-(line**2 + line[:, None] ** 2) / (2 * sigma**2))
    for each, (x, y), seen in zip(maps, joints, shown, strict=True):
        centre = int(x + 0.5), int(y + 0.5)
        (left, top), (right, bottom) = ([int(c + by) for c in centre] for by in (-radius, radius + 1))
        if not seen or left >= size[1] or top >= size[0] or right < 0 or bottom < 0:
            continue
        rows, columns = slice(max(0, top), min(bottom, size[0])), slice(max(0, left), min(right, size[1]))
        each[rows, columns] = gaussian[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return maps


def encode_keypoints(
    joints: Any, visible: Any = None, size: tuple[int, int] = CROP, sigmas: tuple[float, float] = SIGMAS
) -> np.ndarray:
    """Paint the joints of one person -> `(height, width, 3)`, uint8.

    Args:
        joints: `(17, 2)`, x and y in pixels.
        visible: `(17,)`, 0 for joints that are not painted.
        size: height and width.
        sigmas: of the areas of green and blue, and of red.

    Raises:
        ValueError: there are more or fewer joints.
    """
    areas = heat_maps(joints, visible, size, sigmas[0]) != 0
    if len(areas) != JOINTS:
        raise ValueError(f"{len(areas)} joints: there are colours for {JOINTS}.")
    heat = heat_maps(joints, visible, size, sigmas[1])
    # Where areas overlap, the joint with the most red; elsewhere the one that is there.
    first, count = areas.argmax(axis=0), areas.sum(axis=0)
    which = np.where(count > 1, heat.argmax(axis=0), first)
    colors = np.where(count[..., None] > 0, joint_colors()[which], 0)
    return np.concatenate([heat.max(axis=0)[..., None] * 255.0, colors], axis=-1).astype(np.uint8)


def decode_keypoints(image: Any) -> np.ndarray:
    """Turn a painted image `(H, W, 3)` in 0..255 into heat maps `(17, H, W)`, float32 in 0..1: red, where green and
    blue are nearest to the colour of the joint."""
    pixels = pixels_of(image).numpy()
    colors = np.concatenate([joint_colors(), np.zeros((1, 2), np.uint8)]).astype(np.float32)
    nearest = np.abs(pixels[:, :, None, 1:] - colors).sum(axis=-1).argmin(axis=-1)
    return (nearest == np.arange(JOINTS)[:, None, None]) * pixels[..., 0] / np.float32(255)


def peaks(maps: np.ndarray) -> np.ndarray:
    """Return x, y and height of the highest point of each map `(N, H, W)`: `(N, 3)`."""
    flat = maps.reshape(len(maps), -1)
    rows, columns = np.unravel_index(flat.argmax(axis=1), maps.shape[1:])
    return np.stack([columns, rows, flat.max(axis=1)], axis=1)
