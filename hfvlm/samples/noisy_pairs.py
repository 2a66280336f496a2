"""Pairs of images and texts as the web has them: rendered scenes with captions, and noise of known kinds."""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hfvlm.samples.scenes import TEMPLATES, Scene, all_scenes

# What each kind of noise does to a pair.
NOISE = {
    "wrong": "the caption is of another scene",
    "boilerplate": "the text is one that many images have",
    "gibberish": "the text has words that no other text has",
    "short": "the text is one or two words",
    "long": "the text goes on for more than twenty words",
    "tiny": "the image is of a few pixels",
    "elongated": "the image is a narrow strip",
    "damaged": "the file is cut off",
    "duplicate": "the image is one before it, scaled and compressed, with its caption",
}
BOILERPLATE = (
    "click here to enlarge",
    "image 1920 x 1080 pixels",
    "free stock photo download",
    "back to our home page",
)
PADDING = (
    "buy it now with free shipping on all orders while stocks last at the best price of the whole year online today"
)
TINY_EDGE, STRIP = 8, 10
# Originals that duplicates are made of: the first of the set.
COPIED = 12


@dataclass(frozen=True)
class NoisyPair:
    """An image's file with its text.

    Args:
        data: PNG or JPEG.
        text: of the web page.
        scene: what is to be seen.
        noise: its kind, one of NOISE, or "".
    """

    data: bytes
    text: str
    scene: Scene
    noise: str

    @property
    def suffix(self) -> str:
        """The ending of the file's name."""
        return ".jpg" if self.data.startswith(b"\xff\xd8") else ".png"


def noisy_pairs(
    rows: int, shares: Mapping[str, float] | None = None, *, skew: float = 0.0, seed: int = 0, pixels: int = 32
) -> Iterator[NoisyPair]:
    """Yield pairs, the same for the same arguments.

    Args:
        rows: how many.
        shares: of each kind of noise in all rows, as {"wrong": 0.3}; the others are clean.
        skew: the k-th most frequent of the 48 scenes is drawn in proportion to k ** -skew; 0 for all alike.
        seed: of everything that is drawn.
        pixels: of an edge.

    Raises:
        ValueError: there is no such kind of noise, or the shares are more than 1.
    """
    shares = dict(shares or {})
    if unknown := [name for name in shares if name not in NOISE]:
        raise ValueError(f"noise {unknown[0]!r} is none of {', '.join(NOISE)}.")
    if sum(shares.values()) > 1 + 1e-9 or min(shares.values(), default=0) < 0:
        raise ValueError(f"shares of noise must be from 0 to 1 in all, not {sum(shares.values())}.")
    random, scenes = np.random.RandomState(seed), all_scenes()
    order = random.permutation(len(scenes))
    weights = np.arange(1, len(scenes) + 1) ** -float(skew)
    kinds, chances = [*shares, ""], [*shares.values(), max(0.0, 1 - sum(shares.values()))]
    originals: list[tuple[Image.Image, Scene, str]] = []
    for _ in range(rows):
        scene = scenes[order[random.choice(len(scenes), p=weights / weights.sum())]]
        noise = str(random.choice(kinds, p=np.array(chances) / sum(chances)))
        image, text = scene.render(random, pixels), scene.caption(random.choice(TEMPLATES))
        if noise == "duplicate" and originals:
            image, scene, text = originals[random.randint(len(originals))]
        elif noise == "duplicate" or (noise == "" and len(originals) < COPIED):
            noise = ""
            originals.append((image, scene, text))
        yield NoisyPair(encoded(image, noise, random), noisy_text(text, noise, scene, random), scene, noise)


def encoded(image: Image.Image, noise: str, random: np.random.RandomState) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    if noise == "duplicate":
        edge = int(image.width * random.uniform(1.0, 2.0))
        image.resize((edge, edge), Image.Resampling.BICUBIC).save(file, "JPEG", quality=int(random.randint(75, 95)))
        return file.getvalue()
    if noise == "tiny":
        image = image.resize((TINY_EDGE, TINY_EDGE))
    elif noise == "elongated":
        top = int(random.randint(image.height - STRIP))
        image = image.crop((0, top, image.width, top + STRIP))
    image.save(file, "PNG")
    return file.getvalue()[: 60 if noise == "damaged" else None]


def noisy_text(text: str, noise: str, scene: Scene, random: np.random.RandomState) -> str:
    """Return the text of a pair."""
    if noise == "wrong":
        others = [other for other in all_scenes() if other != scene]
        return others[random.randint(len(others))].caption(random.choice(TEMPLATES))
    if noise == "boilerplate":
        return str(random.choice(BOILERPLATE))
    if noise == "gibberish":
        words = ["".join(random.choice(list("bcdfghjklmnpqrstvwxz"), 9)) for _ in range(4)]
        return " ".join(words)
    if noise == "short":
        return str(random.choice(["photo", "untitled", "a thing", "here"]))
    return f"{PADDING}, {text}" if noise == "long" else text


def write_pairs(folder: str | Path, pairs: Iterator[NoisyPair]) -> Path:
    """Write pairs into a folder that `datasets` reads: images, and `metadata.jsonl` with `file_name`, `text`, `label`
    (the caption of what is to be seen) and `noise`.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, pair in enumerate(pairs):
            name = f"{i:06}{pair.suffix}"
            (folder / name).write_bytes(pair.data)
            row = {"file_name": name, "text": pair.text, "label": pair.scene.caption(), "noise": pair.noise}
            metadata.write(json.dumps(row) + "\n")
    return folder
